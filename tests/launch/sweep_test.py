"""Tests of launch/sweep.py, called as a user calls it."""

import csv
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

from absl.testing import parameterized
import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_SWEEP = _ROOT / 'launch' / 'sweep.py'
_ABLATION = _ROOT / 'experiments' / 'ablations' / 'retain_to.py'

# An experiment without JAX, so that a run is quick. Every start of a run
# appends a letter to its attempts.txt.
_FILE = """
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import time

@dataclasses.dataclass(frozen=True)
class Data:
  seed: int = 0

@dataclasses.dataclass(frozen=True)
class Config:
  size: int = 1
  roles: tuple[str, ...] = ('k',)
  fail: str = ''
  seed: int = 0
  data: Data = Data()

def get_config(arg=None):
  return Config(roles=(arg or 'k',))

def run(config, workdir, mode):
  folder = pathlib.Path(workdir)
  attempts = folder / 'attempts.txt'
  with open(attempts, 'a') as file:
    file.write('x')
  first = len(attempts.read_text()) == 1
  if config.fail == 'always' or (config.fail == 'once' and first):
    print('Setting up.')
    raise RuntimeError('no luck today')
  if config.fail == 'killed':
    os.kill(os.getpid(), signal.SIGKILL)
  if config.fail == 'silent':
    return
  if config.fail == 'wait' and first:
    def save(*_):
      (folder / 'saved.txt').touch()
      sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    (folder / 'ready.txt').touch()
    time.sleep(60)
    return
  summary = {
    'loss': config.size + config.seed,
    'score': config.size - config.data.seed,
    'steps': 5,
  }
  lines = '{"step": 5}\\n{"step": 5, "validation/loss": 1}\\n{"step'
  (folder / 'metrics.jsonl').write_text(lines)
  (folder / 'summary.json').write_text(json.dumps(summary))
"""

_SWEEP_FILE = """
from experiments.toy import Config
from experiments.toy import run
from launch import sweeps

def get_config(arg=None):
  return Config(size=int(arg or 1))

def get_sweep():
  return sweeps.Sweep(
    rows=(
      sweeps.Row('plain', printed='12.3'),
      sweeps.Row('broken', ('fail=always',)),
      sweeps.Row('large', arg='7'),
    ),
    metrics=('loss',),
    printed='the paper',
  )
"""

# A stand-in for sbatch that runs the tasks of an array one after the other.
_SBATCH = """#!/bin/bash
tasks=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
for ((i = 0; i <= tasks; i++)); do
  SLURM_ARRAY_TASK_ID=$i bash "$1"
done
"""


# A stand-in for gcloud that has every machine, and a summary in every bucket.
_GCLOUD = """#!/bin/bash
echo "$*" >> "$(dirname "$0")/gcloud.log"
case "$*" in
  *queued-resources\\ describe*) echo ACTIVE ;;
  storage\\ cp*) echo '{"loss": 4}' > "$4/summary.json" ;;
esac
"""


class SweepTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.create_tempdir()
    self.folder.create_file('experiments/toy.py', content=_FILE)
    self.folder.create_file('experiments/rows.py', content=_SWEEP_FILE)
    self.workdir = pathlib.Path(self.folder.full_path, 'runs', 'a')
    self.environment = {
      **os.environ,
      'PYTHONDONTWRITEBYTECODE': '1',
      'PYTHONPATH': self.folder.full_path,
    }

  def _start(self, *args, config='toy.py'):
    return subprocess.Popen(
      [
        sys.executable,
        _SWEEP,
        '--workdir=runs/a',
        *([f'--config=experiments/{config}'] if config else []),
        *args,
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=self.folder.full_path,
      env=self.environment,
    )

  def _call(self, *args, config='toy.py'):
    process = self._start(*args, config=config)
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(
      process.args, process.returncode, stdout, stderr
    )

  def _attempts(self):
    """Returns how often each run was started."""
    return {
      str(path.parent.relative_to(self.workdir / 'cells')): len(
        path.read_text()
      )
      for path in self.workdir.glob('cells/*/*/attempts.txt')
    }

  def _read_page(self):
    """Returns the page, without the blanks that align its tables."""
    page = (self.workdir / 'README.md').read_text()
    return re.sub(' +', ' ', page)

  def _read_summary(self):
    return json.loads((self.workdir / 'summary.json').read_text())

  def test_grid_runs_once_and_grows(self):
    result = self._call('--grid', 'size=1,3', '--seeds=2')
    self.assertEqual(result.returncode, 0, result.stderr)
    once = {f'size={n}/seed_{s}': 1 for n in (1, 3) for s in (0, 1)}
    self.assertEqual(self._attempts(), once)
    summary = self._read_summary()
    self.assertEqual(summary['size=3/loss'], 3.5)
    self.assertEqual(summary['size=1/score'], 0.5)  # data.seed is set, too
    self.assertAlmostEqual(summary['size=3/loss/spread'], 0.5**0.5)
    self.assertNotIn('size=3/steps', summary)  # the same everywhere
    page = self._read_page()
    self.assertIn('| size=1 | **1.5 ± 0.71** | 0.5 ± 0.71 | 2 of 2 |', page)
    self.assertIn('--grid size=1,3 --seeds=2', page)
    with open(self.workdir / 'results.csv') as file:
      lines = list(csv.DictReader(file))
    self.assertLen(lines, 4)
    self.assertEqual(lines[3]['size'], '3')
    self.assertEqual((lines[3]['seed'], lines[3]['loss']), ('1', '4'))
    config = self.workdir / 'cells/size=3/seed_1/config.json'
    self.assertEqual(json.loads(config.read_text())['data']['seed'], 1)

    # Another value and another seed are added; nothing runs again.
    result = self._call('--grid', 'size=5', '--seeds=3')
    self.assertEqual(result.returncode, 0, result.stderr)
    self.assertLen(self._attempts(), 9)
    self.assertEqual(set(self._attempts().values()), {1})
    self.assertEqual(self._read_summary()['size=1/loss'], 2.0)

  def test_goes_on_from_the_runs_beside_its_results(self):
    flags = ('--results=results', '--grid')
    self.assertEqual(self._call(*flags, 'size=1,3').returncode, 0)
    page = pathlib.Path(self.folder.full_path, 'results', 'README.md')
    shutil.rmtree(self.workdir)
    page.unlink()
    # A new folder: only the new value runs.
    result = self._call(*flags, 'size=1,3,5')
    self.assertEqual(result.returncode, 0, result.stderr)
    self.assertEqual(self._attempts(), {'size=5/seed_0': 1})
    lines = (self.workdir / 'cells/size=1/seed_0/metrics.jsonl').read_text()
    self.assertEqual(lines, '{"step": 5, "validation/loss": 1}\n')
    for text in ('| size=1 |', '| size=5 |', '3 of 3 runs are finished'):
      self.assertIn(text, page.read_text())
    # The same names, but another config.
    shutil.rmtree(self.workdir)
    self._call(*flags, 'size=1,3,5', '--set=roles=v')
    self.assertLen(self._attempts(), 3)
    page.with_name('runs.json').write_text('{}')
    shutil.rmtree(self.workdir)
    result = self._call(*flags, 'size=1')
    self.assertIn('Cannot read results/runs.json', result.stderr)
    self.assertEqual(result.returncode, 2)

  def test_tuned_field(self):
    self._call('--grid=size=3', '--metrics=loss')
    tune = ('--tune=size=1,3', '--seeds=2', '--metrics=loss')
    result = self._call(*tune, '--only=*/seed_0')
    self.assertEqual(result.returncode, 0, result.stderr)
    once = {'size=1/seed_0': 1, 'size=3/seed_0': 1}
    self.assertEqual(self._attempts(), once)
    result = self._call()  # goes on
    self.assertEqual(result.returncode, 0, result.stderr)
    once['size=1/seed_1'] = 1
    self.assertEqual(self._attempts(), once)
    self.assertEqual(self._read_summary()['config/size'], 1)
    self.assertEqual(self._read_summary()['config/loss'], 1.5)
    page = self._read_page()
    self.assertIn('| config | 1 | 1.5 ± 0.71 | 2 of 2 |', page)
    self.assertIn('3 of 3 runs are finished', page)
    self.assertRegex(page, r'\n- machine: \d+ cores, ')
    self.assertIn('\n- software: Python 3', page)
    # Another value is added, and is better.
    result = self._call('--tune=size=0', '--metrics=loss')
    self.assertEqual(result.returncode, 0, result.stderr)
    once |= {'size=0/seed_0': 1, 'size=0/seed_1': 1}
    self.assertEqual(self._attempts(), once)
    self.assertEqual(self._read_summary()['config/size'], 0)
    self._call('--seeds=3')
    self.assertIn('toy.py --seeds=3\n', self._read_page())

  def test_failed_run_is_recorded_and_alone_is_run_again(self):
    result = self._call(
      '--grid', 'size=1,2', '--grid', 'fail=once,silent,killed', '--jobs=2'
    )
    self.assertEqual(result.returncode, 1)
    self.assertIn('6 runs did not finish', result.stderr)
    self.assertIn(
      'cells/size=1,fail=once/seed_0: RuntimeError: no luck today',
      result.stderr,
    )
    cells = self.workdir / 'cells'
    read = lambda cell: (cells / cell / 'seed_0' / 'error.txt').read_text()
    self.assertEqual(read('size=2,fail=once'), 'RuntimeError: no luck today\n')
    self.assertStartsWith(read('size=2,fail=killed'), 'stopped by SIGKILL')
    self.assertStartsWith(
      read('size=2,fail=silent'), 'ended without summary.json'
    )
    refused = self._call(config=None)  # sweep.json is only data
    self.assertEqual(refused.returncode, 2)
    self.assertIn('--config=experiments/toy.py', refused.stderr)
    again = self._call('--only=*fail=once')
    self.assertEqual(again.returncode, 0, again.stderr)
    self.assertEqual(
      self._attempts(),
      {
        f'size={n},fail={fail}/seed_0': 2 if fail == 'once' else 1
        for n in (1, 2)
        for fail in ('once', 'silent', 'killed')
      },
    )
    self.assertFalse((cells / 'size=1,fail=once/seed_0/error.txt').exists())
    self.assertEqual(self._read_summary()['failed'], 4)

  def test_rows_of_the_file(self):
    result = self._call('--seeds=1', config='rows.py')
    self.assertEqual(result.returncode, 1)
    page = self._read_page()
    self.assertIn('| cell | loss | seeds | the paper |', page)
    self.assertIn('| plain | **1** | 1 of 1 | 12.3 |', page)
    self.assertIn('| broken | – | 0 of 1, **1 failed** | – |', page)
    self.assertIn('| large | 7 | 1 of 1 | – |', page)
    self.assertIn('| large | `--config=experiments/rows.py:7` |', page)
    self.assertIn('log.txt): RuntimeError: no luck today', page)

  def test_goes_on_with_the_grid_of_earlier_flags(self):
    self._call('--grid=roles=k,v', '--only=plain,roles=k', config='rows.py')
    result = self._call('--only=plain,*', config='rows.py')
    self.assertEqual(result.returncode, 0, result.stderr)
    runs = [f'plain,roles={role}/seed_0' for role in 'kv']
    self.assertCountEqual(self._attempts(), runs)

  def test_signal_lets_runs_save_and_they_resume(self):
    process = self._start('--grid', 'size=1,2,3', '--set=fail=wait', '--jobs=2')
    folders = [self.workdir / f'cells/size={n}/seed_0' for n in (1, 2)]
    deadline = time.monotonic() + 30
    while not all((folder / 'ready.txt').exists() for folder in folders):
      self.assertLess(time.monotonic(), deadline)
      time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    self.assertEqual(process.returncode, 128 + signal.SIGTERM)
    self.assertIn('SIGTERM: stopped 2 runs, and 1 have not begun', stderr)
    self.assertIn('python launch/sweep.py --workdir=runs/a', stderr)
    for folder in folders:
      self.assertTrue((folder / 'saved.txt').exists())
      self.assertFalse((folder / 'error.txt').exists())
    result = self._call('--only=size=[12]')
    self.assertEqual(result.returncode, 0, result.stderr)
    self.assertEqual(self._attempts(), {'size=1/seed_0': 2, 'size=2/seed_0': 2})

  def test_slurm_array_runs_what_is_left(self):
    grid = ('--grid', 'size=1,2,3', '--target=slurm')
    lost = self._call(*grid)
    self.assertEqual(lost.returncode, 2)
    self.assertIn('sbatch runs/a/slurm.sh', lost.stderr)
    self._call('--only=size=2')
    sbatch = self.folder.create_file('bin/sbatch', content=_SBATCH)
    os.chmod(sbatch.full_path, 0o755)
    folder = os.path.dirname(sbatch.full_path)
    self.environment['PATH'] = f'{folder}:{os.environ["PATH"]}'
    options = ('--sbatch=--time=1:00:00', '--jobs=2')
    result = self._call(*grid, *options)
    self.assertEqual(result.returncode, 0, result.stderr)
    script = (self.workdir / 'slurm.sh').read_text()
    self.assertIn('#SBATCH --time=1:00:00\n#SBATCH --array=0-1%2\n', script)
    self.assertEqual(
      self._attempts(), {f'size={n}/seed_0': 1 for n in (1, 2, 3)}
    )
    self.assertEqual(self._read_summary()['finished'], 3)

  @pytest.mark.slow
  def test_slurm_array_tries_values_and_then_runs_seeds(self):
    sbatch = self.folder.create_file('bin/sbatch', content=_SBATCH)
    os.chmod(sbatch.full_path, 0o755)
    folder = os.path.dirname(sbatch.full_path)
    self.environment['PATH'] = f'{folder}:{os.environ["PATH"]}'
    args = ('--tune=size=1,2', '--seeds=2', '--metrics=loss', '--target=slurm')
    result = self._call(*args)
    self.assertEqual(result.returncode, 0, result.stderr)
    self.assertIn('1 best values are not known yet', result.stderr)
    self.assertCountEqual(self._attempts(), ['size=1/seed_0', 'size=2/seed_0'])
    result = self._call(*args)
    self.assertEqual(result.returncode, 0, result.stderr)
    self.assertNotIn('other seeds', result.stderr)
    self.assertEqual(self._attempts()['size=1/seed_1'], 1)
    self.assertLen(self._attempts(), 3)
    self.assertEqual(self._read_summary()['config/loss'], 1.5)

  @parameterized.parameters(
    ('local', 'python {run} --config=experiments/toy.py'),
    ('tpu-vm', '--workdir=gs://b/abl/cells/size=1/seed_0 --set=size=1'),
    ('slurm', '#SBATCH --array=0-1\n'),
  )
  def test_dry_run_writes_nothing(self, target, shown):
    bucket = '--bucket=gs://b/abl'  # where TPUs write to
    result = self._call(
      '--grid=size=1,2', f'--target={target}', '--dry_run', bucket
    )
    self.assertEqual(result.returncode, 0, result.stderr)
    self.assertIn(shown.format(run=_SWEEP.with_name('run.py')), result.stdout)
    self.assertIn('size=2/seed_0', result.stdout)
    self.assertFalse(self.workdir.exists())

  @pytest.mark.slow
  def test_tpu_job_for_each_run_and_its_summary_comes_back(self):
    gcloud = self.folder.create_file('bin/gcloud', content=_GCLOUD)
    os.chmod(gcloud.full_path, 0o755)
    folder = os.path.dirname(gcloud.full_path)
    self.environment['PATH'] = f'{folder}:{os.environ["PATH"]}'
    result = self._call(
      f'--config={_ABLATION}',  # in this tree, which goes along to the TPUs
      '--target=tpu-vm',
      '--bucket=gs://b/abl',
      '--run_flag=--topology=v5e:2x2',
      '--metrics=loss',
      config=None,
    )
    self.assertEqual(result.returncode, 0, result.stderr)
    self.assertEqual(self._read_summary()['retain_to=zero/loss'], 4)
    log = pathlib.Path(folder, 'gcloud.log').read_text()
    nodes = re.findall(r'tpu-vm ssh (\S+)', log)
    self.assertLen(set(nodes), 2)
    self.assertTrue(all(node.startswith('sweep-') for node in nodes), nodes)

  @parameterized.parameters(
    (['--grid=sise=1'], 'the nearest field is size'),
    (['--grid=size=1,big'], 'cell size=big: size=big does not fit'),
    (['--seeds=0'], 'seeds'),
    (['--tune=size=1,2'], 'as in --metrics=loss:min'),
    (['--tune=size=1', '--grid=size=2'], 'has size twice'),
    (['--grid=size=1', '--target=tpu-vm'], '--bucket=gs://BUCKET/NAME'),
    (['--collect'], 'holds no sweep to collect'),
    (['size=1'], "Unexpected argument 'size=1'"),
    ([f'--workdir={"x" * 300}'], 'longer than the file system allows'),
    ([f'--results={"x" * 300}'], 'longer than the file system allows'),
    (['--workdir='], 'A sweep needs a folder'),
  )
  def test_bad_call_starts_nothing(self, args, message):
    result = self._call(*args)
    self.assertEqual(result.returncode, 2, result.stderr)
    self.assertLen(result.stderr.splitlines(), 1)
    self.assertStartsWith(result.stderr, 'sweep.py: ')
    self.assertIn(message, result.stderr)
    self.assertFalse(self.workdir.exists())

  @parameterized.parameters('lr[3e-3]', '-a b\\*?%s\n☃ ')
  def test_workdir_of_any_name(self, name):
    workdir = f'--workdir={name}'
    args = ('--grid=size=1,2', workdir)
    result = self._call(*args)
    self.assertEqual(result.returncode, 0, result.stderr)
    self.assertEqual(self._call(*args).returncode, 0)  # it is read back
    collected = self._call(workdir, '--collect', config=None)
    self.assertEqual(collected.returncode, 0, collected.stderr)
    self.workdir = pathlib.Path(self.folder.full_path, name)
    self.assertEqual(self._read_summary()['finished'], 2)
    self.assertEqual(self._attempts(), {'size=1/seed_0': 1, 'size=2/seed_0': 1})

  @pytest.mark.slow
  def test_workdir_that_the_trainer_refuses_starts_no_run(self):
    config = f'--config={_ROOT}/experiments/quickstart.py'
    result = self._call(config, '--workdir=lr[3e-3]', config=None)
    self.assertEqual(result.returncode, 2, result.stderr)
    self.assertLen(result.stderr.splitlines(), 1)
    self.assertIn('--workdir=lr[3e-3]: checkpoints cannot', result.stderr)
    self.assertNotIn('lr[3e-3]', os.listdir(self.folder.full_path))

  def test_value_that_looks_like_a_pattern(self):
    result = self._call('--grid', 'fail="lr[3e-3]","a*?",\'%s ☃\'')
    self.assertEqual(result.returncode, 0, result.stderr)
    self.assertEqual(self._read_summary()['finished'], 3)

  def test_page_hides_passwords(self):
    flags = ('--run_flag=--env=TOKEN=geheim', '--run_flag', '--env=A=geheim')
    result = self._call('--grid=size=1', '--target=slurm', *flags)
    self.assertEqual(result.returncode, 2)  # there is no sbatch
    self._call('--collect', config=None)
    for name in ('sweep.json', 'README.md'):
      text = (self.workdir / name).read_text()
      self.assertNotIn('geheim', text)
      self.assertIn('TOKEN=...', text)
    script = self.workdir / 'slurm.sh'
    self.assertIn('geheim', script.read_text())
    self.assertEqual(script.stat().st_mode & 0o777, 0o600)

  def test_folder_of_another_sweep_is_refused_and_left(self):
    self._call('--grid=size=1')
    before = (self.workdir / 'sweep.json').read_bytes()
    for args, config, message in (
      (['--grid=roles=k'], 'toy.py', 'over size, and this one is over roles'),
      (['--grid=size=1', '--set=roles=v'], 'toy.py', "with roles.0='k', and"),
      (['--grid=size=1'], 'rows.py', 'of experiments/toy.py, and this one is'),
    ):
      result = self._call(*args, config=config)
      self.assertEqual(result.returncode, 2, result.stderr)
      self.assertLen(result.stderr.splitlines(), 1)
      self.assertIn(message, result.stderr)
    self.assertEqual((self.workdir / 'sweep.json').read_bytes(), before)
    self.assertEqual(self._attempts(), {'size=1/seed_0': 1})
