"""Models of every family against arrays that transformers computed.

`record.py` made the models and the arrays.
"""

import dataclasses
import functools
import pathlib

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import inference
from nested_learning import layers
from nested_learning import models
from nested_learning import pretrained
from nested_learning.pretrained import source as source_lib
from tests import compiling

DATA = pathlib.Path(__file__).parent / 'data'
NAMES = sorted(path.name for path in DATA.iterdir())
_PROMPT = 8  # tokens, see record.py


@functools.cache
def reference(name):
  return dict(np.load(DATA / name / 'reference.npz'))


def load(name, dtype, **changes):
  """Returns the model with changes, its parameters and its forward pass."""
  found = pretrained.load(DATA / name, dtype=jnp.dtype(dtype))
  config = dataclasses.replace(found.config, dtype=dtype, **changes)
  model = models.make_model(config)
  return model, found.params, compiling.jit(model.forward)


def loss_of(model, params, tokens):
  logits, _ = model.forward(params, None, tokens)
  return optax.softmax_cross_entropy_with_integer_labels(
    logits[:, :-1], tokens[:, 1:]
  ).mean()


def with_mixers(config, **changes):
  """Returns a config whose attention has changes, where it has the fields."""
  mixers = tuple(
    dataclasses.replace(
      mixer,
      **{
        name: value
        for name, value in changes.items()
        if getattr(mixer, name) is not None
      },
    )
    for mixer in config.pattern
  )
  mixer = mixers if isinstance(config.mixer, tuple) else mixers[0]
  return dataclasses.replace(config, mixer=mixer)


class FamiliesTest(parameterized.TestCase):
  @parameterized.parameters(NAMES)
  def test_logits_in_float64(self, name):
    with jax.enable_x64(True):
      _, params, forward = load(name, 'float64')
      expected = reference(name)
      tokens, mask = expected['tokens'], expected['mask'].astype(bool)
      logits, _ = forward(params, None, tokens)
      np.testing.assert_allclose(logits, expected['logits'], atol=1e-9)
      padded, _ = forward(params, None, tokens, mask=mask)
      np.testing.assert_allclose(
        np.asarray(padded)[mask], expected['padded'][mask], atol=1e-9
      )

  @parameterized.parameters(NAMES)
  def test_logits_in_float32_and_token_by_token(self, name):
    model, params, forward = load(name, 'float32')
    expected = reference(name)
    tokens = expected['tokens'].astype(np.int32)
    logits, _ = forward(params, None, tokens)
    np.testing.assert_allclose(logits, expected['logits'], atol=1e-4)
    state, parts = model.init_state(params, 2), []
    for t in range(tokens.shape[1]):
      part, state = forward(params, state, tokens[:, t : t + 1])
      parts.append(part)
    np.testing.assert_allclose(
      np.concatenate(parts, axis=1), expected['logits'], atol=1e-4
    )

  @parameterized.parameters(NAMES)
  def test_gradients_and_a_step_of_adam(self, name):
    with jax.enable_x64(True):
      model, params, forward = load(name, 'float64')
      expected = reference(name)
      tokens = expected['tokens']
      grad = compiling.jit(
        jax.value_and_grad(functools.partial(loss_of, model))
      )
      loss, gradient = grad(params, tokens)
      np.testing.assert_allclose(loss, expected['loss'], atol=1e-9)
      source = pretrained.open_source(DATA / name)
      found = source_lib.make_map(source.config, model.config).dump(
        gradient, dict.fromkeys(source.tensors, 'F64')
      )
      names = {n for n in expected if n.startswith('gradient/')}
      self.assertEqual({f'gradient/{n}' for n in found}, names)
      for tensor, of_ours in found.items():
        np.testing.assert_allclose(
          of_ours.read(),
          expected[f'gradient/{tensor}'],
          atol=1e-9,
          err_msg=tensor,
        )
      adam = optax.adam(1e-2)  # the rate of record.py
      updates, _ = adam.update(gradient, adam.init(params))
      logits, _ = forward(optax.apply_updates(params, updates), None, tokens)
      # Adam divides by gradients, which are near 1e-8 for a few weights.
      np.testing.assert_allclose(logits, expected['stepped'], atol=1e-7)

  @parameterized.parameters(NAMES)
  def test_greedy_generation(self, name):
    model, params, _ = load(name, 'float32')
    expected = reference(name)
    tokens, drawn = expected['tokens'][:, :_PROMPT], expected['generated']
    with compiling.quickly():
      generate = inference.make_generate(
        model, num_tokens=drawn.shape[1], temperature=0
      )
      found = generate(params, tokens, jax.random.key(0))
      np.testing.assert_array_equal(found.tokens, drawn)
      # The same prompts behind padding on the left.
      padding = np.zeros((2, 3), tokens.dtype)
      mask = np.arange(3 + _PROMPT) >= 3
      found = generate(
        params,
        np.concatenate([padding, tokens], axis=1),
        jax.random.key(0),
        np.broadcast_to(mask, (2, 3 + _PROMPT)),
      )
    np.testing.assert_array_equal(found.tokens, drawn)

  @parameterized.parameters(
    ('llama', {'rope_theta': 10_000.0}),
    ('llama3', {'rope_scaling': layers.LinearScaling(1.0)}),
    ('mistral', {'window': 64}),
    ('qwen2', {'window': 64}),
    ('qwen3', {'qk_norm': layers.NormConfig(epsilon=1.0)}),
    ('gemma2', {'score_scale': 0.3}),
    ('gemma2', {'score_cap': 50.0}),
    ('gemma3', {'rope_scaling': layers.LinearScaling(1.0)}),
  )
  def test_logits_need_settings_of_attention(self, name, changes):
    model, params, _ = load(name, 'float32')
    changed = models.make_model(with_mixers(model.config, **changes))
    self.assert_differs(name, changed, params)

  @parameterized.parameters(
    ('llama', {'norm': layers.NormConfig()}),
    ('llama', {'embedding': models.EmbeddingConfig()}),
    ('gemma2', {'norm': layers.NormConfig(place='both')}),
    ('gemma2', {'embedding': models.EmbeddingConfig(scale=None)}),
    ('gemma3', {'embedding': models.EmbeddingConfig(scale=1.0)}),
    ('gpt2', {'embedding': models.EmbeddingConfig(scale=1.0)}),
  )
  def test_logits_need_settings_of_the_model(self, name, changes):
    model, params, _ = load(name, 'float32')
    config = dataclasses.replace(model.config, **changes)
    self.assert_differs(name, models.make_model(config), params)

  def assert_differs(self, name, model, params):
    expected = reference(name)
    tokens = expected['tokens'].astype(np.int32)
    logits, _ = compiling.jit(model.forward)(params, None, tokens)
    self.assertGreater(np.abs(logits - expected['logits']).max(), 1e-3)

  @parameterized.parameters('llama3', 'gemma2', 'gpt2')
  def test_parameters_in_half_precision(self, name):
    found = pretrained.load(DATA / name, dtype=jnp.bfloat16)
    self.assertEqual(
      {x.dtype for x in jax.tree.leaves(found.params)}, {jnp.dtype('bfloat16')}
    )
    expected = reference(name)
    tokens = expected['tokens'].astype(np.int32)
    # Rounded weights alone, and rounded activations as well; logits range by 5.
    for dtype, tolerance in (('float32', 0.1), ('bfloat16', 0.2)):
      config = dataclasses.replace(found.config, dtype=dtype)
      forward = compiling.jit(models.make_model(config).forward)
      logits, _ = forward(found.params, None, tokens)
      self.assertEqual(logits.dtype, jnp.float32)
      np.testing.assert_allclose(logits, expected['logits'], atol=tolerance)

  @parameterized.parameters(('llama',), ('gpt2',))
  def test_reads_into_shardings(self, name):
    source = pretrained.open_source(DATA / name)
    config = pretrained.to_model_config(source.config)
    table = models.make_model(config).table
    mesh = jax.make_mesh((2,), ('fsdp',))
    place = lambda param: jax.NamedSharding(
      mesh,
      jax.P(*(('fsdp' if a == 'embed' else None) for a in param.axes)),
    )
    shardings = jax.tree.map(place, table, is_leaf=lambda x: hasattr(x, 'axes'))
    found = source_lib.load_params(source, config, shardings=shardings)
    plain = source_lib.load_params(source, config)
    for ours, whole, sharding in zip(
      *map(jax.tree.leaves, (found, plain, shardings)), strict=True
    ):
      self.assertEqual(ours.sharding, sharding)
      np.testing.assert_array_equal(ours, whole)

  def test_a_window_with_sinks_is_the_same_model_before_it_is_full(self):
    model, params, forward = load('llama', 'float32')
    tokens = reference('llama')['tokens'].astype(np.int32)
    expected, _ = forward(params, None, tokens)
    mixer = dataclasses.replace(model.config.mixer, window=8, num_sinks=2)
    windowed = models.make_model(dataclasses.replace(model.config, mixer=mixer))
    logits, _ = compiling.jit(windowed.forward)(params, None, tokens)
    np.testing.assert_allclose(logits[:, :8], expected[:, :8], atol=1e-5)
    self.assertGreater(np.abs(logits[:, 8:] - expected[:, 8:]).max(), 1e-2)
