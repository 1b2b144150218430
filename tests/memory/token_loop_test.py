"""The token loop against the recurrence in NumPy."""

from absl.testing import parameterized
import jax
import numpy as np

from nested_learning import memory
from tests import compiling
from tests.memory import problems
from tests.memory import reference

_CASES = (
  # kind, erase, retain_to, momentum, objective, read, chunk size, erase from
  ('mlp', 'every_map', 'initial', True, 'l2', 'token', 7, 'previous'),
  ('mlp', 'output', 'initial', False, 'dot', 'token', 7, 'previous'),
  ('matrix', 'output', 'zero', False, 'l2', 'token', 7, 'previous'),
  (
    'mlp',
    'every_map',
    'initial',
    True,
    'dot',
    'token',
    7,
    'previous',
    'output',
  ),
  ('mlp', 'input', 'zero', False, 'dot', 'chunk', 16, 'retained'),
  ('mlp', 'none', 'zero', True, 'l2', 'token', 1, 'previous'),
  ('matrix', 'input', 'initial', True, 'l2', 'token', 7, 'retained'),
  ('matrix', 'none', 'zero', False, 'dot', 'token', 64, 'previous'),
  ('matrix', 'every_map', 'zero', True, 'l2', 'chunk', 1, 'previous'),
)


class TokenLoopTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  @parameterized.parameters(*_CASES)
  def test_equals_the_recurrence(
    self,
    kind,
    erase,
    retain_to,
    momentum,
    objective,
    read,
    chunk_size,
    erase_from,
    learns='every_map',
  ):
    problem = problems.make_problem(kind, momentum=momentum)
    settings = {
      'erase': erase,
      'retain_to': retain_to,
      'momentum': momentum,
      'objective': objective,
      'read': read,
      'chunk_size': chunk_size,
      'erase_from': erase_from,
      'learns': learns,
    }
    rule = problems.make_rule(kind, settings)

    @compiling.jit
    def run(initial, inputs, reset, mask):
      result, state = memory.scan_tokens(
        problem.network,
        rule,
        initial,
        memory.init_state(rule, initial, problems.BATCH),
        inputs,
        project=problem.project,
        reset=reset,
        mask=mask,
      )
      return result.read, state

    for use_marks in (False, True):
      mask = problem.mask | (not use_marks)
      reads, state = run(
        problem.initial, problem.inputs, problem.reset & use_marks, mask
      )
      expected_reads, expected_memory = reference.run(
        problem, rule, objective=objective, use_marks=use_marks
      )
      there = np.asarray(mask)[:, None, :, None]
      np.testing.assert_allclose(
        np.where(there, reads, 0.0), expected_reads, rtol=1e-9, atol=1e-9
      )
      for name, expected in expected_memory.items():
        np.testing.assert_allclose(
          state.memory[name], expected, rtol=1e-9, atol=1e-9
        )
      # The memory moved, and its reads are not zero.
      moved = [
        np.max(np.abs(weights - problem.initial[name]))
        for name, weights in expected_memory.items()
      ]
      self.assertGreater(max(moved), 0.1)
      self.assertGreater(np.abs(expected_reads).max(), 0.1)
