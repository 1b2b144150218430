"""Tests of the record of a sweep and of additions to it."""

import dataclasses
import json
import pathlib

from absl.testing import parameterized

from launch import sweeps
from nested_learning import configs
from nested_learning import errors
from tests.launch.sweeps import toy


class RecordTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.create_tempdir().full_path
    name = 'record_' + self._testMethodName
    self.spec = toy.write_experiment(folder, name)
    self.workdir = pathlib.Path(folder, 'sweep')

  def test_comes_back_as_it_was(self):
    record = toy.make_record(self.spec, 'size=1,2', num_seeds=2)
    self.assertIsNone(sweeps.load(self.workdir))
    sweeps.save(record, self.workdir)
    self.assertEqual(sweeps.load(self.workdir), record)

  def test_two_processes_add_to_the_same_folder(self):
    # Both read the folder while it was empty.
    sweeps.save(toy.make_record(self.spec, 'size=1'), self.workdir)
    both = sweeps.save(toy.make_record(self.spec, 'size=2'), self.workdir)
    self.assertEqual([cell.name for cell in both.cells], ['size=1', 'size=2'])
    self.assertEqual(sweeps.load(self.workdir), both)

  def test_folder_with_something_else_is_refused(self):
    self.workdir.mkdir()
    self.assertIsNone(sweeps.load(self.workdir))
    (self.workdir / 'config.json').write_text('{}')
    with self.assertRaisesRegex(errors.UserError, 'holds no sweep'):
      sweeps.load(self.workdir)
    (self.workdir / 'sweep.json').write_text('{')
    with self.assertRaisesRegex(errors.UserError, 'sweep.json: not a config'):
      sweeps.load(self.workdir)

  def test_values_and_seeds_are_added_and_none_taken_away(self):
    stored = toy.make_record(self.spec, 'size=1,2', num_seeds=3)
    record = toy.make_record(self.spec, 'size=2,4', metrics=('loss',))
    both = sweeps.update(record, stored)
    self.assertEqual(
      [cell.name for cell in both.cells], ['size=1', 'size=2', 'size=4']
    )
    self.assertEqual((both.num_seeds, both.metrics), (3, ('loss',)))
    self.assertLen(sweeps.list_runs(both, self.workdir), 9)

  def test_another_sweep_is_refused(self):
    stored = toy.make_record(self.spec, 'size=1,2')
    for record, message in (
      (toy.make_record(self.spec, 'text=a'), 'over size, and this one is over'),
      (toy.make_record(self.spec), 'this one is over no field'),
      (
        toy.make_record(self.spec, 'size=1', assignments=('text=a',)),
        "with text='', and here it is 'a'",
      ),
      (
        dataclasses.replace(
          stored,
          cells=(
            dataclasses.replace(stored.cells[0], assignments=('size=9',)),
          ),
        ),
        'whose cell size=1 is .* size=1, and here it is .* size=9',
      ),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        sweeps.update(record, stored)

  def test_field_that_is_new_in_the_code_had_its_default(self):
    stored = toy.make_record(self.spec, 'size=1')
    base = json.loads(stored.base)
    del base['text']
    stored = dataclasses.replace(stored, base=json.dumps(base))
    record = toy.make_record(self.spec, 'size=2')
    self.assertEqual(sweeps.update(record, stored).base, record.base)
    other = toy.make_record(self.spec, 'size=2', assignments=('text=a',))
    with self.assertRaisesRegex(errors.UserError, "text='', and here it is 'a"):
      sweeps.update(other, stored)
    gone = dataclasses.replace(stored, base=json.dumps(base | {'gone': 1}))
    with self.assertRaisesRegex(errors.UserError, 'with text=.* and 1 more'):
      sweeps.update(record, gone)

  def test_run_of_another_config_is_refused(self):
    record = toy.make_record(self.spec, 'size=1,2')
    runs = sweeps.list_runs(record, self.workdir)
    config = dataclasses.replace(runs[1].config, text='changed')
    runs[1].folder.mkdir(parents=True)
    path = runs[1].folder / 'config.json'
    path.write_text(configs.to_json(runs[1].config))
    sweeps.list_runs(record, self.workdir)
    path.write_text(configs.to_json(config))
    with self.assertRaisesRegex(
      errors.UserError, "size=2/seed_0 holds a run with text='changed'"
    ):
      sweeps.list_runs(record, self.workdir)

  def test_lists_what_a_pattern_matches(self):
    record = toy.make_record(self.spec, 'size=1,2', num_seeds=2)
    names = lambda only: [
      run.name for run in sweeps.list_runs(record, self.workdir, only=only)
    ]
    self.assertEqual(names('size=1'), ['size=1/seed_0', 'size=1/seed_1'])
    self.assertEqual(names('*/seed_1'), ['size=1/seed_1', 'size=2/seed_1'])
    with self.assertRaisesRegex(errors.UserError, "'seven'; there are size=1"):
      names('seven')
