"""Tests of configs read from experiment files and from config.json."""

import json
import os
import pathlib
import sys
from unittest import mock

from absl.testing import parameterized

from nested_learning import configs
from nested_learning import errors
from nested_learning import sharding

_ROOT = pathlib.Path(__file__).resolve().parents[2]

_FILE = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Config:
  size: str = 'small'

def get_config(arg=None):
  return Config(arg) if arg is not None else Config()
"""

_RUN = """
def run(config, workdir, mode):
  return config.size, workdir, mode
"""


class LoadTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.create_tempdir()
    self.name = 'loaded_' + self.id().rsplit('.', 1)[-1]
    before = os.getcwd()
    os.chdir(self.folder.full_path)
    self.addCleanup(os.chdir, before)

  def _write(self, content, name=None):
    path = f'experiments/{name or self.name}.py'
    self.folder.create_file(path, content=content)
    return path

  def test_calls_get_config(self):
    path = self._write(_FILE)
    self.assertEqual(configs.load(path).size, 'small')
    self.assertEqual(configs.load(f'{path}:large').size, 'large')
    self.assertEqual(configs.load(f'{path}:a:b').size, 'a:b')
    self.assertEqual(configs.load(f'{path}:').size, '')
    absolute = pathlib.Path(path).resolve()
    self.assertEqual(configs.load(str(absolute)), configs.load(path))

  def test_experiment_without_run_is_for_the_trainer(self):
    experiment = configs.load_experiment(self._write(_FILE))
    self.assertIsNone(experiment.run)
    self.assertIsNone(experiment.module)

  def test_run_survives_config_json(self):
    path = self._write(_FILE + _RUN, 'benchmarks/' + self.name)
    experiment = configs.load_experiment(f'{path}:large')
    self.assertEqual(experiment.module, f'experiments.benchmarks.{self.name}')
    text = configs.to_json(experiment.config, experiment.module)
    file = self.folder.create_file('runs/a/config.json', content=text)
    again = configs.load_experiment(file.full_path)
    self.assertEqual(again.config, experiment.config)
    self.assertEqual(
      again.run(again.config, 'w', 'train'), ('large', 'w', 'train')
    )

  @parameterized.named_parameters(
    ('syntax', 'def get_config(:\n', 'line 1: SyntaxError'),
    ('import', 'import nothing_like_it\n', 'line 1: ModuleNotFoundError'),
    ('raises', 'def get_config():\n  return 1 / 0\n', 'line 2: ZeroDivision'),
    (
      'argument',
      'def get_config():\n  return 1\n',
      'is not a Config|dataclass',
    ),
    ('nothing', 'x = 1\n', r'does not define get_config\(arg=None\)'),
  )
  def test_file_that_does_not_work(self, content, message):
    path = self._write(content)
    with self.assertRaisesRegex(errors.UserError, message) as caught:
      configs.load(path)
    self.assertIn(path, str(caught.exception))
    self.assertNotIn('\n', str(caught.exception))

  def test_refusal_of_an_argument_passes_through(self):
    path = self._write(
      'def get_config(arg=None):\n  raise ValueError(f"{arg=}: not a size.")\n'
    )
    with self.assertRaisesRegex(errors.UserError, "arg='xl': not a size"):
      configs.load(f'{path}:xl')

  def test_bug_of_the_package_keeps_its_traceback(self):
    path = self._write(
      'from nested_learning import sharding\n'
      'def get_config():\n  return sharding.broken()\n'
    )

    # A function of the package, as far as its traceback says.
    code = compile(
      'def broken():\n  return list(zip([1], [], strict=True))\n',
      sharding.__file__,
      'exec',
    )
    names = {}
    exec(code, names)
    with mock.patch.object(sharding, 'broken', names['broken'], create=True):
      with self.assertRaisesRegex(ValueError, 'zip') as caught:
        configs.load(path)
    self.assertNotIsInstance(caught.exception, errors.UserError)

  @parameterized.named_parameters(
    ('builtin', 'int("x")'),
    ('other_module', '__import__("json").loads("{")'),
    ('refused_value', 'sharding.MeshConfig(fsdp=-7)'),
    ('unknown_field', 'sharding.MeshConfig(nothing=1)'),
    ('none', 'sharding.MeshConfig(fsdp=None)'),
  )
  def test_mistake_in_a_file_is_one_line(self, expression):
    path = self._write(
      'from nested_learning import sharding\n'
      f'def get_config():\n  return {expression}\n'
    )
    with self.assertRaisesRegex(
      errors.UserError, f'{self.name}.py, line 3: '
    ) as caught:
      configs.load(path)
    self.assertNotIn('\n', str(caught.exception))

  def test_value_of_the_wrong_type_names_its_field(self):
    path = self._write(
      'from nested_learning import sharding\n'
      'def get_config():\n  return sharding.MeshConfig(fsdp="two")\n'
    )
    with self.assertRaisesRegex(
      errors.UserError, f"{self.name}.py, line 3: fsdp='two' must be int"
    ):
      configs.load(path)

  def test_config_json_runs_no_file_of_the_current_folder(self):
    marker = pathlib.Path(self.folder.full_path, 'ran')
    self._write(f'open({str(marker)!r}, "w").close()\n' + _FILE + _RUN)
    for content in (
      {'_type': f'experiments.{self.name}.Config'},
      {'_type': 'nested_learning.sharding.MeshConfig', '_run': ''},
      {'_type': f'experiment_file_{self.name}.Config'},
    ):
      if '_run' in content:
        content['_run'] = f'experiments.{self.name}'
      file = self.folder.create_file('config.json', content=json.dumps(content))
      with self.assertRaisesRegex(
        errors.UserError, rf'made by .*{self.name}.* --config=PATH/'
      ) as caught:
        configs.load_experiment(file.full_path)
      self.assertNotIn('\n', str(caught.exception))
      self.assertFalse(marker.exists())
    # The file that the user names is run, and then found.
    configs.load(f'experiments/{self.name}.py')
    self.assertTrue(marker.exists())
    content = {'_type': f'experiments.{self.name}.Config', 'size': 'large'}
    file = self.folder.create_file('config.json', content=json.dumps(content))
    self.assertEqual(configs.load(file.full_path).size, 'large')

  def test_config_json_runs_no_sweeps_of_the_current_folder(self):
    marker = pathlib.Path(self.folder.full_path, 'ran')
    for file in ('__init__', 'sweeps/__init__', f'sweeps/{self.name}'):
      content = f'open({str(marker)!r}, "w").close()\n' + _FILE
      self.folder.create_file(f'launch/{file}.py', content=content)
    tag = {'_type': f'launch.sweeps.{self.name}.Config'}
    file = self.folder.create_file('config.json', content=json.dumps(tag))
    others = {n: m for n, m in sys.modules.items() if n[:6] != 'launch'}
    with (
      mock.patch.dict(sys.modules, others, clear=True),
      mock.patch.object(sys, 'path', [self.folder.full_path, *sys.path]),
      self.assertRaisesRegex(errors.UserError, 'which is no config class'),
    ):
      configs.load(file.full_path)
    self.assertFalse(marker.exists())

  def test_file_outside_of_experiments_is_found_again(self):
    path = self.folder.create_file(f'{self.name}.py', content=_FILE + _RUN)
    experiment = configs.load_experiment(path.full_path)
    text = configs.to_json(experiment.config, experiment.module)
    file = self.folder.create_file('config.json', content=text)
    again = configs.load_experiment(file.full_path)
    self.assertEqual(again.config, experiment.config)
    self.assertEqual(again.run, experiment.run)

  def test_experiments_of_the_checkout_are_found_from_anywhere(self):
    checkout = pathlib.Path(configs.__file__).parents[2]
    self.assertEqual(configs.files._CHECKOUT, checkout)
    self.assertTrue((checkout / 'launch' / 'run.py').is_file())
    # Files of a checkout made here are as good, and import less.
    made = self.create_tempdir('checkout')
    made.create_file('launch/run.py')
    made.create_file(f'experiments/part/{self.name}.py', content=_FILE + _RUN)
    name = f'experiments.part.{self.name}'
    self.folder.create_file(
      'config.json',
      content=json.dumps({'_type': f'{name}.Config', '_run': name}),
    )
    with self.assertRaisesRegex(errors.UserError, 'Name its file too'):
      configs.load_experiment('config.json')
    with mock.patch.object(
      configs.files, '_CHECKOUT', pathlib.Path(made.full_path)
    ):
      experiment = configs.load_experiment('config.json')
    self.assertEqual(experiment.module, name)
    self.assertEqual(experiment.config.size, 'small')

  def test_bug_of_another_module_keeps_its_traceback(self):
    path = self._write('import ast\ndef get_config():\n  ast.parse(3)\n')
    with self.assertRaisesRegex(TypeError, 'compile'):
      configs.load(path)

  def test_get_config_without_an_argument(self):
    path = self._write('def get_config():\n  return 1\n')
    message = 'takes no argument; leave out :large'
    with self.assertRaisesRegex(errors.UserError, message):
      configs.load(f'{path}:large')

  def test_missing_file_names_what_is_there(self):
    self._write(_FILE)
    with self.assertRaisesRegex(errors.UserError, f'has: {self.name}.py'):
      configs.load('experiments/quickstrat.py')
    with self.assertRaisesRegex(errors.UserError, 'no file nowhere/x.py'):
      configs.load('nowhere/x.py')
    with self.assertRaisesRegex(errors.UserError, 'Cannot read runs/no.json'):
      configs.load('runs/no.json')
    with self.assertRaisesRegex(errors.UserError, 'neither a Python file nor'):
      configs.load('experiments/quickstart')
