"""Tests of rows, grids and the cells that they make."""

import os

from absl.testing import parameterized

from launch import sweeps
from nested_learning import errors
from tests.launch.sweeps import toy


class CellsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.create_tempdir().full_path
    name = 'cells_' + self._testMethodName
    self.spec = toy.write_experiment(folder, name)

  def _load(self, sweep, *, num_seeds=1, seed_fields=('seed',), **kwargs):
    return sweeps.load_cells(
      sweeps.make_cells(self.spec, sweep, **kwargs),
      num_seeds=num_seeds,
      seed_fields=seed_fields,
    )

  def test_rows_by_grid_by_seeds(self):
    sweep = sweeps.Sweep(
      rows=(sweeps.Row('a', ('text=x',)), sweeps.Row('b', arg='5')),
      grid=('roles=(k,v),()',),
    )
    loaded = self._load(sweep, num_seeds=2, assignments=('size=3',))
    self.assertCountEqual(
      loaded,
      [
        (f'{row},roles={roles}', seed)
        for row in 'ab'
        for roles in ('k+v', 'empty')
        for seed in (0, 1)
      ],
    )
    assignments, config = loaded['a,roles=k+v', 1]
    self.assertEqual(assignments, ('size=3', 'text=x', 'roles=(k,v)', 'seed=1'))
    self.assertEqual((config.size, config.text, config.seed), (3, 'x', 1))
    self.assertEqual(config.roles, ('k', 'v'))
    self.assertEqual(loaded['b,roles=empty', 0][1].roles, ())

  def test_grid_of_optimizers(self):
    sweep = sweeps.Sweep(
      rows=(sweeps.Row('often', ('train.optimizer.slow_every=4',)),),
      grid=('model.levels.1.optimizer=none,dgd',),
    )
    loaded = sweeps.load_cells(
      sweeps.make_cells(
        'experiments/quickstart.py', sweep, assignments=('train.optimizer=m3',)
      ),
      num_seeds=1,
      seed_fields=('seed',),
    )
    rules = [config.rules for _, config in loaded.values()]
    self.assertEqual([x['slow'].NAME for x in rules], ['m3', 'dgd'])
    self.assertEqual([x['base'].slow_every for x in rules], [4, 4])

  def test_argument_of_a_row_makes_its_config(self):
    sweep = sweeps.Sweep(rows=(sweeps.Row('a'), sweeps.Row('b', arg='5')))
    for spec in (self.spec, f'{self.spec}:7'):
      cells = sweeps.make_cells(spec, sweep)
      self.assertEqual([c.spec for c in cells], [spec, f'{self.spec}:5'])

  def test_one_cell_without_rows_and_grid(self):
    self.assertCountEqual(
      self._load(sweeps.Sweep(), num_seeds=2), [('config', 0), ('config', 1)]
    )

  def test_names_tell_fields_apart_and_fit_a_file_system(self):
    grid = (
      'model.mixer.size=1',
      'model.0.size=2',
      'rate=1e-3',
      'x=' + 'y' * 300,
    )
    (cell,) = sweeps.make_cells(self.spec, sweeps.Sweep(grid=grid))
    self.assertStartsWith(cell.name, 'mixer.size=1,0.size=2,rate=1e-3,x=yyy')
    self.assertLessEqual(len(os.fsencode(cell.name)), 120)
    other = (*grid[:-1], 'x=' + 'y' * 301)
    (longer,) = sweeps.make_cells(self.spec, sweeps.Sweep(grid=other))
    self.assertNotEqual(cell.name, longer.name)

  @parameterized.parameters(
    (
      ('sise=1',),
      'cell sise=1: sise does not exist; the nearest field is size',
    ),
    (('size=1,x',), 'cell size=x: size=x does not fit'),
    (('seed=1,2',), 'seed=1 sets a seed'),
    (('size=1,01',), 'size=1 and size=01 are the same config'),
    (('text=a/b,a:b',), "would both be called 'text=a_b'"),
  )
  def test_refuses(self, grid, message):
    with self.assertRaisesRegex(errors.UserError, message):
      self._load(sweeps.Sweep(grid=grid))

  def test_seeds_need_a_field(self):
    loaded = self._load(sweeps.Sweep(), seed_fields=('data.seed',))
    self.assertEqual(loaded['config', 0][0], ())
    with self.assertRaisesRegex(errors.UserError, 'none of the fields data.se'):
      self._load(sweeps.Sweep(), seed_fields=('data.seed',), num_seeds=2)


class GridTest(parameterized.TestCase):
  @parameterized.parameters(
    ('a.b=16,64', 'a.b', ('16', '64')),
    ('a = 1e-3, none', 'a', ('1e-3', 'none')),
    ('a=(k,v),(k,)', 'a', ('(k,v)', '(k,)')),
    ('a=[[1,2],[3]],()', 'a', ('[[1,2],[3]]', '()')),
    ('a="x, y",\'don"t\'', 'a', ('x, y', 'don"t')),
    ("a='',b=c", 'a', ('', 'b=c')),
    ('a={"n": [1, 2]},3', 'a', ('{"n": [1, 2]}', '3')),
  )
  def test_splits_values_outside_of_brackets(self, text, path, values):
    self.assertEqual(sweeps.parse_grid(text), (path, values))

  @parameterized.parameters(
    ('size', 'write path=value,value'),
    ('=1,2', 'write path=value,value'),
    ('size=', 'empty value'),
    ('size=1,,2', 'empty value'),
    ('size=1,2,1', "the value '1' twice"),
    ('roles=(k,v', 'a bracket without'),
    ("text=don't,do", "a quote ' without"),
  )
  def test_refuses(self, text, message):
    with self.assertRaisesRegex(errors.UserError, message):
      sweeps.parse_grid(text)


class SweepTest(parameterized.TestCase):
  def test_refuses_duplicate_rows_and_fields(self):
    for kwargs, message in (
      ({'rows': (sweeps.Row('a'), sweeps.Row('a'))}, "the name 'a'"),
      ({'grid': ('size=1', 'size=2')}, 'size twice'),
      ({'metrics': ('loss:best',)}, 'must end in :min or :max'),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        sweeps.Sweep(**kwargs)

  @parameterized.parameters('', 'a/b', '.hidden', 'no DGD', '../up')
  def test_row_needs_the_name_of_a_folder(self, name):
    with self.assertRaisesRegex(errors.UserError, 'can be a folder'):
      sweeps.Row(name)
