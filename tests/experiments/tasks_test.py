"""The experiment of any model on any task."""

import pathlib

from absl.testing import parameterized

from nested_learning import configs
from nested_learning import models
from nested_learning import parameters
from nested_learning import tasks
from nested_learning import training

_FILE = str(
  pathlib.Path(__file__).resolve().parents[2] / 'experiments' / 'tasks.py'
)
_FAMILIES = [
  name.removesuffix('_tiny')
  for name in models.zoo.names()
  if name.endswith('_tiny')
]


class TasksTest(parameterized.TestCase):
  @parameterized.parameters(*tasks.TASKS)
  def test_every_task_fits_its_model(self, name):
    config = configs.load(f'{_FILE}:transformer,{name}')
    self.assertEqual(config.data.task, tasks.make_config(name))
    self.assertGreaterEqual(
      config.model.vocab_size, config.data.task.vocab_size
    )
    self.assertEqual(configs.from_json(configs.to_json(config)), config)

  @parameterized.parameters(*_FAMILIES)
  def test_every_family_is_described(self, family):
    config = configs.load(f'{_FILE}:{family},mqar_small')
    self.assertIn('2,048 tokens per step', training.describe(config))
    count = parameters.count(models.make_model(config.model).table)
    self.assertAlmostEqual(count, 132_192, delta=1000)

  def test_the_default(self):
    config = configs.load(_FILE)
    self.assertEqual(config.name, 'hope_mqar_small')

  @parameterized.parameters(
    ('hop', "no family 'hop' in the zoo; the nearest are hope"),
    ('hope,mqar_smal', "no task 'mqar_smal'; the nearest are mqar_small"),
  )
  def test_refuses(self, arg, message):
    with self.assertRaisesRegex(ValueError, message):
      configs.load(f'{_FILE}:{arg}')
