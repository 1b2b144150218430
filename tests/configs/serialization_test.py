"""Tests of configs as JSON."""

import dataclasses
import json

from absl.testing import parameterized

from nested_learning import configs
from nested_learning import errors
from nested_learning import models
from nested_learning import optimizers
from nested_learning import sharding

_MESH = 'nested_learning.sharding.MeshConfig'

_FILE = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Part:
  rate: float = 0.5

@dataclasses.dataclass(frozen=True)
class Config:
  steps: int = 3
  sizes: tuple[int, ...] = (1, 2)
  parts: tuple[Part, ...] = (Part(), Part(1e-30))
  part: Part | None = None
  label: str | None = None

  def __post_init__(self):
    if self.steps < 0:
      raise ValueError(f'{self.steps=} is negative.')

class Other:
  pass

def get_config(arg=None):
  return Config()
"""


class SerializationTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.create_tempdir()
    # A name of its own for every test: a file is imported once.
    self.name = 'made_' + self.id().rsplit('.', 1)[-1]
    self.file = self.folder.create_file(
      f'experiments/{self.name}.py', content=_FILE
    )
    self.tag = f'experiments.{self.name}.Config'

  def _load(self):
    return configs.load(self.file.full_path)

  def test_round_trip(self):
    config = self._load()
    config = configs.override(config, ['part=Part', 'label=a', 'sizes=()'])
    again = configs.from_json(configs.to_json(config))
    self.assertEqual(again, config)
    self.assertIs(type(again), type(config))
    self.assertIs(type(again.parts[0].rate), float)

  def test_round_trip_of_a_config_of_the_package(self):
    mesh = sharding.MeshConfig()
    self.assertEqual(configs.from_json(configs.to_json(mesh)), mesh)
    self.assertEqual(json.loads(configs.to_json(mesh))['_type'], _MESH)

  def test_missing_field_keeps_its_default(self):
    self._load()
    text = json.dumps({'_type': self.tag, 'steps': 7})
    self.assertEqual(configs.from_json(text).steps, 7)
    self.assertEqual(configs.from_json(text).sizes, (1, 2))

  @parameterized.named_parameters(
    ('int', {'steps': 1.5}, 'steps is int, not 1.5'),
    ('bool_for_int', {'steps': True}, 'steps is int, not True'),
    ('string', {'label': 3}, 'label is str or none, not 3'),
    ('tuple', {'sizes': ['a']}, "sizes.0 is int, not 'a'"),
    ('unknown', {'step': 1}, 'step does not exist; the nearest .* steps'),
    ('list_of_configs', {'parts': [3]}, r'parts\.0 is Part, not 3'),
    ('validation', {'steps': -1}, 'self.steps=-1 is negative'),
    ('class', {'part': {'_type': _MESH}}, 'part is a MeshConfig; it must be'),
  )
  def test_values_are_checked(self, fields, message):
    self._load()
    with self.assertRaisesRegex(errors.UserError, message):
      configs.from_json(json.dumps({'_type': self.tag, **fields}))

  @parameterized.parameters(
    'os.system',
    'subprocess.Popen',
    'nested_learning.errors.UserError',
    'nested_learning.configs.serialization.json',
    'nested_learning.nothing.Config',
    'Config',
    '',
    None,
    3,
  )
  def test_makes_no_other_class(self, name):
    with self.assertRaisesRegex(errors.UserError, 'which is no config class'):
      configs.from_json(json.dumps({'_type': name}))

  def test_makes_no_plain_class_of_an_experiment(self):
    self._load()
    with self.assertRaisesRegex(errors.UserError, 'which is no config class'):
      configs.from_json(json.dumps({'_type': self.tag[:-6] + 'Other'}))

  def test_names_a_missing_experiment(self):
    for name in ('gone', 'gone' * 100):  # longer than names of files
      with self.assertRaisesRegex(
        errors.UserError, r'made by experiments\.gone'
      ):
        configs.from_json(f'{{"_type": "experiments.{name}.Config"}}')

  @parameterized.parameters('', '{"_type": "nested', '[]', '3', 'null')
  def test_text_that_is_no_config(self, text):
    with self.assertRaisesRegex(errors.UserError, 'not a config'):
      configs.from_json(text)

  def test_field_that_json_cannot_hold(self):
    @dataclasses.dataclass(frozen=True)
    class Bad:
      function: object

    with self.assertRaisesRegex(TypeError, 'function holds'):
      configs.to_json(Bad(print))

  def test_differences(self):
    ours = self._load()
    theirs = configs.override(ours, ['steps=9', 'parts.1.rate=2', 'sizes=1'])
    self.assertEqual(
      configs.differences(ours, theirs),
      {
        'steps': (3, 9),
        'parts.1.rate': (1e-30, 2.0),
        'sizes.1': (2, '(absent)'),
      },
    )
    self.assertEqual(configs.differences(ours, self._load()), {})

  def test_differences_of_classes(self):
    adamw, m3 = optimizers.configs.AdamW(), optimizers.configs.M3()
    level = models.LevelConfig('a', 8, optimizer=adamw)
    for other, names in ((m3, ('adamw', 'm3')), (None, ('adamw', None))):
      self.assertEqual(
        configs.differences(level, dataclasses.replace(level, optimizer=other)),
        {'optimizer': names},
      )
    self.assertEqual(configs.differences(adamw, m3), {'_type': ('adamw', 'm3')})
