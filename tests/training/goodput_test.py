"""Where the wall time of a run goes, with a clock of the test's own."""

import json
import pathlib
import threading
import time
from unittest import mock

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import accelerators
from nested_learning import errors
from nested_learning import training
from nested_learning.training import checkpoints
from nested_learning.training import goodput
from nested_learning.training import make_workload
from nested_learning.training import metrics
from nested_learning.training import profiling
from nested_learning.training import workload as workload_lib
from tests.training import tiny


class Clock:
  """Stands still until it is moved."""

  def __init__(self):
    self.now = 1000.0

  def __call__(self) -> float:
    return self.now


def make_line(step, when, **seconds):
  parts = dict.fromkeys(goodput.PARTS, 0.0) | seconds
  numbers = {goodput.PREFIX + part: value for part, value in parts.items()}
  return {'step': step, 'time': when, **numbers}


class LedgerTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.clock = Clock()
    self.ledger = goodput.Ledger(self.clock, self.clock)

  def spend(self, part, seconds):
    self.ledger.enter(part)
    self.clock.now += seconds

  def assert_seconds(self, **expected):
    found = {k: v for k, v in self.ledger.seconds.items() if v}
    self.assertEqual(found, expected)

  def test_all_time_belongs_to_a_part(self):
    self.clock.now += 2
    for part, seconds in (('compile', 5), ('steps', 60), ('checkpoints', 3)):
      self.spend(part, seconds)
    self.spend('steps', 30)
    self.ledger.move_to_input(10)
    self.assert_seconds(start=2, compile=5, steps=80, checkpoints=3, input=10)
    self.assertEqual(self.ledger.train_seconds, 90)
    self.assertEqual(self.ledger.numbers()['goodput'], 0.8)

  def test_lost_steps_are_restarts(self):
    # Saved at step 10 after 95 + 5 s, and killed after 40 + 10 s more.
    lines = [
      make_line(10, 880.0, start=2.0, compile=8.0, steps=95.0, input=5.0),
      make_line(14, 930.0, start=2.0, compile=8.0, steps=135.0, input=15.0),
    ]
    self.ledger.resume(lines, start=10, train_seconds=100.0)
    self.spend('steps', 30)
    self.assert_seconds(
      start=2, compile=8, steps=125, input=5, restarts=50, down=70
    )
    # From the first start on, at 770, to now.
    self.assertEqual(sum(self.ledger.seconds.values()), self.clock.now - 770)

  def test_a_second_restart_adds_to_the_first(self):
    lines = [make_line(10, 990.0, steps=80.0, restarts=50.0, down=7.0)]
    self.ledger.resume(lines, start=5, train_seconds=60.0)
    self.assert_seconds(steps=60, restarts=70, down=17)

  def test_a_checkpoint_after_the_last_line_loses_nothing(self):
    lines = [make_line(10, 950.0, steps=80.0)]
    self.ledger.resume(lines, start=14, train_seconds=110.0)
    self.assert_seconds(steps=110, down=20)

  def test_a_run_without_a_checkpoint_loses_all_steps(self):
    lines = [make_line(4, 990.0, compile=3.0, steps=40.0, input=1.0)]
    self.ledger.resume(lines, start=0, train_seconds=0.0)
    self.assert_seconds(compile=3, restarts=41, down=10)

  @parameterized.parameters(
    ([],),
    ([{'step': 3, 'loss': 1.0}],),  # of an older version
    ([{**make_line(3, 9.0), 'seconds/steps': None}],),  # damaged
  )
  def test_lines_without_times_leave_the_checkpoint(self, lines):
    self.ledger.resume(lines, start=10, train_seconds=100.0)
    self.assert_seconds(steps=100)


class ChipsTest(parameterized.TestCase):
  def test_tokens_and_mfu_per_chip(self):
    chips = goodput.Chips(4.0, flops_per_token=6e9, peak=4 * 200e12)
    numbers = chips.numbers(rate=40_000.0)
    self.assertEqual(numbers['tokens_per_second_per_chip'], 10_000.0)
    self.assertAlmostEqual(numbers['mfu'], 6e9 * 40_000 / 800e12)

  def test_an_unknown_chip_has_no_mfu(self):
    self.assertEqual(
      goodput.Chips(2).numbers(10.0), {'tokens_per_second_per_chip': 5.0}
    )

  @parameterized.parameters(
    ('TPU v5 lite', 'v5e', 197e12, 8),
    ('TPU7x', 'tpu7x', 2307e12, 4),  # two devices are a chip
    ('NVIDIA H100 80GB HBM3', 'h100', 989e12, 8),
  )
  def test_finds_chips_by_their_kind(self, kind, name, peak, number):
    self.assertEqual(accelerators.find_kind(kind).name, name)
    config = tiny.experiment(self.create_tempdir().full_path)
    spec = make_workload.make_step_spec(config)
    device = mock.Mock(device_kind=kind)
    mesh = mock.Mock(size=8, devices=np.array([device] * 8))
    chips = goodput.find_chips(config, spec, mesh)
    self.assertEqual((chips.number, chips.peak), (number, number * peak))
    # 2 FLOPs per weight, forward and twice that backward; and attention.
    weights = 260 * 16 + 4 * 16 * 16 + 2 * 3 * 16 * 16
    attention = 2 * 16 * config.data.sequence_length
    self.assertAlmostEqual(chips.flops_per_token, 6 * (weights + attention))

  @parameterized.parameters('cpu', 'NVIDIA H100 PCIe', '')
  def test_other_kinds_are_not_known(self, kind):
    self.assertIsNone(accelerators.find_kind(kind))


class InputTest(parameterized.TestCase):
  """Waiting counts from when the devices were done with the step before."""

  def setUp(self):
    super().setUp()
    self.clock = Clock()
    root = pathlib.Path(self.create_tempdir().full_path)
    self.path = root / 'metrics.jsonl'
    config = tiny.experiment(root, train={'log_every': 2})
    self.ready = threading.Event()

    def wait(array):
      self.assertTrue(self.ready.wait(60))
      return array

    self.enterContext(mock.patch.object(jax, 'block_until_ready', wait))
    self.log = self.enterContext(
      metrics.RunLog(root, config, ledger=goodput.Ledger(self.clock))
    )
    self.said = self.enterContext(mock.patch.object(self.log, 'say'))

  def wait_for_a_batch(self, busy, idle):
    """The devices go on for a time after the trainer asks for a batch."""

    def make():
      self.clock.now += busy
      self.ready.set()
      if self.log._deferred is not None:
        step = self.log._deferred[0]
        while self.log._ends._ended[0] < step:
          time.sleep(0.001)
      self.clock.now += idle

    self.log.await_batch(make)
    self.ready.clear()

  def take(self, step, seconds):
    names = ('loss', 'gradient_norm', 'skipped', 'skipped_in_a_row')
    self.log.defer(step, {name: jnp.float32(0) for name in names})
    self.clock.now += seconds

  def test_a_wait_beside_a_step_is_none(self):
    self.wait_for_a_batch(busy=0, idle=3)  # no step is under way
    self.assertEqual(self.log.ledger.seconds['input'], 3)
    self.take(1, 5)
    self.wait_for_a_batch(busy=4, idle=2)
    self.assertEqual(self.log.ledger.seconds['input'], 5)
    self.assertEqual(self.log.ledger.seconds['steps'], 9)
    self.ready.set()

  def test_names_a_stall_once(self):
    for step in range(1, 8):
      self.wait_for_a_batch(busy=0, idle=1 if step > 4 else 0)
      self.take(step, 4)
    self.ready.set()
    self.log.flush()
    self.said.assert_called_once()
    (text,) = self.said.call_args.args
    self.assertIn(
      'step 4: 11% of the time of the last 2 steps went by waiting', text
    )

  def test_a_device_that_is_busy_waits_for_nothing(self):
    self.wait_for_a_batch(busy=0, idle=0)
    self.take(1, 1)
    self.log.await_batch(lambda: setattr(self.clock, 'now', 1007.0))
    self.assertEqual(self.log.ledger.seconds['input'], 0)
    self.ready.set()


class RunTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(mock.patch.object(checkpoints, '_END_SECONDS', 0))
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.workdir = self.root / 'w'
    tiny.share_executables(self)

  def lines(self):
    return metrics.read_metrics(self.workdir / 'metrics.jsonl')

  def train(self, **options):
    config = tiny.experiment(self.root, train={'checkpoint_every': 2})
    self.workdir.mkdir(exist_ok=True)
    return training.train(config, self.workdir, **options)

  def test_a_killed_run_counts_lost_steps_as_restarts(self):
    put, calls = workload_lib.put, []

    def put_or_die(*args):
      calls.append(args)
      if len(calls) == 6:  # step 4 is saved, 5 is not
        raise RuntimeError('killed')
      return put(*args)

    with mock.patch.object(workload_lib, 'put', put_or_die):
      with self.assertRaisesRegex(RuntimeError, 'killed'):
        self.train()
    before = self.lines()[-1]
    outcome = self.train()
    seconds = outcome.seconds
    for part in ('steps', 'start', 'compile', 'checkpoints', 'evaluation'):
      self.assertGreater(seconds[part], 0, part)
    self.assertGreater(seconds['restarts'], 0)
    self.assertLess(
      seconds['restarts'], before['seconds/steps'] + before['seconds/input']
    )
    after = self.lines()[-1]
    self.assertEqual(after['step'], 6)
    self.assertBetween(after['goodput'], 0.0, 1.0)
    self.assertAlmostEqual(after['seconds/restarts'], seconds['restarts'], 3)

  def test_profiles_steps_and_the_report_links_them(self):
    config = tiny.experiment(self.root)
    training.run(config, self.workdir, profile='2:3')
    (folder,) = profiling.find(self.workdir)
    self.assertEqual(folder, self.workdir / 'profile' / 'steps_2_3')
    (trace,) = folder.glob('plugins/profile/*/*.xplane.pb')
    found = jax.profiler.ProfileData.from_file(str(trace))
    steps = {
      dict(event.stats)['step_num']
      for plane in found.planes
      for line in plane.lines
      for event in line.events
      if event.name == 'train'
    }
    self.assertEqual(steps, {2, 3})
    report = (self.workdir / 'report.md').read_text()
    self.assertIn('[steps_2_3](profile/steps_2_3)', report)
    self.assertIn(goodput.PARTS['profile'], report)
    summary = json.loads((self.workdir / 'summary.json').read_text())
    self.assertBetween(summary['goodput'], 0.0, 1.0)
    self.assertGreater(summary['tokens_per_second_per_chip'], 0)

  def test_a_profile_that_fails_is_reported(self):
    error = RuntimeError('Profile has already been started.\nmore')
    with (
      mock.patch.object(jax.profiler, 'start_trace', side_effect=error),
      mock.patch.object(metrics.RunLog, 'say') as say,
    ):
      self.train(profile=profiling.Steps(1, 2))
    said = [call.args[0] for call in say.call_args_list]
    self.assertIn(
      'WARNING: no profile is written: Profile has already been started.', said
    )

  @parameterized.parameters('3', '0:4', '5:4', 'a:b', '1:2:3', '-1:2', '')
  def test_refuses_what_is_no_range(self, text):
    with self.assertRaisesRegex(errors.UserError, 'must be START:STOP'):
      profiling.parse(text)

  def test_refuses_steps_after_the_last(self):
    with self.assertRaisesRegex(
      errors.UserError, r'--profile=3:9 ends after the last .*num_steps=6'
    ):
      self.train(profile=profiling.Steps(3, 9))
