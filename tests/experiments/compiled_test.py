"""The table of compiled sizes: what is compiled, kept and written."""

import json
import math
import pathlib
import re
import subprocess
from unittest import mock

from absl.testing import parameterized

from experiments import compiled
from launch import provenance
from nested_learning import accelerators
from nested_learning import configs
from nested_learning import errors
from nested_learning import sharding

_ROWS = tuple(
  compiled.Row('hope_170m', topology) for topology in ('v5e:4x4', 'v6e:4x4')
)


def summary(row, fits=True):
  found = {
    'name': row.name,
    'topology': row.topology,
    'mesh': {'data': 2, 'fsdp': 8, 'context': 1, 'model': 1},
    'accumulate': 1,
    'parameters': 169_859_136,
    'hbm_bytes': 16 * 2**30,
    'fits': fits,
    'tokens_per_second_per_device': 1.0,  # not kept
  }
  if not fits:
    return found | {'compiler': 'Used 20G of 15.75G hbm'}
  return found | {'peak_bytes': 3 * 2**30, 'mfu_bound': 0.25}


class CompiledTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.compiled = []

  def compile_row(self, row):
    self.compiled.append(row)
    return summary(row, fits=row is _ROWS[0])

  def run_rows(self, rows=_ROWS, **options):
    self.compiled.clear()
    return compiled.run(rows, self.folder, self.compile_row, **options)

  def test_compiles_what_is_missing_and_keeps_the_rest(self):
    self.assertEmpty(self.run_rows(_ROWS[1:]))
    self.assertEmpty(self.run_rows())
    self.assertEqual(self.compiled, [_ROWS[0]])
    table = json.loads((self.folder / 'table.json').read_text())
    self.assertEqual(list(table), [row.key for row in _ROWS])
    self.assertNotIn('tokens_per_second_per_device', table[_ROWS[0].key])
    self.run_rows()
    self.assertEmpty(self.compiled)
    self.run_rows(again=True)
    self.assertEqual(self.compiled, list(_ROWS))

  def test_compiles_again_where_the_experiment_changed(self):
    self.run_rows()
    with mock.patch.object(compiled, '_fingerprint', return_value='another'):
      self.run_rows()
    self.assertEqual(self.compiled, list(_ROWS))

  def test_page_says_what_fits_and_what_does_not(self):
    self.run_rows()
    page = (self.folder / 'README.md').read_text()
    lines = re.sub(' +', ' ', page).splitlines()  # unaligned
    (first,) = [line for line in lines if 'v5e:4x4' in line]
    (second,) = [line for line in lines if 'v6e:4x4' in line]
    self.assertIn('| data 2 x fsdp 8 |', first)
    self.assertIn('| 3.0 | 16.0 | yes |', first)
    self.assertIn('| Used 20G of 15.75G hbm | 16.0 | NO |', second)
    self.assertIn('| 0.25† |', first)  # counted without nested fusions
    self.assertIn('† An older count', page)

  def test_page_marks_no_row_of_the_present_count(self):
    found = summary(_ROWS[0]) | {
      'memory_traffic_bytes_padded': 2**30,
      'compiler_seconds': 0.5,
    }
    page = compiled.describe([found | {'settings': []}])
    self.assertNotIn('†', page)
    self.assertIn('| 0.500 ', page)

  @parameterized.parameters(
    (0, None, ''),
    (3, 'its code has changed in 3 commits since abc1234', '‡'),
    (None, 'its commit, abc1234, is not known here', '‡'),
  )
  def test_marks_rows_that_are_older_than_their_code(self, age, reason, mark):
    row = summary(_ROWS[0]) | {'settings': []}
    row['source'] = dict.fromkeys(provenance.provenance(), 'x')
    row['source']['commit'] = 'abc1234'
    with mock.patch.object(
      provenance, 'changes_since', return_value=age
    ) as changes:
      self.assertEqual(compiled.stale(row), reason)
      self.assertIn(f'| hope_170m{mark} ', compiled.describe([row]))
      compiled.stale(row | {'name': 'transformer_170m'})
    calls = changes.call_args_list
    hope, transformer = calls[0].args[1], calls[-1].args[1]
    self.assertIn('experiments/hope.py', transformer)
    self.assertIn('nested_learning/memory', hope)
    self.assertNotIn('nested_learning/memory', transformer)

  def test_check_names_rows_that_are_missing_or_out_of_date(self):
    self.run_rows(_ROWS[:1])
    with mock.patch.object(provenance, 'changes_since', return_value=0):
      lines = compiled.check(_ROWS, self.folder)
    self.assertEqual(lines, [f'{_ROWS[1].key}: it is not in the table.'])
    with mock.patch.object(provenance, 'changes_since', return_value=2):
      (line,) = compiled.check(_ROWS[:1], self.folder)
    self.assertRegex(line, 'its code has changed in 2 commits since ')
    with mock.patch.object(compiled, '_fingerprint', return_value='another'):
      (line,) = compiled.check(_ROWS[:1], self.folder)
    self.assertEqual(line, f'{_ROWS[0].key}: its config has changed.')
    path = self.folder / 'table.json'
    table = json.loads(path.read_text())
    del table[_ROWS[0].key]['source']
    path.write_text(json.dumps(table))
    (line,) = compiled.check(_ROWS[:1], self.folder)
    self.assertEndsWith(line, 'it left no record of its commit.')

  def test_goes_on_after_a_row_that_fails(self):
    def fail_first(row):
      if row is _ROWS[0]:
        raise errors.UserError('libtpu is not installed')
      return summary(row)

    (line,) = compiled.run(_ROWS, self.folder, fail_first)
    self.assertEqual(line, f'{_ROWS[0].key}: libtpu is not installed')
    table = json.loads((self.folder / 'table.json').read_text())
    self.assertEqual(list(table), [_ROWS[1].key])

  @parameterized.parameters(
    ((), len(compiled.ROWS)), (('hope_170m',), 4), (('hope_170m', 'v6e:4x4'), 1)
  )
  def test_chooses(self, only, number):
    self.assertLen(compiled.choose(only), number)

  @parameterized.parameters('hope_17m', 'v5e')
  def test_refuses_what_is_no_row(self, name):
    with self.assertRaisesRegex(errors.UserError, f'{name} names no row'):
      compiled.choose([name])

  def test_calls_the_launcher(self):
    row = compiled.Row('hope_170m', 'v5e:4x4', ('mesh.model=2',))
    folder = self.folder / row.key

    def call(command, **_):
      self.assertIn('--topology=v5e:4x4', command)
      self.assertIn('--set=mesh.model=2', command)
      self.assertIn(f'--workdir={folder}', command)
      folder.mkdir()
      (folder / 'summary.json').write_text('{"fits": true}')
      return subprocess.CompletedProcess(command, 0, '', '')

    with mock.patch.object(subprocess, 'run', call):
      found = compiled.compile_in_process(row, self.folder)
    self.assertEqual(found, {'fits': True})
    refused = subprocess.CompletedProcess([], 2, '', 'noise\nrun.py: wrong.')
    with mock.patch.object(subprocess, 'run', return_value=refused):
      with self.assertRaisesRegex(errors.UserError, 'code 2: run.py: wrong'):
        compiled.compile_in_process(row, self.folder)

  @parameterized.named_parameters((row.key, row) for row in compiled.ROWS)
  def test_no_device_of_a_row_is_idle(self, row):
    config = configs.load(row.spec)
    config = configs.override(config, list(row.settings))
    topology = accelerators.find(row.topology)
    shape = sharding.mesh_shape(
      config.mesh,
      num_devices=topology.num_devices,
      num_rows=config.micro_batch_size,
    )
    self.assertEqual(math.prod(shape), topology.num_devices)
    self.assertEqual(shape[0] % topology.num_slices, 0)
