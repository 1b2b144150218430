"""Runs every mode and checks the files that it writes."""

import contextlib
import dataclasses
import io
import json
import pathlib
import types
from unittest import mock

from absl.testing import parameterized

from nested_learning import configs
from nested_learning import errors
from nested_learning import files
from nested_learning import layers
from nested_learning import levels
from nested_learning import sharding
from nested_learning import training
from nested_learning.training import make_workload
from nested_learning.training import modes
from nested_learning.training import trainer
from tests.training import tiny

_TITANS = layers.MemoryMixerConfig(
  num_heads=2, head_dim=8, kind='matrix', adaptive=(), chunk_size=16
)


class ModesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    tiny.share_executables(self)
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.workdir = self.root / 'run'
    self.config = tiny.experiment(
      self.root,
      model={'mixer': _TITANS},
      evaluation={'stream_tokens': 128, 'inner': levels.make_inner((16, 64))},
    )

  def run_mode(self, mode, config=None):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
      training.run(config or self.config, self.workdir, mode)
    return output.getvalue()

  def read(self, name):
    return json.loads((self.workdir / name).read_text())

  def test_train_evaluate_generate(self):
    verdict = self.run_mode('train')
    summary = self.read('summary.json')
    self.assertEqual(summary['steps'], 6)
    self.assertEqual(summary['tokens'], 6 * 256)
    self.assertLess(summary['bits_per_byte'], 9)
    self.assertNotEqual(
      summary['bits_per_byte'], summary['bits_per_byte_writes_off']
    )
    first = verdict.splitlines()[0]
    self.assertStartsWith(first, 'Bits per byte on streams of 128 tokens')
    ends = '_writes_off', '', '_levels_learning'
    numbers = [summary[f'stream_bits_per_byte{end}'] for end in ends]
    self.assertEqual(numbers, sorted(set(numbers), reverse=True))
    for number, what in zip(numbers, ('off', 'memory', 'levels'), strict=True):
      self.assertRegex(first, f'{number:.3f} with [a-z ]*{what}')
    for value in summary.values():
      self.assertIsInstance(value, int | float | str)
    stored = configs.from_json((self.workdir / 'config.json').read_text())
    self.assertEqual(stored, self.config)
    report = (self.workdir / 'report.md').read_text()
    for text in (
      verdict.strip(),
      '![Loss by position, writes on and off](loss_by_position.png)',
      (self.workdir / 'sample.txt').read_text().strip(),
    ):
      self.assertIn(text, report)
    self.assertRegex(report, r'\| slow +\| 512 +\| 3 +\|')
    for plot in ('loss.png', 'loss_by_position.png', 'stream.png'):
      self.assertEqual((self.workdir / plot).read_bytes()[1:4], b'PNG')
    table = (self.workdir / 'loss_by_position.csv').read_text().splitlines()
    self.assertLen(table, 1 + self.config.data.sequence_length)

    # The checkpoint is the model that was trained.
    self.run_mode('eval')
    for name, value in self.read('evaluation.json').items():
      self.assertAlmostEqual(value, summary[name], places=6)
    self.assertEqual(self.read('summary.json').keys(), summary.keys())

    # A folder that cannot be written loses no number.
    output = io.StringIO()
    refuse = mock.patch.object(
      files, 'write_whole', side_effect=errors.UserError('read-only')
    )
    with refuse, contextlib.redirect_stdout(output):
      with self.assertRaisesRegex(errors.UserError, 'read-only'):
        training.run(self.config, self.workdir, 'eval')
    self.assertEqual(output.getvalue(), verdict)

    text = self.run_mode('generate')
    self.assertEqual(text, (self.workdir / 'sample.txt').read_text() + '\n')
    self.assertStartsWith(text, 'line')
    self.assertEqual(text, self.run_mode('generate'))
    other = dataclasses.replace(self.config.generate, seed=1)
    config = dataclasses.replace(self.config, generate=other)
    self.assertNotEqual(text, self.run_mode('generate', config))

  def test_needs_a_checkpoint(self):
    for mode in ('eval', 'generate'):
      with self.assertRaisesRegex(errors.UserError, 'holds no checkpoint'):
        self.run_mode(mode)
      self.assertFalse(self.workdir.exists())

  def test_without_validation_data(self):
    config = tiny.experiment(
      self.root, data={'validation_fraction': 0.0}, train={'num_steps': 1}
    )
    verdict = self.run_mode('train', config)
    self.assertStartsWith(verdict, 'Not evaluated: data.validation_fraction=0')
    self.assertIn(verdict.strip(), (self.workdir / 'report.md').read_text())
    self.assertNotIn('bits_per_byte', self.read('summary.json'))

  @parameterized.parameters('{"cut', '[1]', '')
  def test_a_damaged_summary_is_one_line(self, text):
    path = self.root / 'summary.json'
    path.write_text(text)
    output = io.StringIO()
    with contextlib.redirect_stderr(output):
      self.assertIsNone(modes._read_summary(path))
    self.assertRegex(output.getvalue(), r'^.*summary.json cannot be read .*\n$')

  def test_a_model_that_has_diverged_is_one_line(self):
    workload = make_workload.make_workload(self.config)
    evaluated = types.SimpleNamespace(loss=float('nan'))
    mesh = trainer.make_mesh(self.config)
    with self.assertRaisesRegex(
      errors.UserError, 'loss with writes on is nan: .* has diverged'
    ):
      modes._summarize(workload, None, self.workdir, mesh, evaluated)

  @parameterized.parameters('train', 'eval', 'generate')
  def test_a_name_that_no_disk_takes(self, mode):
    self.workdir = self.root / ('x' * 300)
    with self.assertRaisesRegex(errors.UserError, 'xxx.*: File name too long'):
      self.run_mode(mode)

  def test_a_prompt_that_is_too_long_is_refused_before_training(self):
    config = tiny.experiment(self.root, generate={'num_tokens': 124})
    with self.assertRaisesRegex(
      errors.UserError, 'prompt of 5 tokens .* model.max_length=128'
    ):
      self.run_mode('train', config)
    self.assertFalse(self.workdir.exists())

  def test_describes_a_model_on_more_devices_than_there_are(self):
    here = training.describe(
      dataclasses.replace(self.config, mesh=sharding.MeshConfig(1, 1))
    )
    there = training.describe(
      tiny.experiment(
        self.root,
        data={'batch_size': 64, 'sequence_length': 4},
        mesh=sharding.MeshConfig(64, 2),
      )
    )
    self.assertIn('mesh (data 64, fsdp 1, context 1, model 2)', there)
    # 260 x 16 embedding, two levels of 3 x 16 x 16 + 16, norms and the mixer.
    self.assertRegex(here, r'\| embedding +\| 4,160 +\|')
    self.assertRegex(here, r'\| blocks/levels/slow +\| 784 +\|')
    self.assertRegex(here, r'\| slow +\| adamw +\| 512 +\| 2 +\| 784 +\| 3 +\|')
    self.assertFalse(self.workdir.exists())

  def test_model_larger_than_the_memory_is_refused_before_anything(self):
    config = tiny.experiment(self.root, model={'embed_dim': 10**11})
    message = r'parameters take [0-9,]+ bytes.*model.embed_dim=100000000000'
    with self.assertRaisesRegex(errors.UserError, message):
      self.run_mode('train', config)
    self.assertFalse(self.workdir.exists())

  def test_describes_the_blocks_of_a_pattern(self):
    attention = tiny.MODEL.mixer
    window = dataclasses.replace(attention, window=4)
    model = dataclasses.replace(
      tiny.MODEL, num_layers=2, mixer=(attention, window)
    )
    text = training.describe(dataclasses.replace(self.config, model=model))
    for i in range(2):
      self.assertRegex(text, rf'\| blocks/{i}/levels/slow +\| 784 +\|')
      self.assertRegex(text, rf'\| blocks/{i}/mixer/query +\| 256 +\|')
    self.assertRegex(
      text, r'\| slow +\| adamw +\| 512 +\| 2 +\| 1,568 +\| 3 +\|'
    )
