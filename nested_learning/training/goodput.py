"""Accounts for the wall time of a run, and for the use of its chips.

Every second of a run, from its first start on, belongs to one of `PARTS`. The
lines of metrics.jsonl carry the sums, so that they survive the process.
"""

from collections.abc import Callable, Iterable, Mapping
import queue
import threading
import time
from typing import Any, NamedTuple

import jax

from nested_learning import accelerators
from nested_learning import compilation
from nested_learning import parameters
from nested_learning.training import config as config_lib
from nested_learning.training import workload as workload_lib

PREFIX = 'seconds/'  # of the parts, among the metrics
PARTS = {
  'steps': 'steps of training, each counted once',
  'input': 'waiting for batches, with nothing else to do',
  'start': 'starting a process: data, checkpoint, parameters',
  'compile': 'tracing and compiling the step',
  'checkpoints': 'saving',
  'evaluation': 'evaluating',
  'profile': 'starting and writing a profile',
  'restarts': 'steps that were lost with a process and taken again',
  'down': 'between the last line of a process and the start of the next',
}


class Ledger:
  """Adds up the wall time of a run by part; time always belongs to one.

  Attributes:
    clock: Returns seconds, for durations.
  """

  def __init__(
    self,
    clock: Callable[[], float] = time.perf_counter,
    wall: Callable[[], float] = time.time,
  ):
    """Begins with the part 'start'."""
    self.clock = clock
    self._began = wall()
    self._seconds = dict.fromkeys(PARTS, 0.0)
    self._part, self._since = 'start', clock()

  @property
  def seconds(self) -> dict[str, float]:
    """Seconds by part, until now."""
    self.enter(self._part)
    return dict(self._seconds)

  @property
  def train_seconds(self) -> float:
    """Seconds of steps that count, with the waiting for their batches."""
    seconds = self.seconds
    return seconds['steps'] + seconds['input']

  def enter(self, part: str) -> None:
    """Ends the current part and begins another."""
    now = self.clock()
    self._seconds[self._part] += max(now - self._since, 0.0)
    self._part, self._since = part, now

  def move_to_input(self, seconds: float) -> None:
    """Counts seconds of the steps as waiting for batches."""
    self.enter(self._part)
    seconds = min(max(seconds, 0.0), self._seconds['steps'])
    self._seconds['steps'] -= seconds
    self._seconds['input'] += seconds

  def resume(
    self,
    lines: Iterable[Mapping[str, Any]],
    *,
    start: int,
    train_seconds: float,
  ) -> None:
    """Goes on from the sums of the processes before.

    Steps after the checkpoint are lost: their time belongs to 'restarts'. The
    time since the last line belongs to 'down'.

    Args:
      lines: Lines of metrics.jsonl, also those after the checkpoint.
      start: Step of the checkpoint; 0 if there is none.
      train_seconds: The checkpoint's `train_seconds`.
    """
    before = dict.fromkeys(PARTS, 0.0)
    lines = [line for line in lines if parts_of(line) and 'time' in line]
    kept = [parts_of(line)['input'] for line in lines if line['step'] <= start]
    before['input'] = min(kept[-1] if kept else 0.0, train_seconds)
    before['steps'] = train_seconds - before['input']
    if lines:
      last = parts_of(lines[-1])
      lost = last['steps'] + last['input'] - train_seconds
      for part in ('start', 'compile', 'checkpoints', 'evaluation', 'profile'):
        before[part] = last[part]
      before['restarts'] = last['restarts'] + max(lost, 0.0)
      # A checkpoint that is younger than the last line has used some of it.
      gap = self._began - lines[-1]['time'] + min(lost, 0.0)
      before['down'] = last['down'] + max(gap, 0.0)
    for part, seconds in before.items():
      self._seconds[part] += seconds

  def numbers(self) -> dict[str, float]:
    """Returns the metrics: goodput, and the seconds by part."""
    seconds = self.seconds
    return {
      'goodput': goodput(seconds),
      **{PREFIX + k: round(v, 3) for k, v in seconds.items() if v},
    }


def goodput(seconds: Mapping[str, float]) -> float:
  """Returns the share of the wall time that is in steps that count."""
  total = sum(seconds.values())
  return seconds['steps'] / total if total else 0.0


def parts_of(line: Mapping[str, Any]) -> dict[str, float] | None:
  """Returns the seconds by part of a line of metrics; None if it has none."""
  if PREFIX + 'steps' not in line:
    return None
  found = {part: line.get(PREFIX + part, 0.0) for part in PARTS}
  fine = all(isinstance(x, int | float) for x in found.values())
  return found if fine else None


class StepEnds:
  """Notes when steps end on the devices, on a thread of its own.

  The trainer looks at a step's numbers when the next one is under way. To tell
  whether devices waited for a batch it must know when they were done.
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock = clock
    self._steps: queue.SimpleQueue = queue.SimpleQueue()
    self._ended: tuple[int, float] = (-1, 0.0)
    # Ends with the process, also if a device never answers.
    self._thread = threading.Thread(target=self._follow, daemon=True)
    self._thread.start()

  def _follow(self) -> None:
    while (item := self._steps.get()) is not None:
      step, array = item
      try:
        jax.block_until_ready(array)
      except Exception:  # the trainer meets the same error, and reports it
        pass
      self._ended = step, self._clock()

  def put(self, step: int, array: Any) -> None:
    """Takes an array that is ready when the step has ended."""
    self._steps.put((step, array))

  def idle_seconds(self, step: int, since: float) -> float:
    """Returns how long the devices have had nothing to do.

    Args:
      step: The step that they work on, or worked on.
      since: Earlier time is not counted.
    """
    ended, at = self._ended
    return max(self._clock() - max(since, at), 0.0) if ended >= step else 0.0

  def close(self) -> None:
    """Ends the thread."""
    self._steps.put(None)
    self._thread.join(timeout=1)


class Chips(NamedTuple):
  """The work of a step and the chips that do it.

  Attributes:
    number: Number of chips; devices where the kind is not known.
    flops_per_token: FLOPs of the model alone, forward and backward.
    peak: FLOP/s of all chips; None where the kind is not known.
  """

  number: float
  flops_per_token: float = 0.0
  peak: float | None = None

  def numbers(self, rate: float) -> dict[str, float]:
    """Returns tokens/s per chip, and MFU where the peak is known.

    Args:
      rate: Tokens/s of all chips.
    """
    found = {'tokens_per_second_per_chip': rate / self.number}
    if self.peak:
      found['mfu'] = rate * self.flops_per_token / self.peak
    return found


def find_chips(
  config: config_lib.ExperimentConfig,
  workload: workload_lib.Workload,
  mesh: jax.sharding.Mesh,
) -> Chips:
  """Returns the chips of a mesh and the work of a token of the experiment."""
  kind = accelerators.find_kind(mesh.devices.flat[0].device_kind)
  if kind is None:
    return Chips(mesh.size)
  number = mesh.size / kind.devices_per_chip
  flops = model_flops(config, workload.model, workload.row)
  return Chips(number, flops / config.batch_tokens, number * kind.chip.flops)


def model_flops(
  config: config_lib.ExperimentConfig, model: Any, row: workload_lib.RowSpec
) -> int:
  """Counts the FLOPs of a step's matmuls without recomputation.

  The backward pass counts as two forward passes.

  Args:
    config: The experiment.
    model: Its model.
    row: Shape and dtype of a row of each array of a batch.
  """
  params = parameters.abstract(model.table)
  rows = config.micro_batch_size
  shape, dtype = row['tokens']
  tokens = jax.ShapeDtypeStruct((rows, *shape), dtype)
  reset = jax.ShapeDtypeStruct((rows, *row['reset'][0]), bool)
  forward = compilation.matmul_flops(
    lambda params, tokens, reset: model.forward(
      params, None, tokens, reset=reset
    ),
    params,
    tokens,
    reset,
  )
  return 3 * config.train.accumulate * forward
