"""Tests of launch/run.py, called as a user calls it."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from launch import workdirs
from nested_learning import accelerators
from nested_learning import configs
from nested_learning import errors
from nested_learning import files

_RUN = pathlib.Path(__file__).resolve().parents[2] / 'launch' / 'run.py'

# An experiment without JAX, so that a call is quick.
_FILE = """
import atexit
import dataclasses
import errno
import os
import pathlib
import sys
import time

from nested_learning import errors

@dataclasses.dataclass(frozen=True)
class Generate:
  prompt: str = 'def'

@dataclasses.dataclass(frozen=True)
class Config:
  size: int = 1
  fail: str = ''
  generate: Generate = Generate()

  def __post_init__(self):
    if self.size < 0:
      raise errors.UserError(f'size={self.size} is negative.')

def get_config(arg=None):
  return Config(size=int(arg or 1))

def run(config, workdir, mode):
  if config.fail == 'user':
    raise errors.UserError('The corpus is empty.')
  if config.fail == 'bug':
    return int('three')
  if config.fail == 'package':  # the error of a bug, raised by the package
    from nested_learning import markdown
    markdown.table('ab', ['c'])
  if config.fail == 'save':
    raise errors.Retryable('Cannot save step 3: No space left on device.')
  if config.fail == 'full':
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  if config.fail == 'wait':
    print('here', flush=True)
    time.sleep(60)
  if config.fail == 'early':  # as the trainer, before its first step
    for name in ('checkpoints', 'tensorboard'):
      pathlib.Path(workdir, name).mkdir()
    pathlib.Path(workdir, 'tensorboard', 'events').write_text('start')
    pathlib.Path(workdir, 'metrics.jsonl').touch()
    raise RuntimeError('Out of memory')
  if config.fail == 'saved':
    atexit.register(print, 'exit functions ran')
    print('saved')
    sys.exit(143)
  if config.fail == 'code':
    return 7
  if config.fail == 'tunables':
    return print(os.environ.get('GLIBC_TUNABLES'))
  if workdir and mode == 'train':
    pathlib.Path(workdir, 'metrics.jsonl').write_text('{}')
  print(mode, config.size, config.generate.prompt)
"""


class RunTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.create_tempdir()
    self.folder.create_file('experiments/toy.py', content=_FILE)
    self.folder.create_file(
      'experiments/broken.py', content='def get_config():\n  return undefined\n'
    )
    self.workdir = pathlib.Path(self.folder.full_path, 'runs', 'a')

  def _popen(self, *args, **environment):
    return subprocess.Popen(
      [sys.executable, _RUN, *args],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=self.folder.full_path,
      env={**os.environ, 'PYTHONDONTWRITEBYTECODE': '1', **environment},
    )

  def _call(self, *args, **environment):
    process = self._popen(*args, **environment)
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(args, process.returncode, stdout, stderr)

  def _start(self, *args, **environment):
    config = ('--config=experiments/toy.py:5', '--workdir=runs/a')
    process = self._popen(*config, *args, **environment)
    self.addCleanup(process.kill)
    return process

  def _toy(self, *args):
    return self._call(
      '--config=experiments/toy.py:5', '--workdir=runs/a', *args
    )

  def _assert_done(self, result, output):
    self.assertEqual(result.stderr, '')
    self.assertEqual(result.stdout.strip(), output)
    self.assertEqual(result.returncode, 0)

  def _assert_refused(self, result, message):
    self.assertEqual(result.returncode, 2, result.stderr)
    self.assertLen(result.stderr.splitlines(), 1)
    self.assertStartsWith(result.stderr, 'run.py: ')
    self.assertIn(message, result.stderr)

  @parameterized.parameters(
    ((), 'has its own run()'),
    (('--mode=describe',), 'is for --mode=train, not describe.'),
    (('--mode=inspect',), 'is for --mode=train, not inspect.'),
  )
  def test_refuses_a_profile_that_nothing_writes(self, arguments, message):
    result = self._toy('--profile=2:3', *arguments)
    self._assert_refused(result, message)
    self.assertIn('--profile=2:3 is for', result.stderr)

  @parameterized.parameters(
    ('tpu', '[tpu]'), ('cuda,cpu', '[cuda]'), ('cpu,gpu', '[cuda]')
  )
  def test_platforms_without_their_package_are_one_line(self, names, extra):
    with (
      mock.patch.object(importlib.util, 'find_spec', return_value=None),
      mock.patch.dict(os.environ, TPU_LIBRARY_PATH=''),
      self.assertRaises(errors.UserError) as raised,
    ):
      accelerators.check_platforms(names)
    message = str(raised.exception)
    self.assertStartsWith(message, f'JAX_PLATFORMS={names} needs ')
    self.assertEndsWith(message, f"pip install '.{extra}', or unset it.")
    accelerators.check_platforms('cpu')
    accelerators.check_platforms(None)

  def test_a_backend_that_does_not_start_is_one_line(self):
    error = (
      "raise RuntimeError('Unable to initialize backend \\'tpu\\': busy.\\nx')"
    )
    self.folder.create_file(
      'experiments/busy.py', content=_FILE.replace("return int('three')", error)
    )
    result = self._call(
      '--config=experiments/busy.py', '--workdir=runs/b', '--set=fail=bug'
    )
    self.assertEqual(result.returncode, 42)
    self.assertEqual(
      result.stderr, "run.py: Unable to initialize backend 'tpu': busy.\n"
    )

  def test_config_is_written_and_repeats_the_run(self):
    self._assert_done(self._toy('--set=size=6'), 'train 6 def')
    data = json.loads((self.workdir / 'config.json').read_text())
    self.assertEqual(data['size'], 6)
    self.assertCountEqual(
      os.listdir(self.workdir), ['config.json', 'lock', 'metrics.jsonl']
    )
    again = self._call('--config=runs/a/config.json', '--workdir=runs/b')
    self._assert_refused(again, 'Name its file too, as in --config=PATH/toy.py')
    again = self._call(
      '--config=experiments/toy.py@runs/a/config.json', '--workdir=runs/b'
    )
    self._assert_done(again, 'train 6 def')
    copy = self.workdir.parent / 'b' / 'config.json'
    self.assertEqual(json.loads(copy.read_text()), data)

  def test_same_config_resumes_and_another_is_refused(self):
    self._assert_done(self._toy(), 'train 5 def')
    before = (self.workdir / 'config.json').read_bytes()
    self._assert_done(self._toy(), 'train 5 def')
    config = '--config=experiments/toy.py@runs/a/config.json'
    self._assert_done(self._call(config, '--workdir=runs/a'), 'train 5 def')
    refused = self._toy('--set=size=8')
    self._assert_refused(refused, 'size (5 there, 8 here)')
    self.assertIn('Use another --workdir', refused.stderr)
    self.assertEqual((self.workdir / 'config.json').read_bytes(), before)

  @absltest.skipUnless(sys.platform.startswith('linux'), 'glibc is on Linux')
  def test_process_has_huge_pages_unless_glibc_tunables_is_set(self):
    arguments = ['--config=experiments/toy.py', '--set=fail=tunables']
    arguments += ['--mode=describe']
    with mock.patch.dict(os.environ):
      os.environ.pop('GLIBC_TUNABLES', None)
      call = self._call(*arguments)
      self._assert_done(call, 'glibc.malloc.hugetlb=1')
      own = 'glibc.malloc.check=0'
      self._assert_done(self._call(*arguments, GLIBC_TUNABLES=own), own)

  def test_run_that_never_began_does_not_hold_its_workdir(self):
    self._assert_refused(self._toy('--set=fail=user'), 'The corpus is empty.')
    self.assertFalse((self.workdir / 'config.json').exists())
    self.assertEqual(self._toy('--set=fail=early').returncode, 42)
    self.assertFalse((self.workdir / 'config.json').exists())
    self._assert_done(self._toy(), 'train 5 def')
    data = json.loads((self.workdir / 'config.json').read_text())
    self.assertEqual(data['fail'], '')

  def test_finished_run_is_not_run_again(self):
    self._toy()
    (self.workdir / 'summary.json').write_text('{}')
    result = self._toy()
    self.assertEqual(result.returncode, 0)
    self.assertIn('finished: see runs/a/report.md', result.stdout)
    self.assertNotIn('train 5', result.stdout)
    self._assert_done(self._toy('--mode=eval'), 'eval 5 def')
    self._assert_refused(self._toy('--set=size=8'), 'size (5 there, 8 here)')

  def test_generate_reads_the_run_and_changes_nothing_in_it(self):
    self._toy()
    before = (self.workdir / 'config.json').read_bytes()
    mode = '--mode=generate'
    config = '--config=experiments/toy.py@runs/a/config.json'
    call = self._call(config, '--workdir=runs/a', mode, '--prompt=a b')
    self._assert_done(call, 'generate 5 a b')
    self._assert_done(self._toy(mode, '--prompt=x'), 'generate 5 x')
    self._assert_refused(
      self._toy(mode, '--set=size=2'), 'Leave out --config to use'
    )
    self.assertEqual((self.workdir / 'config.json').read_bytes(), before)

  def test_describe_needs_no_workdir(self):
    call = self._call('--config=experiments/toy.py', '--mode=describe')
    self._assert_done(call, 'describe 1 def')

  @parameterized.parameters(
    (['--confg=x'], "'confg'. Did you mean: config"),
    (['--mode=trian'], 'train|eval|generate|session|describe|compile|inspect'),
    (['train'], "Unexpected argument 'train'"),
    ([], '--workdir=runs/NAME'),
    (['--mode=inspect'], '--workdir=runs/NAME'),
    (['--workdir=runs/none'], 'No config (runs/none holds no run)'),
    (
      ['--config=experiments/tyo.py', '--workdir=runs/a'],
      'experiments has: broken.py, toy.py',
    ),
    (
      ['--config=experiments/broken.py', '--workdir=runs/a'],
      'experiments/broken.py, line 2: NameError',
    ),
    (
      ['--config=experiments/toy.py', '--workdir=experiments/toy.py'],
      'Cannot write to --workdir=experiments/toy.py',
    ),
    (['--target=lokal'], 'the nearest is local.'),
    (['--workdir=gs://b/a'], 'gs://b/a is no folder of this machine'),
    (['--workdir=a', '--topology=v5e:4x4'], '--target=local uses the devices'),
    (['--workdir=a', '--process_id=1'], 'JAX_NUM_PROCESSES must be set too'),
    (['--workdir=a', '--process_id=-1'], '-1'),
    (['--target=gke', '--topology=v5e:3x3'], 'the nearest is v5e:2x4'),
    (['--target=gke', '--topology=v5e:2x2'], '--workdir=gs://BUCKET/NAME'),
    (['--target=slurm', '--dry_run'], 'needs --topology'),
    (['--target=local-procs:x', '--workdir=a'], 'how many processes'),
    (
      ['--target=local-procs:2', '--workdir=experiments/toy.py/a'],
      'Cannot write to --workdir=experiments/toy.py/a',
    ),
  )
  def test_bad_call(self, args, message):
    self._assert_refused(self._call(*args), message)
    self.assertFalse(self.workdir.exists())

  @parameterized.parameters(
    ('sise=3', 'the nearest field is size'),
    ('size=big', 'size=big does not fit: size is int, now 5'),
    ('size=-3', 'size=-3 is negative'),
    ('fail=user', 'The corpus is empty.'),
  )
  def test_bad_value(self, assignment, message):
    self._assert_refused(self._toy(f'--set={assignment}'), message)

  def test_dry_run_starts_nothing(self):
    result = self._toy('--target=local-procs:2', '--dry_run', '--set=size=6')
    self.assertEqual(result.returncode, 0, result.stderr)
    self.assertEqual(result.stdout.count('--set=size=6'), 2)
    self.assertNotIn('--dry_run', result.stdout)
    self.assertFalse(self.workdir.exists())

  def test_target_refuses_the_run_of_another_config(self):
    self._toy()
    (self.workdir / 'summary.json').write_text('{}')
    target = '--target=local-procs:2'
    self._assert_refused(self._toy(target, '--set=size=8'), '5 there, 8 here')
    finished = self._toy(target)
    self.assertEqual(finished.returncode, 0, finished.stderr)
    self.assertIn('finished: see runs/a/report.md', finished.stdout)

  def test_mesh_is_checked_before_anything_starts(self):
    config = f'--config={_RUN.parents[1]}/experiments/quickstart.py'
    result = self._call(config, '--target=local-procs:3x2', '--workdir=runs/a')
    self._assert_refused(result, 'multiple of the 3 processes')
    self.assertFalse(self.workdir.exists())

  @parameterized.parameters(
    ('bug', "return int('three')"), ('package', "table('ab', ['c'])")
  )
  def test_bug_keeps_its_traceback(self, fail, line):
    result = self._toy(f'--set=fail={fail}')
    self.assertEqual(result.returncode, 42)  # which clusters try again
    self.assertIn(line, result.stderr)
    self.assertIn('\nValueError: ', result.stderr)

  def test_bug_behind_a_config_keeps_its_traceback(self):
    text = (
      'from nested_learning import markdown\n'
      "def get_config(arg=None):\n  return markdown.table('ab', ['c'])\n"
    )
    self.folder.create_file('experiments/bug.py', content=text)
    result = self._call('--config=experiments/bug.py', '--mode=describe')
    self.assertEqual(result.returncode, 42)
    self.assertIn("table('ab', ['c'])", result.stderr)

  def test_full_disk_is_one_line_and_worth_another_attempt(self):
    result = self._toy('--set=fail=full')
    self.assertEqual(result.returncode, 42)
    self.assertEqual(
      result.stderr,
      'run.py: a file that this program reads or writes: No space left on '
      'device. Fix this and run the same command again.\n',
    )
    result = self._toy('--set=fail=save')
    self.assertEqual(result.returncode, 42)
    self.assertStartsWith(result.stderr, 'run.py: Cannot save step 3: No space')

  def test_full_disk_at_the_start_names_the_folder(self):
    full = errors.Retryable('w/config.json: No space left on device.')
    experiment = configs.Experiment(config=None, run=None, module=None)
    with (
      mock.patch.object(configs, 'to_json', return_value='{}'),
      mock.patch.object(files, 'write_whole', side_effect=full),
      self.assertRaisesRegex(errors.Retryable, '--workdir=.*w/config.json: No'),
    ):
      workdirs.prepare(
        experiment,
        pathlib.Path(self.folder),
        mode='train',
        has_config=True,
      )

  @parameterized.parameters(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
  def test_signal_before_the_first_step_is_one_line(self, number):
    process = self._start('--set=fail=wait')
    self.assertEqual(process.stdout.readline(), 'here\n')
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    self.assertEqual(process.returncode, 128 + number)
    self.assertRegex(stderr, f'^run.py: stopped by {number.name}; .*\n$')

  @parameterized.parameters(signal.SIGINT, signal.SIGTERM)
  def test_signal_among_the_imports_is_one_line(self, number):
    # An import that takes long, and tells when it has begun.
    slow = 'print("here", flush=True)\nimport time\ntime.sleep(60)\n'
    self.folder.create_file('slow/yaml.py', content=slow)
    self.folder.create_file('slow/absl/__init__.py', content=slow)
    path = pathlib.Path(self.folder.full_path, 'slow')
    process = self._start(PYTHONPATH=str(path))
    self.assertEqual(process.stdout.readline(), 'here\n')
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    self.assertEqual(process.returncode, 128 + number)
    self.assertRegex(stderr, f'^run.py: stopped by {number.name}; .*\n$')

  def test_end_after_a_signal_runs_no_exit_functions(self):
    result = self._toy('--set=fail=saved')
    self.assertEqual(result.returncode, 143)
    self.assertEqual(result.stdout, 'saved\n')

  @parameterized.parameters(
    ('run.py', '--help'),
    ('run.py', '--config=experiments/toy.py', '--mode=describe'),
    ('sweep.py', '--help'),
    ('prepare.py', '--help'),
  )
  def test_output_that_nobody_reads_is_no_error(self, program, *args):
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
      [sys.executable, _RUN.with_name(program), *args],
      stdout=writing,
      stderr=subprocess.PIPE,
      text=True,
      cwd=self.folder.full_path,
    )
    os.close(writing)
    self.assertEqual(result.stderr, '')
    self.assertEqual(result.returncode, 128 + signal.SIGPIPE)

  def test_second_run_in_a_workdir_is_refused(self):
    process = self._start('--set=fail=wait')
    self.assertEqual(process.stdout.readline(), 'here\n')
    refused = self._toy('--set=fail=wait')
    self._assert_refused(refused, '--workdir=runs/a is in use by process')
    self.assertIn(str(process.pid), refused.stderr)
    several = self._toy('--set=fail=wait', '--target=local-procs:2')
    self._assert_refused(several, '--workdir=runs/a is in use by process')
    mode = self._toy('--mode=describe', '--set=fail=wait', '--set=fail=')
    self._assert_done(mode, 'describe 5 def')  # it only reads
    process.kill()  # a dead owner does not block
    process.communicate()
    self._assert_done(self._toy(), 'train 5 def')

  def test_exit_code_of_the_run_is_passed_on(self):
    self.assertEqual(self._toy('--set=fail=code').returncode, 7)

  def test_config_cut_short_is_refused_and_left(self):
    self._toy()
    file = self.workdir / 'config.json'
    file.write_text(file.read_text()[:20])
    self._assert_refused(self._toy(), 'runs/a/config.json: not a config')
    self.assertLen(file.read_text(), 20)

  @parameterized.parameters(
    'lr[3e-3]',
    'a\\b*c?d{e}',
    '100%d %s',
    ' quoted \'"$HOME` ',
    'two\nlines',
    '-x',
    'größe ☃',
    '~',
  )
  def test_workdir_of_any_name_is_read_back(self, name):
    workdir = f'--workdir={name}'
    toy = '--config=experiments/toy.py:5'
    self._assert_done(self._call(toy, workdir), 'train 5 def')
    self.assertIn(name, os.listdir(self.folder.full_path))
    self._assert_done(self._call(toy, workdir, '--mode=eval'), 'eval 5 def')
    (path,) = pathlib.Path(self.folder.full_path, name).glob('config.json')
    config = f'--config=experiments/toy.py@{path}'
    again = self._call(config, '--workdir=other')
    self._assert_done(again, 'train 5 def')

  @parameterized.parameters('workdir', 'config', 'session')
  def test_name_that_is_too_long_is_one_line(self, flag):
    others = ['--workdir=runs/a'] if flag != 'workdir' else []
    call = self._call(*others, f'--{flag}={"x" * 300}')
    self._assert_refused(call, f'--{flag}=xxx')
    self.assertIn('longer than the file system allows', call.stderr)

  def test_argument_that_is_not_utf8_is_one_line(self):
    call = self._call(b'--workdir=a\xff', '--mode=describe')
    self._assert_refused(call, 'is not UTF-8')

  def test_terminal_of_ascii_gets_escapes(self):
    ascii = {'PYTHONIOENCODING': 'ascii', 'LC_ALL': 'C'}
    prompt = '--set=generate.prompt=größe ☃'
    call = self._call(
      '--config=experiments/toy.py', '--mode=describe', prompt, **ascii
    )
    self.assertEqual(call.returncode, 0, call.stderr)
    self.assertEqual(call.stdout, 'describe 1 gr\\xf6\\xdfe \\u2603\n')
    missing = self._call('--config=☃.py', '--mode=describe', **ascii)
    self.assertEqual(missing.returncode, 2)
    self.assertLen(missing.stderr.splitlines(), 1)

  @parameterized.parameters(
    (['--feed=a.txt'], '--session and --feed are for --mode=session'),
    (['--mode=session', '--session=a'], 'experiment of a language model'),
  )
  def test_sessions_are_for_language_models(self, args, message):
    result = self._toy(*args)
    self.assertEqual(result.returncode, 2)
    self.assertIn(message, result.stderr)


_TINY = """
from tests.training import tiny

def get_config(arg):
  return tiny.experiment(arg, train={'num_steps': 4, 'checkpoint_every': 2})
"""


@pytest.mark.slow
class TrainerTest(absltest.TestCase):
  """Tests of a real run in a workdir with a hostile name."""

  def setUp(self):
    super().setUp()
    folder = self.create_tempdir()
    self.root = pathlib.Path(folder.full_path)
    folder.create_file('experiments/small.py', content=_TINY)

  def call(self, *args, workdir='{lr}, %s$HOME\'"`&;\n☃ ', code=0):
    result = subprocess.run(
      [sys.executable, _RUN, f'--workdir={workdir}', *args],
      cwd=self.root,
      env={**os.environ, 'PYTHONPATH': str(_RUN.parents[1])},
      capture_output=True,
      text=True,
    )
    self.assertEqual(result.returncode, code, result.stderr)
    return result.stdout + result.stderr

  def test_name_that_is_a_pattern_is_refused_before_the_first_step(self):
    config = f'--config=experiments/small.py:{self.root}'
    error = self.call(config, workdir='lr[3e-3]', code=2)
    self.assertLen(error.splitlines(), 1)
    self.assertIn('choose another name', error)
    self.assertFalse((self.root / 'lr[3e-3]' / 'metrics.jsonl').exists())

  def test_what_is_saved_is_read_back(self):
    config = f'--config=experiments/small.py:{self.root}'
    # A run that ends in the middle, and its second half.
    self.call(config, '--set=train.num_steps=2')
    (workdir,) = self.root.glob('{lr}*')
    for name in ('config.json', 'summary.json'):
      (workdir / name).unlink()
    self.assertIn('Going on from step 2', self.call(config))
    self.assertIn('4', self.call('--mode=inspect'))
    self.call('--mode=eval')
    self.assertIn('line', self.call('--mode=generate', '--prompt=line'))
    session = ('--mode=session', '--session=me[1]*?.session')
    feed = str(self.root / 'text' / '0.txt')
    self.call(*session, f'--feed={feed}')
    self.assertTrue((self.root / 'me[1]*?.session').is_file())
    self.call(*session, '--prompt=line')
