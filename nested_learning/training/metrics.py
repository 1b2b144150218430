"""Reports the numbers of a run: progress bar, JSON lines, TensorBoard.

Metrics never stop a run: a file that cannot be written is reported once, and
the run continues without it.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import math
import os
import pathlib
import sys
import time
from typing import Any, TypeVar

import jax
from tensorboardX import event_file_writer
from tensorboardX import summary as summary_lib
from tensorboardX.proto import event_pb2
import tqdm

from nested_learning import errors
from nested_learning import files
from nested_learning.training import config as config_lib
from nested_learning.training import goodput
from nested_learning.training import optimizer
from nested_learning.training import workload as workload_lib

T = TypeVar('T')

_FLUSH_SECONDS = 60  # longest delay of what TensorBoard shows
_STALL_SHARE = 0.1  # of the time of steps, in waiting for batches
_STALL_SECONDS = 0.1  # per step: less is no reason to say anything


class RunLog:
  """Reports a run's numbers, one step late.

  The numbers of a step are fetched when the next step is already under way, so
  that reporting does not keep the device waiting. Process 0 alone writes.

  Attributes:
    ledger: Accounts for the time of the run.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    config: config_lib.ExperimentConfig,
    *,
    start: int = 0,
    ledger: goodput.Ledger | None = None,
    chips: goodput.Chips | None = None,
  ):
    """Opens the files of a run; drops their lines after the step `start`.

    Args:
      workdir: The run's folder.
      config: The experiment.
      start: Steps taken so far.
      ledger: Time spent so far; from here on it is spent in steps.
      chips: Chips of the run; one of an unknown kind by default.
    """
    self.ledger = ledger or goodput.Ledger()
    self.ledger.enter('steps')
    self._chips = chips or goodput.Chips(1)
    self._config = config
    self._schedule = optimizer.make_schedule(config.train)
    self._deferred = None
    self._ends = goodput.StepEnds(self.ledger.clock)
    self._window = self._mark(start)  # of the last line
    self._is_stalled = False
    self._start = self._step = start
    self._writes = jax.process_index() == 0
    self._bar = tqdm.tqdm(
      total=config.train.num_steps,
      initial=start,
      desc=config.name,
      unit='step',
      disable=not self._writes,
      mininterval=0.2 if sys.stderr.isatty() else 10,
      dynamic_ncols=True,
    )
    self._writers: dict[str, _Lines | _Board] = {}
    if self._writes:
      for name, writer in (('metrics.jsonl', _Lines), ('tensorboard', _Board)):
        with self._dropping(name):
          self._writers[name] = writer(workdir / name, start)

  def __enter__(self) -> 'RunLog':
    return self

  def __exit__(self, *_):
    self._bar.close()
    self._ends.close()
    if self._step > self._start:  # a run that took no step can be done again
      self.write_ledger()
    self._each(lambda writer: writer.close())

  def _each(self, act: Callable[['_Lines | _Board'], None]) -> None:
    """Does something with every writer that still works."""
    for name, writer in list(self._writers.items()):
      with self._dropping(name):
        act(writer)

  @contextlib.contextmanager
  def _dropping(self, name: str) -> Iterator[None]:
    """Reports an error of a writer, and drops it."""
    try:
      yield
    except (OSError, errors.UserError) as error:
      self._writers.pop(name, None)
      reason = getattr(error, 'strerror', None) or error
      self.say(f'WARNING: {name} is no longer written: {reason}.')

  def defer(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Takes the numbers of a step that was just started; reports those before.

    Args:
      step: The step, from 1.
      metrics: Its numbers, float32 scalars that may not be there yet.
    """
    self._ends.put(step, metrics['loss'])
    self._report_deferred()
    self._deferred = step, metrics

  def flush(self) -> None:
    """Waits for the numbers of the step last deferred, and reports them.

    All lines written so far survive the process.

    Raises:
      FloatingPointError: The step was skipped, and so were train.max_skipped
        steps before it.
    """
    self._report_deferred()
    self._each(lambda writer: writer.flush())

  def _report_deferred(self) -> None:
    if self._deferred is not None:
      (step, metrics), self._deferred = self._deferred, None
      metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
      self._report(step, metrics)

  def await_batch(self, make: Callable[[], T]) -> T:
    """Makes the batch of the next step, and accounts for the wait.

    Args:
      make: Returns the batch. Its time counts as waiting from when the devices
        have finished the step before.
    """
    begin = self.ledger.clock()
    batch = make()
    if self._deferred is None:  # no step is under way
      idle = self.ledger.clock() - begin
    else:
      idle = self._ends.idle_seconds(self._deferred[0], begin)
    self.ledger.move_to_input(idle)
    return batch

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes one line of metrics."""
    self._each(lambda writer: writer.write(step, metrics))

  def write_evaluation(
    self, step: int, evaluated: workload_lib.EvaluationResult
  ) -> None:
    """Writes and shows the numbers of an evaluation."""
    numbers = evaluated.numbers
    self.write(step, {f'validation/{k}': v for k, v in numbers.items()})
    self.say(f'step {step}: {evaluated.sentence}')

  def say(self, text: str) -> None:
    """Prints a line above the progress bar."""
    if self._writes:
      with contextlib.suppress(OSError):  # a terminal that was closed
        self._bar.write(text, file=sys.stderr)

  def write_ledger(self) -> None:
    """Writes a line with the time so far, at the step last reported."""
    self.write(self._step, self.ledger.numbers())

  def _mark(self, step: int) -> tuple[int, float, float]:
    """Returns a step, the seconds in training and those without batches."""
    return step, self.ledger.train_seconds, self.ledger.seconds['input']

  def _speed(self) -> dict[str, float]:
    """Returns the numbers of the steps since the last line; names a stall."""
    before, self._window = self._window, self._mark(self._step)
    steps, seconds, waited = (
      now - then for now, then in zip(self._window, before, strict=True)
    )
    is_stalled = (
      waited > _STALL_SHARE * seconds and waited > _STALL_SECONDS * steps
    )
    if is_stalled and not self._is_stalled:
      self.say(
        f'step {self._step}: {waited / seconds:.0%} of the time of the last '
        f'{steps} steps went by waiting for batches, {waited / steps:.2f} '
        'seconds each; text that launch/prepare.py has made into tokens, on a '
        'disk of this machine, is read fastest.'
      )
    self._is_stalled = is_stalled
    rate = steps * self._config.batch_tokens / seconds if seconds else 0.0
    return {'tokens_per_second': rate, **self._chips.numbers(rate)}

  def _report(self, step: int, metrics: Mapping[str, float]) -> None:
    metrics = dict(metrics)
    in_a_row = int(metrics.pop('skipped_in_a_row'))
    if in_a_row:
      self._report_skipped(step, metrics, in_a_row)
    with contextlib.suppress(OSError):  # a terminal that was closed
      self._bar.update(step - self._step)
    self._step = step
    train = self._config.train
    if step % train.log_every == 0 or step == train.num_steps:
      speed = self._speed()
      # Skipped steps do not move the schedule.
      num_taken = step - int(metrics['skipped'])
      learning_rate = float(self._schedule(max(num_taken - 1, 0)))
      self.write(
        step,
        {
          **metrics,
          'learning_rate': learning_rate,
          **speed,
          **self.ledger.numbers(),
        },
      )
      skipped = int(metrics['skipped'])
      skips = f', {skipped} skipped' if skipped else ''
      self._bar.set_postfix_str(
        f'loss {metrics["loss"]:.3f}, {speed["tokens_per_second"]:,.0f} '
        f'tokens/s{skips}',
        refresh=False,
      )

  def _report_skipped(
    self, step: int, metrics: Mapping[str, float], in_a_row: int
  ) -> None:
    """Reports why a step was skipped; raises if it was one too many."""
    train = self._config.train
    for name in ('loss', 'gradient_norm'):
      if not math.isfinite(metrics[name]):
        reason = f'{name} is {metrics[name]} at step {step}'
        break
    else:
      reason = (
        f'gradient_norm is {metrics["gradient_norm"]:.4g} at step {step}, '
        f'above train.spike_factor={train.spike_factor} times the usual'
      )
    if in_a_row > train.max_skipped:
      if train.max_skipped:
        reason += (
          f', and {train.max_skipped} steps before it were skipped '
          '(train.max_skipped)'
        )
      raise FloatingPointError(reason)
    self.say(f'{reason}: skipped ({in_a_row} in a row).')


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads a metrics.jsonl.

  Args:
    path: The file; it may be missing.

  Returns:
    Its lines, except those that are no objects with a step, such as the last
    line of a process that died while it was writing.
  """
  lines = []
  if path.exists():
    text = path.read_text(encoding='utf-8', errors='replace')
    for line in text.splitlines():
      try:
        value = json.loads(line)
      except (ValueError, RecursionError):
        continue
      if isinstance(value, dict) and isinstance(value.get('step'), int):
        lines.append(value)
  return lines


class _Lines:
  """Appends lines to a metrics.jsonl."""

  def __init__(self, path: pathlib.Path, start: int):
    """Opens the file; drops the lines that come after the step `start`."""
    if path.exists():
      kept = [line for line in read_metrics(path) if line['step'] <= start]
      files.write_whole(path, ''.join(json.dumps(x) + '\n' for x in kept))
    self._file = path.open('a', encoding='utf-8')

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    numbers = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
    line = {'step': step, 'time': round(time.time(), 3), **numbers}
    self._file.write(json.dumps(line) + '\n')
    self._file.flush()

  def flush(self) -> None:
    os.fsync(self._file.fileno())  # a mounted bucket keeps a file only then

  def close(self) -> None:
    self._file.close()


class _Board:
  """Writes scalars for TensorBoard.

  Not with tensorboardX's SummaryWriter: its thread ends at the first error, and
  then `add_scalar` waits for it for ever.
  """

  def __init__(self, path: pathlib.Path, start: int):
    path.mkdir(parents=True, exist_ok=True)
    self._file = event_file_writer.EventsWriter(str(path / 'events'))
    # TensorBoard drops what an earlier process wrote from this step on.
    begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._event(step=start + 1, session_log=begin)
    self._flushed = time.monotonic()

  def _event(self, **fields) -> None:
    self._file.write_event(event_pb2.Event(wall_time=time.time(), **fields))

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
      self._event(step=step, summary=summary_lib.scalar(name, value))
    if time.monotonic() - self._flushed > _FLUSH_SECONDS:
      self.flush()

  def flush(self) -> None:
    self._file.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    self._file.close()
