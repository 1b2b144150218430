"""The fused kernel: interpreted, against the token loop, and compiled."""

from collections.abc import Mapping
import functools
import importlib.util
import itertools
import re
from typing import Any
from unittest import mock

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_learning import accelerators
from nested_learning import compilation
from nested_learning import layers
from nested_learning import memory
from nested_learning import parameters
from nested_learning import sharding
from nested_learning.layers import base
from nested_learning.memory import fused
from nested_learning.memory import fused_plan
from tests import compiling
from tests.memory import problems

_interpreted = functools.partial(memory.scan_fused, interpret=True)
# Self-modifying Titans, as the zoo has them.
_HOPE = {
  'erase': 'output',
  'learns': 'output',
  'objective': 'dot',
  'max_norm': 8.0,
  'chunk_size': 16,
}


def supported() -> list[dict[str, Any]]:
  """Returns the rows of the covering set that the kernel runs."""
  return [row for row in problems.covering() if not row['momentum']]


def make_marks(problem, kind: str) -> dict[str, jax.Array]:
  marks = {}
  if kind != 'none':
    marks['reset'] = problem.reset
  if kind == 'reset_and_mask':
    marks['mask'] = problem.mask
  return marks


def make_run(problem, rule, *, feed='made', fresh=False):
  """Makes `run(values, marks, engine)`: gradients, and (reads, state)."""

  def loss(values, marks, engine):
    initial, inputs = values
    project = jax.tree_util.Partial(problem.project)
    if feed == 'given':  # as the initial memory would make it
      inputs, project = project(initial, inputs), None
    start = None
    if not fresh or engine is memory.scan_tokens:
      start = memory.init_state(rule, initial, problems.BATCH)
    result, after = engine(
      problem.network,
      rule,
      initial,
      start,
      inputs,
      project=project,
      **marks,
    )
    after = problems.comparable(after)
    mask = marks.get('mask', jnp.ones((1, 1), bool))[:, None, :, None]
    seen = jnp.where(mask, result.read, 0.0)
    weights = np.random.default_rng(1).normal(size=seen.shape)
    total = jnp.sum(weights.astype(seen.dtype) * seen)
    for leaf in jax.tree.leaves((after.memory, after.anchor)):
      total += jnp.sum(jnp.sin(leaf))
    return total, (seen, after)

  return compiling.jit(
    jax.grad(loss, has_aux=True), static_argnames=('engine',)
  )


class FusedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  def check_equal(self, expected, actual, value=1e-9, gradient=1e-6):
    """Compares (gradients, values); tolerances are relative to the largest."""
    for found, wanted, tolerance in (
      (actual[1], expected[1], value),
      (actual[0], expected[0], gradient),
    ):
      pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
      for a, b in pairs:
        self.assertTrue(np.isfinite(a).all())
        bound = tolerance * max(np.abs(b).max(), 1e-3)
        self.assertLessEqual(np.abs(a - b).max(), bound)

  def check_equals_token_loop(self, settings: Mapping[str, Any]):
    kind = settings['kind']
    tokens = 64 if settings['marks'] == 'none' else 33
    problem = problems.make_problem(kind, num_tokens=tokens)
    rule = problems.make_rule(kind, settings)
    marks = make_marks(problem, settings['marks'])
    run = make_run(problem, rule, feed=settings['feed'])
    values = problem.initial, problem.inputs
    expected = run(values, marks, engine=memory.scan_tokens)
    for leaf in jax.tree.leaves(expected[0]):
      self.assertGreater(np.abs(leaf).max(), 1e-3)
    self.check_equal(expected, run(values, marks, engine=_interpreted))

  @parameterized.parameters(*[(row,) for row in supported()[::3]])
  def test_equals_token_loop(self, settings):
    self.check_equals_token_loop(settings)

  @parameterized.parameters(
    *[(row,) for i, row in enumerate(supported()) if i % 3]
  )
  @pytest.mark.slow
  def test_equals_token_loop_in_other_settings(self, settings):
    self.check_equals_token_loop(settings)

  @parameterized.parameters(np.float32, np.float64)
  def test_hope_with_a_document_at_every_place(self, dtype):
    problem = problems.make_problem('mlp', num_tokens=21)
    rule = problems.make_rule('mlp', _HOPE | {'chunk_size': 8})
    cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
    values = cast((problem.initial, problem.inputs))
    run = make_run(problem, rule, fresh=True)
    tolerances = (1e-5, 1e-4) if dtype == np.float32 else (1e-9, 1e-6)
    for place in range(9):
      reset = np.zeros((problems.BATCH, 21), bool)
      reset[0, place] = reset[1, 20 - place] = True
      marks = {'reset': jnp.asarray(reset)}
      expected = run(values, marks, engine=memory.scan_tokens)
      actual = run(values, marks, engine=_interpreted)
      self.check_equal(expected, actual, *tolerances)

  def test_a_stream_in_pieces(self):
    problem = problems.make_problem('mlp')
    rule = problems.make_rule('mlp', _HOPE)
    run = compiling.jit(
      lambda state, inputs, reset, mask, engine: engine(
        problem.network,
        rule,
        problem.initial,
        state,
        inputs,
        project=jax.tree_util.Partial(problem.project),
        reset=reset,
        mask=mask,
      ),
      static_argnames=('engine',),
    )
    ends = {}
    for engine, cuts in (
      (memory.scan_tokens, [0, 33]),
      (_interpreted, [0, 11, 22, 33]),
    ):
      state = memory.init_state(rule, problem.initial, problems.BATCH)
      reads = []
      for start, stop in itertools.pairwise(cuts):
        part = slice(start, stop)
        inputs = {k: x[:, :, part] for k, x in problem.inputs.items()}
        reset, mask = problem.reset[:, part], problem.mask[:, part]
        result, state = run(state, inputs, reset, mask, engine=engine)
        reads.append(jnp.where(mask[:, None, :, None], result.read, 0.0))
      ends[engine] = jnp.concatenate(reads, 2), problems.comparable(state)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9),
      *ends.values(),
    )

  def test_keeps_some_states_and_recomputes_the_others(self):
    problem = problems.make_problem('matrix', num_tokens=64)
    rule = problems.make_rule('matrix', {'chunk_size': 4})
    values = problem.initial, problem.inputs
    run = make_run(problem, rule, fresh=True)
    expected = run(values, {}, engine=memory.scan_chunks)
    made = []
    make_plan = fused_plan.make_plan

    def note(*args, **kwargs):
      made.append(make_plan(*args, **kwargs))
      return made[-1]

    with (
      mock.patch.object(fused_plan, '_KEPT_BYTES', 1),
      mock.patch.object(fused_plan, 'make_plan', note),
    ):
      actual = run(values, {}, engine=_interpreted)
    self.assertEqual(made[0].every, 4)  # of 16 chunks
    self.check_equal(expected, actual)

  def test_second_derivatives(self):
    problem = problems.make_problem('matrix', num_tokens=16)
    rule = problems.make_rule('matrix', {'chunk_size': 8})
    inputs = problem.project(problem.initial, problem.inputs)

    def squared(inputs, engine):
      def loss(inputs):
        arguments = problem.network, rule, problem.initial, None, inputs
        return jnp.sum(jnp.sin(engine(*arguments, project=None)[0].read))

      grads = jax.grad(loss)(inputs)
      return sum(jnp.sum(x**2) for x in jax.tree.leaves(grads))

    run = compiling.jit(jax.grad(squared), static_argnames=('engine',))
    expected = run(inputs, engine=memory.scan_chunks)
    self.check_equal((expected, ()), (run(inputs, engine=_interpreted), ()))

  def test_sharded_equals_unsharded(self):
    problem = problems.make_problem('mlp', num_tokens=32)
    rule = problems.make_rule('mlp', _HOPE)
    run = make_run(problem, rule)
    values = problem.initial, problem.inputs
    expected = run(values, {'reset': problem.reset}, engine=memory.scan_chunks)
    config = sharding.MeshConfig(data=2, model=2)
    mesh = sharding.make_mesh(config, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
      lowered = run.lower(values, {'reset': problem.reset}, engine=_interpreted)
      actual = run(values, {'reset': problem.reset}, engine=_interpreted)
    self.assertIn('manual_computation', lowered.as_text())
    self.check_equal(expected, jax.device_get(actual))

  def test_a_long_stream_at_full_rates_stays_finite(self):
    network = memory.make_matrix(num_heads=1, dim=8, num_vectors=1)
    rule = memory.Rule(chunk_size=16, objective=memory.OBJECTIVES['dot'])
    rng = np.random.default_rng(0)
    key = np.repeat(rng.normal(size=(1, 1, 512, 8)), 8, axis=2)  # repeated
    key = jnp.asarray(key / np.linalg.norm(key, axis=-1, keepdims=True))
    ones = jnp.ones((1, 1, 4096, 1))
    inputs = memory.WriteInputs(key, key, 2.0 * ones, ones, query=key)
    inputs = jax.tree.map(lambda x: x.astype(np.float32), inputs)
    initial = {'in': jnp.eye(8, dtype=np.float32)[None]}
    result, state = compiling.jit(
      lambda inputs: _interpreted(
        network, rule, initial, None, inputs, project=None
      )
    )(inputs)
    for leaf in jax.tree.leaves((result, state.memory)):
      self.assertLess(np.abs(leaf).max(), 100.0)


class PlainRulesTest(parameterized.TestCase):
  """Rules by which memories run without the kernel."""

  def setUp(self):
    super().setUp()
    fused._say_once.cache_clear()

  @parameterized.parameters(
    ({'momentum': True}, {}, 'has momentum'),
    ({}, {'write': False}, 'write nothing'),
    ({'chunk_size': 7}, {}, 'chunk_size=7 is no multiple of 8'),
    ({}, {'project': lambda weights, inputs: inputs}, 'cannot see'),
    ({}, {}, 'the device is no TPU'),
  )
  def test_names_the_reason(self, settings, options, message):
    rule = problems.make_rule('matrix', {'chunk_size': 16, **settings})
    reason = fused.unsupported(rule, **{'project': None, **options})
    self.assertRegex(reason, message)

  def trace(self, width, vmem_bytes):
    """Returns why a matrix memory of a width has no kernel, and the padding."""
    network = memory.make_matrix(num_heads=1, dim=width, num_vectors=1)
    rule = problems.make_rule('matrix', {'chunk_size': 64})
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    token = shape(1, 1, 128, width)
    rate = shape(1, 1, 128, 1)
    inputs = memory.WriteInputs(token, token, rate, rate, query=token)
    initial = {'in': shape(1, width, width)}
    run = lambda initial, inputs: memory.scan_fused(
      network, rule, initial, None, inputs, project=None
    )
    with (
      mock.patch.object(fused, '_is_tpu', lambda: True),
      mock.patch.object(fused, '_vmem_bytes', lambda _: vmem_bytes),
      mock.patch.object(fused, '_say_once') as say_why,
      mock.patch.object(fused, '_say_padding') as say_padding,
    ):
      jax.eval_shape(run, initial, inputs)
    first = lambda said: said.call_args.args if said.called else None
    return first(say_why), first(say_padding)

  def test_names_the_width_that_fits_into_vmem(self):
    (reason,), _ = self.trace(1024, 2**24)
    found = re.fullmatch(
      r'a head of width 1024 needs (\d+) MiB of VMEM, and a core has 14 for '
      r'it; the nearest width that fits is (\d+)',
      reason,
    )
    self.assertGreater(int(found[1]), 14)
    fits = int(found[2])
    self.assertBetween(fits, 256, 1016)
    self.assertIsNone(self.trace(fits, 2**24)[0])
    self.assertIsNotNone(self.trace(fits + 8, 2**24)[0])

  def test_names_the_padding_of_heads_that_fill_no_tile(self):
    why, (width, ratio) = self.trace(48, 2**26)
    self.assertIsNone(why)
    self.assertEqual(width, 48)
    self.assertBetween(ratio, 2.0, 3.0)  # maps [48, 48] lie in 128 lanes
    self.assertLess(self.trace(128, 2**26)[1][1], 1.5)
    for ratio, number in ((1.1, 0), (2.5, 1)):
      fused._say_padding.cache_clear()
      with mock.patch.object(fused.logging, 'warning') as warning:
        fused._say_padding(48, ratio)
      self.assertEqual(warning.call_count, number)

  def test_a_network_with_arrays_of_its_own_runs_plainly(self):
    scale = jnp.full((problems.DIM,), 2.0)
    network = memory.make_matrix(
      num_heads=problems.HEADS,
      dim=problems.DIM,
      num_vectors=1,
      finish=lambda x, y: x + scale * y,
    )
    problem = problems.make_problem('matrix', num_tokens=16)
    inputs = problem.project(problem.initial, problem.inputs)
    rule = problems.make_rule('matrix', {'chunk_size': 8})
    initial = {'in': problem.initial['in'][:, : problems.DIM]}
    run = lambda engine: engine(
      network, rule, initial, None, inputs, project=None
    )
    with self.assertLogs(level='WARNING') as logged:
      found = run(_interpreted)
      run(_interpreted)
    self.assertLen(logged.output, 1)
    self.assertIn('made with other arrays', logged.output[0])
    expected = run(memory.scan_chunks)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def make_mixer_gradient(**settings):
  """Makes the gradient of a fused mixer, and its arguments' shapes."""
  config = layers.MemoryMixerConfig(2, 16, engine='fused', **settings)
  layer = config.make(embed_dim=32, dtype=jnp.bfloat16)

  def loss(params, x, reset):
    read, _ = layer.apply(params, None, x, base.TokenInfo(reset=reset))
    return jnp.sum(jnp.square(read.astype(jnp.float32)))

  return jax.grad(loss, argnums=(0, 1)), (
    parameters.abstract(layer.table),
    jax.ShapeDtypeStruct((1, 100, 32), jnp.bfloat16),
    jax.ShapeDtypeStruct((1, 100), bool),
  )


# Hope, and Gated DeltaNet.
_MIXERS = (
  {},
  {
    'kind': 'matrix',
    'adaptive': (),
    'target': 'value',
    'erase': 'input',
    'erase_from': 'retained',
    'initial': 'zero',
    'retain_to': 'zero',
    'max_norm': None,
  },
)


class TpuTest(parameterized.TestCase):
  @parameterized.parameters(*[(settings,) for settings in _MIXERS])
  def test_lowers_for_tpus(self, settings):
    gradient, arguments = make_mixer_gradient(**settings)
    with (
      mock.patch.object(fused, '_is_tpu', return_value=True),
      mock.patch.object(fused, '_vmem_bytes', return_value=2**27),
    ):
      exported = jax.export.export(jax.jit(gradient), platforms=['tpu'])(
        *arguments
      )
    # The forward pass and the backward pass of each memory.
    calls = exported.mlir_module().count('@tpu_custom_call')
    self.assertEqual(calls, 4 if settings == {} else 2)

  @parameterized.parameters('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2')
  @pytest.mark.extra
  def test_compiles_ahead_of_time(self, name):
    if not importlib.util.find_spec('libtpu'):
      self.skipTest("needs libtpu: pip install '.[tpu]'")
    topology = accelerators.find(name)
    devices = compilation.find_devices(topology)[:1]
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1), devices=devices)
    gradient, arguments = make_mixer_gradient()
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    arguments = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
      arguments,
    )
    with jax.set_mesh(mesh):
      compiled = jax.jit(gradient).trace(*arguments).lower().compile()
    found = compilation.analyze(compiled.as_text(), mesh.shape)
    self.assertGreater(found.memory_flops, 0.5 * found.total_flops)
    self.assertEmpty(found.in_memory_loops)
