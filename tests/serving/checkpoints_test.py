"""Tests of opening runs and imported models for serving."""

import contextlib
import importlib.util
import io
import pathlib

from absl.testing import absltest

from nested_learning import configs
from nested_learning import errors
from nested_learning import levels
from nested_learning import serving
from nested_learning import training
from nested_learning.serving import checkpoints
from nested_learning.training import pretrained_runs
from tests import compiling
from tests.training import pretrained_runs_test
from tests.training import tiny

_TEMPLATE = (
  "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)


class CheckpointsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(compiling.quickly())
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def open(self, checkpoint):
    service = serving.Service(
      checkpoint, self.root / 'sessions', serving.Limits()
    )
    self.addCleanup(service.close)
    return service

  def ask(self, service, **kwargs):
    found = []
    request = serving.Request('x', learn=True, draw=serving.Draw(4), **kwargs)
    service.start(request, found.append)
    while service.step():
      pass
    if isinstance(found[0], Exception):
      raise found[0]
    return found[0]

  def test_opens_the_last_checkpoint_of_a_run(self):
    config = tiny.experiment(
      self.root,
      train={'num_steps': 1},
      inner=levels.make_inner((16, 32), learning_rate=0.3),
    )
    workdir = self.root / 'run'
    with contextlib.redirect_stdout(io.StringIO()):
      training.run(config, workdir, 'train')
    checkpoint = checkpoints.open_checkpoint(config, workdir, name='tiny')
    service = self.open(checkpoint)
    checkpoints.warm_up(service)
    self.assertEmpty(service.store.all())
    entry = service.store.create()
    result = self.ask(service, text='line 3 of file', session=entry)
    self.assertEqual(result.num_read, 15)
    self.assertEqual(result.steps, {'fast': 1, 'slow': 0})
    with self.assertRaisesRegex(errors.UserError, 'no checkpoint'):
      checkpoints.open_checkpoint(config, self.root / 'no', name='tiny')

  def test_an_imported_model_answers_in_its_template(self):
    if importlib.util.find_spec('jinja2') is None:
      self.skipTest('needs Jinja2: make extras')
    importer = pretrained_runs_test.PretrainedRunsTest('copy')
    importer.root = self.root
    folder = importer.copy()
    (folder / 'chat_template.jinja').write_text(_TEMPLATE)
    workdir = self.root / 'base'
    pretrained_runs.import_run(str(folder), workdir)
    config = configs.override(
      configs.load(str(workdir / 'config.json')), ['inner.levels=8']
    )
    checkpoint = checkpoints.open_checkpoint(config, workdir, name='llama')
    self.assertEqual(checkpoint.chat_stops, ())
    service = self.open(checkpoint)
    entry = service.store.create()
    chat = [{'role': 'user', 'content': 'ab'}]
    first = self.ask(service, messages=chat, session=entry)
    self.assertEqual(first.num_read, 6)  # <doc><start>ab<end><start>
    chat.append({'role': 'assistant', 'content': first.text})
    chat.append({'role': 'user', 'content': 'c'})
    second = self.ask(service, messages=chat, session=entry)
    self.assertEqual(second.num_read, 5)  # <end><start>c<end><start>
