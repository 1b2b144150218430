"""Profiles some steps of a run with JAX's profiler."""

from collections.abc import Iterator
import contextlib
import pathlib
import re
from typing import Any, NamedTuple

import jax

from nested_learning import errors
from nested_learning.training import metrics as metrics_lib

FOLDER = 'profile'  # inside of the run's


class Steps(NamedTuple):
  """The steps to profile, from 1; both ends are included."""

  start: int
  stop: int


def parse(text: str) -> Steps:
  """Parses START:STOP.

  Raises:
    errors.UserError: It is no range of steps.
  """
  match = re.fullmatch(r'(\d{1,12}):(\d{1,12})', text)
  steps = Steps(int(match[1]), int(match[2])) if match else Steps(0, 0)
  if not 1 <= steps.start <= steps.stop:
    raise errors.UserError(
      f'--profile={text} must be START:STOP, the first and the last step to '
      'profile, counted from 1, as in --profile=20:24.'
    )
  return steps


def check(steps: Steps, num_steps: int) -> None:
  """Raises a UserError if a run has no such steps."""
  if steps.stop > num_steps:
    raise errors.UserError(
      f'--profile={steps.start}:{steps.stop} ends after the last step, '
      f'train.num_steps={num_steps}; choose earlier steps.'
    )


class Profiler:
  """Writes a profile of some steps; process 0 alone does.

  Like metrics, a profile never stops a run: an error is reported.
  """

  def __init__(
    self,
    steps: Steps | None,
    workdir: pathlib.Path,
    log: metrics_lib.RunLog,
    *,
    start: int = 0,
  ):
    self._steps = steps if jax.process_index() == 0 else None
    if self._steps and self._steps.stop <= start:
      log.say(f'No profile: step {self._steps.stop} is already taken.')
    self._folder = workdir / FOLDER
    self._log = log
    self._begun: int | None = None  # first step of the profile

  def __enter__(self) -> 'Profiler':
    return self

  def __exit__(self, *_):
    if self._begun is not None:  # the run ends inside of the steps
      self._stop(self._begun)

  @contextlib.contextmanager
  def step(self, step: int) -> Iterator[None]:
    """Profiles the step taken inside, if it is one of those to profile."""
    steps = self._steps
    if steps and steps.start <= step <= steps.stop and self._begun is None:
      self._start(step)
    with jax.profiler.StepTraceAnnotation('train', step_num=step):
      yield

  def finish(self, step: int, outputs: Any) -> None:
    """Writes the profile after its last step, once that has ended."""
    if self._begun is not None and step == self._steps.stop:
      jax.block_until_ready(outputs)
      self._stop(step)

  def _start(self, step: int) -> None:
    with self._reporting():
      jax.profiler.start_trace(
        self._folder / f'steps_{step}_{self._steps.stop}'
      )
      self._begun = step

  def _stop(self, step: int) -> None:
    self._begun = None
    with self._reporting():
      jax.profiler.stop_trace()
      self._log.say(f'step {step}: wrote the profile to {self._folder}.')

  @contextlib.contextmanager
  def _reporting(self) -> Iterator[None]:
    """Reports an error and gives up; accounts for the time."""
    self._log.ledger.enter('profile')
    try:
      yield
    except (OSError, RuntimeError, ValueError) as error:
      self._steps = None
      reason = str(error).strip().splitlines()[0].rstrip('.')
      self._log.say(f'WARNING: no profile is written: {reason}.')
    self._log.ledger.enter('steps')


def find(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folders of a run's profiles, each of some steps."""
  traces = (workdir / FOLDER).glob('*/plugins/profile/*/*.xplane.pb')
  return sorted({path.parents[3] for path in traces})
