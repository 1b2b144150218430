"""The fused kernel, interpreted, against the token loop; and compiled."""

from collections.abc import Mapping
from typing import Any

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import memory
from tests import compiling
from tests.memory import problems


def supported() -> list[dict[str, Any]]:
  """Returns the rows of the covering set that the kernel runs."""
  return [row for row in problems.covering() if not row['momentum']]


def run_both(problem, rule, marks, *, dtype=np.float64, feed='made'):
  """Returns (gradients, (reads, state)) of the token loop and the kernel."""
  cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
  mask = marks.get('mask', np.ones((1, 1)))[:, None, :, None]
  weights = np.random.default_rng(1).normal(size=problem.inputs['q'].shape)
  weights = jnp.asarray(weights * mask, dtype)

  def loss(values, engine, options):
    initial, inputs = values
    project = jax.tree_util.Partial(problem.project)
    if feed == 'given':  # as the initial memory would make it
      inputs, project = project(initial, inputs), None
    result, after = engine(
      problem.network,
      rule,
      initial,
      memory.init_state(rule, initial, problems.BATCH),
      inputs,
      project=project,
      **marks,
      **options,
    )
    after = problems.comparable(after)
    seen = jnp.where(weights != 0, result.read, 0.0)
    total = jnp.sum(weights * seen)
    for leaf in jax.tree.leaves((after.memory, after.anchor)):
      total += jnp.sum(jnp.sin(leaf))
    return total, (seen, after)

  @compiling.jit
  def run(values):
    grad = jax.grad(loss, has_aux=True)
    return (
      grad(values, memory.scan_tokens, {}),
      grad(values, memory.scan_fused, {'interpret': True}),
    )

  return run(cast((problem.initial, problem.inputs)))


class FusedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  @parameterized.parameters(*[(row,) for row in supported()])
  def test_equals_token_loop(self, settings: Mapping[str, Any]):
    kind = settings['kind']
    tokens = 64 if settings['marks'] == 'none' else 33
    problem = problems.make_problem(kind, num_tokens=tokens)
    marks = {}
    if settings['marks'] != 'none':
      marks['reset'] = problem.reset
    if settings['marks'] == 'reset_and_mask':
      marks['mask'] = problem.mask
    (expected_grads, expected), (grads, actual) = run_both(
      problem, problems.make_rule(kind, settings), marks, feed=settings['feed']
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


if __name__ == '__main__':
  absltest.main()
