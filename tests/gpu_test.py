"""The library on an NVIDIA GPU, against the CPU: make test-gpu."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_learning import inference
from nested_learning import memory
from nested_learning import models
from nested_learning.layers import dot_product
from nested_learning.training import step as step_lib
from tests.layers import dot_product_test
from tests.memory import problems

pytestmark = pytest.mark.gpu

_FAMILIES = ('hope', 'transformer', 'gated_deltanet')
_TOKENS = 128


def find_gpu() -> jax.Device:
  """Returns a GPU; skips the test if there is none."""
  try:
    return jax.devices('cuda')[0]
  except RuntimeError as error:
    raise absltest.unittest.SkipTest(
      "There is no NVIDIA GPU, or JAX's plugin for it is not installed "
      "(pip install '.[cuda]') or not asked for (JAX_PLATFORMS=cuda,cpu)."
    ) from error


class GpuTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.gpu, self.cpu = find_gpu(), jax.devices('cpu')[0]
    # Otherwise GPUs multiply float32 in TF32, with ten bits.
    self.enterContext(jax.default_matmul_precision('highest'))

  def on(self, device, function, *args):
    """Computes on a device; returns NumPy arrays."""
    with jax.default_device(device):
      out = jax.jit(function)(*jax.device_put(args, device))
    self.assertEqual({x.device for x in jax.tree.leaves(out)}, {device})
    return jax.device_get(out)

  def assert_close(self, found, expected, tolerance):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
      bound = tolerance * max(np.abs(b).max(), 1e-3)
      self.assertLessEqual(np.abs(a - b).max(), bound)

  def check(self, function, *args, tolerance):
    expected = self.on(self.cpu, function, *args)
    self.assert_close(self.on(self.gpu, function, *args), expected, tolerance)

  def make_model(self, family):
    model = models.make_model(models.zoo.make_config(f'{family}_tiny'))
    return model, jax.device_get(model.init_params(jax.random.key(0)))

  def make_tokens(self, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 257, (2, _TOKENS), dtype=np.int32)

  @parameterized.parameters(*_FAMILIES)
  def test_logits_equal_the_cpu(self, family):
    model, params = self.make_model(family)
    reset = np.arange(_TOKENS)[None] % 50 == np.array([[0], [7]])
    forward = lambda params, tokens, reset: model.forward(
      params, None, tokens, reset=reset
    )[0]
    self.check(forward, params, self.make_tokens(), reset, tolerance=1e-4)

  @parameterized.parameters(*_FAMILIES)
  def test_a_training_step_equals_the_cpu(self, family):
    model, params = self.make_model(family)
    optimizer = optax.sgd(1e-2)
    update = step_lib.make_update(model, optimizer)
    tokens = self.make_tokens()
    batch = {
      'tokens': tokens,
      'targets': np.roll(tokens, -1, axis=1),
      'mask': np.ones(tokens.shape, bool),
      'reset': np.zeros(tokens.shape, bool),
    }

    def take(params, batch):
      guard = step_lib.guard_lib.init_guard()
      state = step_lib.TrainState(params, optimizer.init(params), None, guard)
      state, metrics = update(state, batch)
      return metrics['loss'], metrics['gradient_norm'], state.params

    self.check(take, params, batch, tolerance=1e-3)

  @parameterized.parameters(*_FAMILIES)
  def test_draws_the_tokens_that_the_cpu_draws(self, family):
    model, params = self.make_model(family)
    generate = inference.make_generate(model, num_tokens=16, temperature=0.0)
    prompt = self.make_tokens()[:, :20]

    def draw(device):
      with jax.default_device(device):
        moved = jax.device_put(params, device)
        return generate(moved, prompt, jax.random.key(0))

    found, expected = draw(self.gpu), draw(self.cpu)
    self.assertEqual(found.tokens.device, self.gpu)
    np.testing.assert_array_equal(found.tokens, expected.tokens)

  @parameterized.parameters('mlp', 'matrix')
  def test_the_chunk_scan_equals_the_token_loop(self, kind):
    problem = problems.make_problem(kind, num_tokens=_TOKENS)
    settings = {
      'erase': 'output',
      'learns': 'output',
      'objective': 'dot',
      'chunk_size': 16,
    }
    rule = problems.make_rule(kind, settings)

    def loss(engine, initial, inputs):
      start = memory.init_state(rule, initial, problems.BATCH)
      result, _ = engine(
        problem.network,
        rule,
        initial,
        start,
        inputs,
        project=problem.project,
        reset=problem.reset,
      )
      return jnp.sum(jnp.sin(result.read)), result.read

    values = jax.tree.map(
      lambda x: np.asarray(x, np.float32), (problem.initial, problem.inputs)
    )
    run = lambda engine: jax.grad(
      functools.partial(loss, engine), argnums=(0, 1), has_aux=True
    )
    expected = self.on(self.cpu, run(memory.scan_tokens), *values)
    found = self.on(self.gpu, run(memory.scan_chunks), *values)
    self.assert_close(found[1], expected[1], 1e-4)
    self.assert_close(found[0], expected[0], 1e-3)

  def test_cudnn_equals_the_blocks(self):
    arrays = dot_product_test.make_arrays(num_tokens=512, head_dim=64)
    widest = dot_product._widest_cudnn_head()
    if not widest:
      self.skipTest('cuDNN attends on GPUs from Ampere on.')
    loss = lambda *x: jnp.sum(
      jnp.sin(dot_product_test.attend(*x).astype(jnp.float32))
    )
    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))
    text = jax.jit(gradient).lower(*arrays).compile().as_text()
    self.assertIn('__cudnn$fmha', text)
    to_float = lambda out: jax.tree.map(lambda x: np.float32(x), out)
    expected = to_float(self.on(self.cpu, gradient, *arrays))
    found = to_float(self.on(self.gpu, gradient, *arrays))
    self.assert_close(found, expected, 5e-2)
