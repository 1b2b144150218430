"""Where the numbers of a run go: progress bar, JSON lines, TensorBoard."""

from collections.abc import Mapping
import json
import math
import os
import pathlib
import sys
import time
from typing import Any

import jax
import tensorboardX
import tqdm

from nested_learning.training import config as config_lib
from nested_learning.training import optimizer
from nested_learning.training import subject as subject_lib


class RunLog:
  """Reports a run's numbers, one step late.

  The numbers of a step are fetched when the next step is already under way, so
  that reporting does not keep the device waiting. Process 0 alone writes.

  Attributes:
    train_seconds: Time in training steps, without compilation, evaluation and
      checkpoints; runs that were resumed count from their first step.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    config: config_lib.ExperimentConfig,
    *,
    start: int = 0,
    train_seconds: float = 0.0,
  ):
    self.train_seconds = train_seconds
    self._config = config
    self._schedule = optimizer.make_schedule(config.train)
    self._deferred = None
    self._tick = time.perf_counter()
    self._window = (start, train_seconds)  # step and time of the last line
    self._step = start
    self._writes = jax.process_index() == 0
    if self._writes:
      path = workdir / 'metrics.jsonl'
      _drop_lines_after(path, start)
      self._lines = path.open('a', encoding='utf-8')
      self._board = tensorboardX.SummaryWriter(
        str(workdir / 'tensorboard'), purge_step=start + 1
      )
    self._bar = tqdm.tqdm(
      total=config.train.num_steps,
      initial=start,
      desc=config.name,
      unit='step',
      disable=not self._writes,
      mininterval=0.2 if sys.stderr.isatty() else 10,
      dynamic_ncols=True,
    )

  def __enter__(self) -> 'RunLog':
    return self

  def __exit__(self, *_):
    self._bar.close()
    if self._writes:
      self._lines.close()
      self._board.close()

  def defer(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Takes the numbers of a step that was just started; reports the last."""
    self._report_deferred()
    self._deferred = step, metrics

  def flush(self) -> None:
    """Waits for the numbers of the step last deferred, and reports them.

    What was written until now stays, whatever happens to the process: a bucket
    that is mounted keeps a file only when it is asked to.

    Raises:
      FloatingPointError: It was left out, and so were as many before it as may
        be (train.max_skipped).
    """
    self._report_deferred()
    if self._writes:
      os.fsync(self._lines.fileno())

  def _report_deferred(self) -> None:
    if self._deferred is not None:
      (step, metrics), self._deferred = self._deferred, None
      metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
      now = time.perf_counter()
      self.train_seconds += now - self._tick
      self._tick = now
      self._report(step, metrics)

  def resume_clock(self) -> None:
    """Leaves out of the time in training whatever happened since `flush`."""
    self._tick = time.perf_counter()

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes one line of metrics."""
    if self._writes:
      line = {'step': step, **{k: _finite(v) for k, v in metrics.items()}}
      self._lines.write(json.dumps(line) + '\n')
      self._lines.flush()
      for name, value in metrics.items():
        self._board.add_scalar(name, value, step)

  def write_evaluation(
    self, step: int, evaluated: subject_lib.Evaluated
  ) -> None:
    """Writes and shows what the validation split gave."""
    numbers = evaluated.numbers
    self.write(step, {f'validation/{k}': v for k, v in numbers.items()})
    self.say(f'step {step}: {evaluated.sentence}')

  def say(self, text: str) -> None:
    """Prints a line above the progress bar."""
    if self._writes:
      self._bar.write(text, file=sys.stderr)

  def _rate(self, since: tuple[int, float]) -> float:
    steps, seconds = self._step - since[0], self.train_seconds - since[1]
    return steps * self._config.batch_tokens / seconds if seconds else 0.0

  def _report(self, step: int, metrics: Mapping[str, float]) -> None:
    metrics = dict(metrics)
    in_a_row = int(metrics.pop('skipped_in_a_row'))
    if in_a_row:
      self._report_skipped(step, metrics, in_a_row)
    self._bar.update(step - self._step)
    self._step = step
    train = self._config.train
    if step % train.log_every == 0 or step == train.num_steps:
      rate = self._rate(self._window)
      self._window = step, self.train_seconds
      # Those that were left out have not moved the schedule.
      num_taken = step - int(metrics['skipped'])
      learning_rate = float(self._schedule(max(num_taken - 1, 0)))
      self.write(
        step,
        {**metrics, 'learning_rate': learning_rate, 'tokens_per_second': rate},
      )
      skipped = int(metrics['skipped'])
      left_out = f', {skipped} left out' if skipped else ''
      self._bar.set_postfix_str(
        f'loss {metrics["loss"]:.3f}, {rate:,.0f} tokens/s{left_out}',
        refresh=False,
      )

  def _report_skipped(
    self, step: int, metrics: Mapping[str, float], in_a_row: int
  ) -> None:
    """Says why a step was left out; raises if it was one too many."""
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
          f', and {train.max_skipped} steps before it were left out '
          '(train.max_skipped)'
        )
      raise FloatingPointError(reason)
    self.say(f'{reason}: left out ({in_a_row} in a row).')


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl, without one that was cut off."""
  lines = []
  if path.exists():
    for line in path.read_text(encoding='utf-8').splitlines():
      try:
        lines.append(json.loads(line))
      except json.JSONDecodeError:
        continue  # the process died while it was writing this line
  return lines


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
  """Drops what a run that was cut off wrote after its last checkpoint."""
  if path.exists():
    lines = [line for line in read_metrics(path) if line['step'] <= step]
    kept = path.with_suffix('.tmp')  # whole, whenever the process is killed
    kept.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    kept.replace(path)


def _finite(value: float) -> float | None:
  return value if math.isfinite(value) else None
