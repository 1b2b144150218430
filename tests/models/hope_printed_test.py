"""Tests Hope as printed against a NumPy loop over a whole layer."""

import dataclasses

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_learning import models
from tests import compiling
from tests.models import contract_test
from tests.models import hope_reference

_LENGTH, _VOCAB = 64, 11
_CHUNK, _CHUNK_OTHERS = 4, 10  # tokens; both end inside a segment
_SIZE = models.zoo.Size(
  num_layers=1,
  embed_dim=8,
  num_heads=2,
  mlp_dim=15,
  vocab_size=_VOCAB,
  max_length=_LENGTH,
  update_every=(8, 16, 32),
)
_STEP = 1e-6  # of finite differences


class LoopTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))
    rng = np.random.default_rng(0)
    shape = 2, _LENGTH
    self.tokens = rng.integers(_VOCAB, size=shape).astype(np.int32)
    self.reset = np.zeros(shape, bool)
    self.reset[0, 29] = True  # inside chunks and a segment
    self.weights = rng.normal(size=(*shape, _VOCAB))
    self.rng = rng

  def make(self, adaptive=()):
    """Makes the model, with short chunks, and parameters none of which is 0."""
    config = models.zoo.make_sized('hope_printed', _SIZE, dtype='float64')
    mixer = dataclasses.replace(
      config.mixer,
      chunk_size=_CHUNK,
      chunk_size_others=_CHUNK_OTHERS,
      max_norm=None,  # as printed; the family adds a bound
      adaptive=(*config.mixer.adaptive, *adaptive),
    )
    self.config = dataclasses.replace(config, mixer=mixer)
    inner = models.zoo.FAMILIES['hope_printed'].inner(_SIZE)
    # Rates at which every level moves, and each by another.
    rates = (0.01, 0.02, 0.03)
    self.inner = dataclasses.replace(
      inner,
      levels=tuple(
        dataclasses.replace(level, learning_rate=rate)
        for level, rate in zip(inner.levels, rates, strict=True)
      ),
    )
    self.model = models.make_model(self.config, self.inner)
    params = compiling.jit(self.model.init_params)(jax.random.key(0))
    return jax.tree.map(
      lambda x: np.asarray(x, np.float64) + 0.1 * self.rng.normal(size=x.shape),
      params,
    )

  def reference(self, params):
    """Returns logits [b, t, v] and levels by row."""
    rows = zip(self.tokens, self.reset, strict=True)
    logits, levels = zip(
      *(
        hope_reference.read_row(params, self.config, self.inner, *row)
        for row in rows
      ),
      strict=True,
    )
    return np.stack(logits), levels

  def forward(self, params):
    return self.model.forward(params, None, self.tokens, reset=self.reset)

  def check_values(self, adaptive=()):
    params = self.make(adaptive)
    logits, state = compiling.jit(self.forward)(params)
    expected, levels = self.reference(params)
    np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-9)
    start = params['blocks']['levels']
    for name, level in state.levels.items():
      self.assertFalse(np.any(level.frozen))
      found = level.params['blocks'].first['levels'][name]
      for row in range(len(self.tokens)):
        for key, expected in levels[row][name].items():
          np.testing.assert_allclose(found[key][row, 0], expected, 1e-9, 1e-9)
          moved = np.abs(expected - start[name][key][0]).max()
          self.assertGreater(moved, 1e-3, f'{name} {key}')

  def test_values_equal_the_loop(self):
    self.check_values()

  @pytest.mark.slow
  def test_values_equal_the_loop_with_a_memory_for_the_query(self):
    self.check_values(('q',))

  @pytest.mark.slow
  def test_gradient_equals_finite_differences_of_the_loop(self):
    params = self.make()
    loss = lambda logits: (self.weights * logits).sum()
    gradient = compiling.jit(
      jax.grad(lambda params: loss(self.forward(params)[0]))
    )(params)
    leaves, tree = jax.tree.flatten_with_path(params)
    # One direction of all parameters, and one of each part of the layer.
    for part in ('', 'main', 'others', 'bias', 'levels', 'conv', "['in']"):
      direction = tree.unflatten(
        self.rng.normal(size=x.shape) * (part in jax.tree_util.keystr(path))
        for path, x in leaves
      )
      values = [
        loss(
          self.reference(
            jax.tree.map(lambda x, d, s=s: x + s * d, params, direction)
          )[0]
        )
        for s in (_STEP, -_STEP)
      ]
      expected = (values[0] - values[1]) / (2 * _STEP)
      found = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))
      np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=part)


@pytest.mark.slow
class LongStreamTest(parameterized.TestCase):
  """An untrained model of one block on long streams."""

  def read(self, config, inner=None, scales=(1.0,)):
    """Reads repeated tokens, random tokens and text.

    Args:
      config: The model; streams are as long as a call may be.
      inner: How its levels learn.
      scales: Factors of the initial parameters.

    Returns:
      Logits [4, t, v] and the state, for each factor.
    """
    model = models.make_model(config, inner)
    rows = contract_test.make_streams(config.max_length)

    @compiling.jit
    def forward(scale):
      params = model.init_params(jax.random.key(0))
      params = jax.tree.map(lambda x: (x * scale).astype(x.dtype), params)
      return model.forward(params, None, rows)

    return [forward(scale) for scale in scales]

  @parameterized.parameters('float32', 'bfloat16')
  def test_levels_that_learn_stay_finite(self, dtype):
    config = models.zoo.make_config(
      'hope_printed_tiny', num_layers=1, max_length=8192, dtype=dtype
    )
    inner = models.zoo.make_inner('hope_printed_tiny')
    for logits, state in self.read(config, inner, (1.0, 4.0, 16.0)):
      self.assertTrue(np.all(np.isfinite(logits)))
      self.assertTrue(np.all(state.levels['slow'].num_updates > 0))

  def test_without_a_bound_repeated_tokens_grow_the_map_of_the_key(self):
    config = models.zoo.make_config(
      'hope_printed_tiny', num_layers=1, max_length=2048
    )
    free = dataclasses.replace(config.mixer, max_norm=None)
    norms = []
    for mixer in (config.mixer, free):
      ((_, state),) = self.read(dataclasses.replace(config, mixer=mixer))
      weights = state.main.memory['in'][0, 0]  # [h, f, d]
      norms.append(np.linalg.norm(weights, axis=(-1, -2)).max())
    self.assertLess(norms[0], 100.0)
    self.assertGreater(norms[1], 1e4)
