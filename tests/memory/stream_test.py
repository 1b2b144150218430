"""Streams: any split into calls, gaps, borders, reading without writing."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import memory
from tests import compiling
from tests.memory import problems

_SETTINGS = (
  {
    'kind': 'mlp',
    'erase': 'every_map',
    'retain_to': 'initial',
    'momentum': True,
    'max_norm': 0.5,
    'chunk_size': 7,
  },
  {
    'kind': 'matrix',
    'erase': 'input',
    'retain_to': 'zero',
    'momentum': False,
    'chunk_size': 16,
  },
)


class Stream:
  """An engine compiled once per length, with explicit reset and mask."""

  def __init__(self, settings):
    kind = settings['kind']
    self.problem = problems.make_problem(kind, momentum=settings['momentum'])
    self.rule = problems.make_rule(kind, settings)
    self.start = memory.init_state(
      self.rule, self.problem.initial, problems.BATCH
    )

    @compiling.jit_static('write', 'engine')
    def call(state, inputs, reset, mask, *, write, engine):
      result, state = engine(
        self.problem.network,
        self.rule,
        self.problem.initial,
        state,
        inputs,
        project=self.problem.project,
        reset=reset,
        mask=mask,
        write=write,
      )
      return result.read, state

    self._call = call

  def __call__(
    self,
    state,
    start,
    end,
    *,
    mask=None,
    reset=None,
    write=True,
    engine=memory.scan_chunks,
  ):
    """Reads the problem's tokens from `start` to `end`."""
    part = lambda x, axis: np.take(x, range(start, end), axis)
    inputs = {k: part(v, 2) for k, v in self.problem.inputs.items()}
    reset = self.problem.reset if reset is None else reset
    mask = np.ones_like(reset) if mask is None else mask
    return self._call(
      state,
      inputs,
      part(reset, 1),
      part(mask, 1),
      write=write,
      engine=engine,
    )


def assert_close(actual, expected, tolerance=1e-10):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance),
    actual,
    expected,
  )


class StreamTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  @parameterized.parameters(*[(s,) for s in _SETTINGS])
  def test_streams(self, settings):
    stream = Stream(settings)
    num_tokens = stream.problem.reset.shape[1]
    whole, last = stream(stream.start, 0, num_tokens)
    last = problems.comparable(last)

    with self.subTest('calls of any length'):
      for lengths in ((10, 23), (1, 9, 23)):
        pieces, state, t = [], stream.start, 0
        for n in lengths:
          read, state = stream(state, t, t + n)
          pieces.append(read)
          t += n
        assert_close(np.concatenate(pieces, axis=2), whole)
        assert_close(problems.comparable(state), last)

    with self.subTest('chunks, then token by token, as generation does'):
      read, state = stream(stream.start, 0, 10)
      pieces = [read]
      for t in range(10, num_tokens):
        read, state = stream(state, t, t + 1, engine=memory.scan_tokens)
        pieces.append(read)
      assert_close(np.concatenate(pieces, axis=2), whole)
      assert_close(problems.comparable(state), last)

    with self.subTest('random calls, each row cut at tokens of its own'):
      rng = np.random.default_rng(0)
      for num_calls in (2, 3, 8):
        # A token belongs to one call; the others find a gap in its place.
        call = np.sort(rng.integers(num_calls, size=(2, num_tokens)), axis=1)
        state, total = stream.start, 0.0
        for i in range(num_calls):
          there = call == i
          read, state = stream(state, 0, num_tokens, mask=there)
          total += np.where(there[:, None, :, None], read, 0.0)
        assert_close(total, whole)
        assert_close(problems.comparable(state), last)

    with self.subTest('rows of different lengths equal the rows alone'):
      mask = np.arange(num_tokens) < np.array([[9], [24]])
      read, state = stream(stream.start, 0, num_tokens, mask=mask)
      for row, length in enumerate((9, 24)):
        alone = np.broadcast_to(mask[row], mask.shape)
        expected, end = stream(stream.start, 0, num_tokens, mask=alone)
        np.testing.assert_array_equal(
          read[row, :, :length], expected[row, :, :length]
        )
        np.testing.assert_allclose(
          read[row, :, :length], whole[row, :, :length], 1e-10, 1e-10
        )
        assert_close(
          jax.tree.map(lambda x, row=row: x[row], state),
          jax.tree.map(lambda x, row=row: x[row], end),
          0.0,
        )

    with self.subTest('tokens that are not there change no bit'):
      _, state = stream(stream.start, 0, 10)
      none = np.zeros((2, num_tokens), bool)
      _, after = stream(state, 0, num_tokens, mask=none)
      assert_close(after._replace(anchor=None), state._replace(anchor=None), 0)
      for engine in (memory.scan_chunks, memory.scan_tokens):
        _, after = stream(state, 3, 4, mask=none, engine=engine)
        assert_close(after, state, 0.0)

    with self.subTest('a call without tokens changes no bit'):
      _, state = stream(stream.start, 0, 10)
      for engine in (memory.scan_chunks, memory.scan_tokens):
        read, after = stream(state, 10, 10, engine=engine)
        self.assertEqual(read.shape, (*whole.shape[:2], 0, whole.shape[3]))
        assert_close(after, state, 0.0)

    with self.subTest('writes off: reads, and changes no bit'):
      quiet = np.zeros((2, num_tokens), bool)
      _, state = stream(stream.start, 0, 10)
      _, after = stream(state, 0, num_tokens, reset=quiet, write=False)
      assert_close(after.memory, state.memory, 0.0)
      assert_close(after.trace, state.trace, 0.0)
      read, after = stream(
        stream.start, 0, num_tokens, reset=quiet, write=False
      )
      assert_close(after.memory, stream.start.memory, 0.0)
      self.assertGreater(np.abs(read - whole).max(), 1e-2)
      # The memory at rest gives the same token the same read, anywhere.
      read_again, _ = stream(after, 0, num_tokens, reset=quiet, write=False)
      assert_close(read_again, read)

    with self.subTest('writes off: borders act as they do token by token'):
      _, state = stream(stream.start, 0, 10)
      both = [
        stream(state, 10, num_tokens, write=False, engine=engine)
        for engine in (memory.scan_chunks, memory.scan_tokens)
      ]
      (read, after), (expected, end) = both
      assert_close(read, expected)
      assert_close(problems.comparable(after), problems.comparable(end))

  @parameterized.product(settings=_SETTINGS, feed=('made', 'given'))
  def test_writes_off_from_the_start(self, settings, feed):
    problem = problems.make_problem(
      settings['kind'], momentum=settings['momentum'], num_tokens=32
    )
    rule = problems.make_rule(settings['kind'], settings)
    start = memory.init_state(rule, problem.initial, problems.BATCH)

    @compiling.jit
    def run(inputs):
      project = problem.project
      if feed == 'given':
        inputs, project = project(problem.initial, inputs), None
      return [
        memory.scan_chunks(
          problem.network,
          rule,
          problem.initial,
          state,
          inputs,
          project=project,
          write=False,
        )
        for state in (None, start)
      ]

    (at_start, state), (carried, _) = run(problem.inputs)
    assert_close(at_start.read, carried.read)
    assert_close(state.memory, start.memory, 0.0)

  @parameterized.parameters(*[(s,) for s in _SETTINGS])
  def test_documents_are_alone(self, settings):
    problem = problems.make_problem(
      settings['kind'], momentum=settings['momentum']
    )
    rule = problems.make_rule(settings['kind'], settings)
    border = 17  # in the middle of a chunk
    reset = jnp.zeros(problem.reset.shape, bool).at[:, border].set(True)

    def reads(inputs):
      result, state = memory.scan_chunks(
        problem.network,
        rule,
        problem.initial,
        None,
        inputs,
        project=problem.project,
        reset=reset,
      )
      return jnp.sum(jnp.square(result.read[:, :, border:])), (
        result.read,
        state,
      )

    run = compiling.jit(jax.grad(reads, has_aux=True))
    grads, (read, state) = run(problem.inputs)
    other = jax.tree.map(
      lambda x: x.at[:, :, :border].multiply(-0.5), problem.inputs
    )
    if settings['momentum']:
      other['momentum'] = jnp.abs(other['momentum'])
    _, (read_other, state_other) = run(other)
    np.testing.assert_array_equal(
      read[:, :, border:], read_other[:, :, border:]
    )
    self.assertGreater(np.abs(read - read_other)[:, :, :border].max(), 0.1)
    assert_close(state, state_other, 0.0)
    for grad in jax.tree.leaves(grads):
      np.testing.assert_array_equal(grad[:, :, :border], 0.0)
      self.assertGreater(np.abs(grad[:, :, border:]).max(), 1e-4)
