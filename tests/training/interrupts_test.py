"""Signals are kept until it is time, and end the process with a line."""

import contextlib
import io
import pathlib
import signal
import threading
from unittest import mock

from absl.testing import parameterized
import jax
import pytest

from nested_learning import training
from nested_learning.training import interrupts
from nested_learning.training import report
from tests.training import tiny

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class InterruptsTest(parameterized.TestCase):
  @parameterized.parameters(*_SIGNALS)
  def test_signal_is_kept(self, number):
    before = signal.getsignal(number)
    with interrupts.deferred() as stop:
      self.assertFalse(stop.requested())
      self.assertLen(list(interrupts.until(stop, range(3))), 3)
      signal.raise_signal(number)
      self.assertTrue(stop.requested())
      self.assertEqual(stop.signal, number)
      with self.assertRaises(interrupts.Interrupted):
        list(interrupts.until(stop, range(3)))
    self.assertEqual(signal.getsignal(number), before)

  def test_second_signal_is_not_kept(self):
    with interrupts.deferred(), self.assertRaises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
      signal.raise_signal(signal.SIGINT)

  @parameterized.parameters(*_SIGNALS)
  def test_ending(self, number):
    before = signal.getsignal(number)
    output = io.StringIO()
    with (
      contextlib.redirect_stderr(output),
      self.assertRaises(SystemExit) as end,
      interrupts.ending('all is saved.'),
    ):
      signal.raise_signal(number)
    self.assertEqual(end.exception.code, 128 + number)
    self.assertEqual(output.getvalue(), f'{number.name}: all is saved.\n')
    self.assertEqual(signal.getsignal(number), before)

  def test_a_signal_that_is_ignored_stays_ignored(self):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    self.addCleanup(signal.signal, signal.SIGHUP, before)
    with interrupts.deferred() as stop, interrupts.ending(''):
      signal.raise_signal(signal.SIGHUP)
      self.assertFalse(stop.requested())
    self.assertIs(signal.getsignal(signal.SIGHUP), signal.SIG_IGN)

  def test_other_threads_keep_nothing(self):
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
      with interrupts.deferred() as stop, interrupts.ending(''):
        seen.append((stop.requested(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    self.assertEqual(seen, [(False, before)])

  def test_processes_agree_on_the_place(self):
    asked = []

    def reached(number):
      asked.append(number)
      return number == 3  # true at one place alone

    before = signal.getsignal(signal.SIGTERM)
    with (
      mock.patch.object(jax.distributed, 'is_initialized', lambda: True),
      mock.patch.object(
        interrupts.multihost_utils, 'reached_preemption_sync_point', reached
      ),
      interrupts.deferred() as stop,
    ):
      # JAX has taken SIGTERM; Ctrl-C becomes one.
      self.assertEqual(signal.getsignal(signal.SIGTERM), before)
      answers = [stop.requested() for _ in range(5)]
      with mock.patch.object(interrupts.os, 'kill') as kill:
        signal.raise_signal(signal.SIGINT)
      self.assertEqual(kill.call_args.args[1], signal.SIGTERM)
    self.assertEqual(answers, [False, False, True, True, True])
    self.assertEqual(asked, [1, 2, 3])
    self.assertEqual(stop.signal, signal.SIGTERM)

  @pytest.mark.slow
  def test_signal_after_the_last_step(self):
    tiny.share_executables(self)
    root = pathlib.Path(self.create_tempdir().full_path)
    config = tiny.experiment(root, train={'num_steps': 2})

    def end_here(*_):
      signal.raise_signal(signal.SIGTERM)

    output = io.StringIO()
    with (
      mock.patch.object(report, 'write_report', end_here),
      contextlib.redirect_stderr(output),
      self.assertRaises(SystemExit) as end,
    ):
      training.run(config, root / 'run')
    self.assertEqual(end.exception.code, 143)
    message = 'SIGTERM: the last step, 2, is saved in .*same command again'
    self.assertRegex(output.getvalue(), message)
    self.assertFalse((root / 'run' / 'summary.json').exists())
    with contextlib.redirect_stdout(output):
      training.run(config, root / 'run')  # takes no step
    self.assertTrue((root / 'run' / 'summary.json').exists())
