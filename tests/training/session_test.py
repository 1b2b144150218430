"""Tests of --mode=session, on a checkpoint of one step."""

import contextlib
import dataclasses
import hashlib
import io
import pathlib

from absl.testing import absltest
import jax

from nested_learning import errors
from nested_learning import inference
from nested_learning import levels
from nested_learning import models
from nested_learning import tasks
from nested_learning import training
from nested_learning.inference import session_files
from nested_learning.training import session
from tests import compiling
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


if __name__ == '__main__':
  absltest.main()
