"""Tests of --mode=session, on a checkpoint of one step."""

import contextlib
import dataclasses
import hashlib
import io
import pathlib
from unittest import mock

from absl.testing import absltest
import jax
import numpy as np

from nested_learning import configs
from nested_learning import errors
from nested_learning import inference
from nested_learning import levels
from nested_learning import models
from nested_learning import tasks
from nested_learning import training
from nested_learning.inference import session_files
from nested_learning.training import session
from tests import compiling
from tests.training import pretrained_runs_test
from tests.training import tiny


def digest(folder):
  """Returns the hash of all files below a folder."""
  paths = sorted(path for path in folder.rglob('*') if path.is_file())
  return hashlib.sha256(b''.join(path.read_bytes() for path in paths)).digest()


class SessionTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(compiling.quickly())
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.path = self.root / 'me.session'
    self.text = self.root / 'fed.txt'
    self.text.write_text('the words of one user. ' * 5)

  def config(self, **changes):
    settings = {'path': str(self.path), 'feed': (str(self.text),), **changes}
    return tiny.experiment(
      self.root,
      train={'num_steps': 1},
      inner=levels.make_inner((16, 32), learning_rate=0.3),
      session=inference.SessionConfig(**settings),
    )

  def run_session(self, config):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
      training.run(config, self.root / 'run', 'session')
    return output.getvalue()

  def test_feeds_answers_and_saves(self):
    with contextlib.redirect_stdout(io.StringIO()):
      training.run(self.config(), self.root / 'run', 'train')
    before = digest(self.root / 'run' / 'checkpoints')
    output = self.run_session(self.config(prompt='the '))
    self.assertIn('Beginning after 0 tokens', output)
    self.assertIn('116 tokens, ', output)
    self.assertIn('bits per byte while it was read\nthe ', output)
    self.assertIn('level slow: 3 updates', output)
    first = self.path.read_bytes()
    again = self.run_session(self.config())
    self.assertIn('Going on after 121 tokens', again)
    self.assertIn('level slow: 7 updates', again)
    self.assertNotEqual(self.path.read_bytes(), first)
    self.assertEqual(digest(self.root / 'run' / 'checkpoints'), before)

  def test_refuses_and_keeps_files_that_do_not_fit(self):
    # Without a trained run: parameters are all that a session takes of it.
    params = models.make_model(tiny.MODEL).init_params(jax.random.key(0))

    def run(config):
      with contextlib.redirect_stdout(io.StringIO()):
        session.run_session(config, params)

    run(self.config())
    kept = self.path.read_bytes()
    empty = self.root / 'empty.txt'
    empty.touch()
    binary = self.root / 'binary.txt'
    binary.write_bytes(b'\xff\xfe\xff')
    feed = lambda path: self.config(feed=(str(self.text), str(path)))
    other = levels.make_inner((16, 32), learning_rate=0.1)
    for config, message in (
      (feed(empty), 'is empty; nothing was fed'),
      (feed(binary), 'it is not UTF-8 text'),
      (feed(self.root / 'none'), 'No such file'),
      (self.config(feed=()), 'nothing to read'),
      (self.config(path=None), '--session=runs/NAME'),
      (dataclasses.replace(self.config(), inner=other), 'was begun with'),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        run(config)
      self.assertEqual(self.path.read_bytes(), kept)
    for content, message in (
      (kept[: len(kept) // 2], 'cut short'),
      (b'', 'is not a session'),
      (b'some notes', 'is not a session'),
    ):
      self.path.write_bytes(content)
      with self.assertRaisesRegex(errors.UserError, message):
        run(self.config())
      self.assertEqual(self.path.read_bytes(), content)
    with (
      session_files.lock(self.path),
      self.assertRaisesRegex(errors.UserError, 'in use by process'),
    ):
      run(self.config())

  def test_reads_line_ends_as_training_does(self):
    self.text.write_bytes(b'one\r\ntwo\r\n')
    self.assertEqual(session._read(str(self.text)), 'one\r\ntwo\r\n')

  def test_a_task_has_no_sessions(self):
    config = training.ExperimentConfig(
      name='a',
      model=tiny.MODEL,
      data=tasks.TaskDataConfig(tasks.RegressionConfig(num_points=8)),
    )
    with self.assertRaisesRegex(errors.UserError, 'learned a task'):
      training.run(config, self.root / 'run', 'session')


class GuardedSessionTest(pretrained_runs_test.Imports):
  """Sessions on an imported model, which are compared with the frozen one."""

  def run_session(self, *changes):
    config = configs.override(
      self.config,
      [
        f'session.path={self.root / "me.session"}',
        f'session.feed={self.root / "text.txt"}',
        'inner.levels=8',
        *changes,
      ],
    )
    output = io.StringIO()
    with compiling.quickly(), contextlib.redirect_stdout(output):
      training.run(config, self.workdir, 'session')
    return output.getvalue()

  def test_a_session_that_gets_worse_is_not_kept(self):
    self.config = self.imported()
    (self.root / 'text.txt').write_text('ab' * 60)
    other = self.root / 'other.txt'
    other.write_text('xyz' * 40)
    feed = f'session.feed={self.root / "text.txt"},{other}'

    def losses(reader, tokens, reset):
      del reader
      # 'a' and 'b' are tokens 4 and 5; the frozen model knows the others.
      return np.where(reset, np.nan, np.where(tokens <= 5, 9.0, 0.1))

    with (
      mock.patch.object(inference.FrozenReader, 'losses', losses),
      self.assertRaisesRegex(
        errors.UserError, 'other.txt: what the session .*% worse than the froz'
      ),
    ):
      self.run_session(feed)
    # The first text is kept, and nothing of the second.
    path = self.root / 'me.session'
    self.assertEqual(session_files.read(path).arrays['clock'], [121])
    path.unlink()
    output = self.run_session('inner.levels.0.learning_rate=0.1')
    self.assertRegex(
      output, r'bits per byte while it was read \([\d.]+ without learning\)'
    )
    self.assertRegex(
      output, r'me.session: levels [\d.]+ MB, memories and caches [\d.]+ MB'
    )
    path.unlink()
    output = self.run_session('session.guard=none')
    self.assertNotIn('without learning', output)

  def test_memories_alone_learn_where_levels_rest(self):
    self.config = self.imported()
    (self.root / 'text.txt').write_text('ab' * 60)
    rest = 'inner.levels=none'
    with self.assertRaisesRegex(errors.UserError, 'the model has no memories'):
      self.run_session(rest)
    output = self.run_session(
      rest,
      'model.placement.memory=MemoryMixerConfig',
      'model.placement.memory.num_heads=1',
      'model.placement.memory.head_dim=4',
      'model.placement.memory_layers=1,',
    )
    self.assertIn('me.session: levels 0.0 MB, memories and caches', output)
    self.assertNotIn('without learning', output)  # nothing to guard
    self.assertNotIn('updates', output)


class GuardTest(absltest.TestCase):
  def test_excess(self):
    guard = inference.Guard(0.1)
    nan = float('nan')
    guard.add(np.array([nan, 2.0, 2.0]), np.array([nan, 2.0, 2.0]))
    self.assertEqual(guard.excess, 0)
    guard.add(np.array([3.0, 3.0]), np.array([2.0, 2.0]))
    self.assertAlmostEqual(guard.excess, 0.25, delta=1e-3)
    with self.assertRaisesRegex(errors.UserError, 'x: .* 25.0% worse'):
      guard.check('x')
    guard.add(np.array([nan]), np.array([2.0]))
    self.assertEqual(guard.excess, float('inf'))

  def test_the_frozen_model_reads_in_any_pieces(self):
    config = dataclasses.replace(tiny.MODEL, max_length=64)
    model = models.make_model(config)
    params = compiling.jit(model.init_params)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(200, size=48)
    reset = np.arange(48) == 0
    read = lambda *cuts: np.concatenate(
      [
        reader.losses(*part)
        for reader in [inference.FrozenReader(model, params)]
        for part in zip(
          np.split(tokens, cuts), np.split(reset, cuts), strict=True
        )
      ]
    )
    whole = read()
    self.assertTrue(np.isnan(whole[0]))
    np.testing.assert_allclose(read(16, 32), whole, rtol=1e-4)
