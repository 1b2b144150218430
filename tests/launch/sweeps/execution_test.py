"""Tests of executing the runs of a sweep, here and as a Slurm array."""

import fcntl
import pathlib
import subprocess
import sys
import time

from absl.testing import absltest

from launch import sweeps
from nested_learning import errors

_FINISH = 'open("{folder}/summary.json", "w").write("1")'


def _make_command(code):
  return lambda run: [sys.executable, '-c', code.format(folder=run.folder)]


class LocalTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    root = pathlib.Path(self.create_tempdir().full_path)
    self.runs = [
      sweeps.Run(name, root / name, None, 0, (), None) for name in 'abc'
    ]

  def test_finished_runs_are_not_started(self):
    for run in self.runs[:2]:
      run.folder.mkdir()
      (run.folder / 'summary.json').touch()
    outcome = sweeps.run_all(self.runs, _make_command(_FINISH))
    self.assertEqual(outcome, sweeps.Outcome({}, None, 0, 0))
    self.assertEqual((self.runs[0].folder / 'summary.json').read_text(), '')
    self.assertEqual((self.runs[2].folder / 'summary.json').read_text(), '1')

  def test_several_at_a_time(self):
    # Each waits for the other two, for as long as ten seconds.
    code = (
      'import pathlib, time; f = pathlib.Path("{folder}"); '
      '(f / "here").touch()\n'
      'for _ in range(200):\n'
      '  if len(list(f.parent.glob("*/here"))) == 3:\n'
      '    (f / "summary.json").touch(); break\n'
      '  time.sleep(0.05)'
    )
    outcome = sweeps.run_all(self.runs, _make_command(code), num_jobs=3)
    self.assertEmpty(outcome.failures)

  def test_run_of_another_process_is_left_to_it(self):
    self.runs[1].folder.mkdir()
    with open(self.runs[1].folder / '.lock', 'wb') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      outcome = sweeps.run_all(self.runs, _make_command(_FINISH))
    self.assertEqual(
      outcome.failures, {'b': 'another process is at work on it'}
    )
    self.assertFalse((self.runs[1].folder / 'summary.json').exists())
    self.assertEmpty(sweeps.run_all(self.runs, _make_command(_FINISH)).failures)

  def test_broken_folder_harms_no_other(self):
    self.runs[0].folder.write_text('a file in the way')
    outcome = sweeps.run_all(self.runs, _make_command(_FINISH))
    self.assertCountEqual(outcome.failures, ['a'])
    self.assertStartsWith(outcome.failures['a'], 'cannot be started')
    self.assertTrue(all(run.finished for run in self.runs[1:]))

  def test_error_is_found_above_what_is_printed_at_exit(self):
    code = (
      'import atexit; atexit.register(print, "Closing the files.")\n'
      'print("ValueError: of an earlier step, mended")\n'
      'raise FloatingPointError("loss is nan at step 3")'
    )
    outcome = sweeps.run_all(self.runs[:1], _make_command(code))
    expected = 'FloatingPointError: loss is nan at step 3'
    self.assertEqual(outcome.failures, {'a': expected})
    # The next attempt does not look at the log of this one.
    outcome = sweeps.run_all(self.runs[:1], _make_command('exit("no disk")'))
    self.assertEqual(outcome.failures, {'a': 'no disk'})
    folder = self.runs[0].folder
    self.assertEqual((folder / 'error.txt').read_text(), 'no disk\n')
    self.assertIn(expected, (folder / 'log.txt').read_text())

  def test_second_signal_kills(self):
    # Deaf to SIGTERM; sends it to its parent twice.
    code = (
      'import os, signal, time\n'
      'signal.signal(signal.SIGTERM, signal.SIG_IGN)\n'
      'for _ in range(2):\n'
      '  os.kill(os.getppid(), signal.SIGTERM); time.sleep(1)\n'
      'time.sleep(60)'
    )
    start = time.monotonic()
    outcome = sweeps.run_all(self.runs, _make_command(code))
    self.assertLess(time.monotonic() - start, 30)
    self.assertEqual(outcome.received.name, 'SIGTERM')
    self.assertEqual((outcome.num_stopped, outcome.num_waiting), (1, 2))


class SlurmTest(absltest.TestCase):
  def test_task_runs_its_name_where_it_was_made(self):
    folder = self.create_tempdir('a folder').full_path
    script = sweeps.make_array_script(
      ['a=1/seed_0', 'b=$x/seed_0'], ['echo', 'it is'], folder=folder, logs='l'
    )
    output = subprocess.check_output(
      ['bash', '-c', script.replace('exec', 'pwd; exec')],
      env={'SLURM_ARRAY_TASK_ID': '1'},
      text=True,
    )
    self.assertEqual(output, f'{folder}\nit is --only=b=$x/seed_0\n')
    self.assertIn('#SBATCH --array=0-1\n', script)

  def test_refuses_malformed_options(self):
    for option in ('fast', '--array=0-5'):
      with self.assertRaisesRegex(errors.UserError, option):
        sweeps.make_array_script(
          ['a'], ['x'], folder='.', logs='l', options=[option]
        )
