"""The chunk scan against the token loop: values and gradients in float64."""

from collections.abc import Mapping
import itertools
import random
from typing import Any
from unittest import mock

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_learning import memory
from nested_learning.memory import chunk_scan
from tests import compiling
from tests.memory import problems


def sweep() -> list[dict[str, Any]]:
  """Returns all settings of the update rule, the other factors at random."""
  rng = random.Random(0)
  names = ('kind', 'erase', 'retain_to', 'momentum', 'chunk_size')
  others = [name for name in problems.FACTORS if name not in names]
  rows = []
  for values in itertools.product(*(problems.FACTORS[n] for n in names)):
    row = {name: rng.choice(problems.FACTORS[name]) for name in others}
    row.update(zip(names, values, strict=True))
    if row['erase'] == 'none' and row['target'] == 'own':
      # Without erase nothing else bounds a memory that makes its own targets.
      row['max_norm'] = 0.5
    rows.append(row)
  return rows


class _Comparison(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))
    # Streams of more than 16 chunks recompute groups in the backward pass.
    self.enterContext(mock.patch.object(chunk_scan, '_KEPT_CHUNKS', 16))

  def check_equals_token_loop(self, settings: Mapping[str, Any]):
    kind, momentum = settings['kind'], settings['momentum']
    num_tokens = 64 if settings['marks'] == 'none' else 33
    problem = problems.make_problem(
      kind, num_tokens=num_tokens, momentum=momentum
    )
    rule = problems.make_rule(kind, settings)
    marks = {}
    if settings['marks'] != 'none':
      marks['reset'] = problem.reset
    if settings['marks'] == 'reset_and_mask':
      marks['mask'] = problem.mask
    weights = np.random.default_rng(1).normal(size=problem.inputs['q'].shape)
    weights = weights * marks.get('mask', np.ones((1, 1)))[:, None, :, None]

    def loss(values, engine, marks):
      initial, inputs = values
      project = problem.project
      if settings['feed'] == 'given':  # as the initial memory would make it
        inputs, project = project(initial, inputs), None
      state = memory.init_state(rule, initial, problems.BATCH)
      if engine is memory.scan_chunks and 'mask' not in marks:
        state = None
      result, state = engine(
        problem.network,
        rule,
        initial,
        state,
        inputs,
        project=project,
        **marks,
      )
      state = problems.comparable(state)
      seen = jnp.where(weights != 0, result.read, 0.0)
      total = jnp.sum(weights * seen)
      for leaf in jax.tree.leaves((state.memory, state.anchor, state.trace)):
        total += jnp.sum(jnp.sin(leaf))
      return total, (seen, state)

    @compiling.jit
    def run(values, marks):
      grad = jax.grad(loss, has_aux=True)
      return (
        grad(values, memory.scan_tokens, marks),
        grad(values, memory.scan_chunks, marks),
      )

    (expected_grads, expected), (grads, actual) = run(
      (problem.initial, problem.inputs), marks
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9),
      actual,
      expected,
    )
    for a, b in zip(
      jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True
    ):
      self.assertTrue(np.isfinite(b).all())
      self.assertGreater(np.abs(b).max(), 1e-3)
      self.assertLess(np.abs(a - b).max(), 1e-6 * np.abs(b).max())


class ChunkScanTest(_Comparison):
  @parameterized.parameters(*[(row,) for row in problems.covering()])
  def test_equals_token_loop(self, settings):
    self.check_equals_token_loop(settings)


@pytest.mark.slow
class ChunkScanSweepTest(_Comparison):
  @parameterized.parameters(*[(row,) for row in sweep()])
  def test_equals_token_loop(self, settings):
    self.check_equals_token_loop(settings)
