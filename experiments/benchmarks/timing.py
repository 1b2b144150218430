"""Timing of compiled functions on one machine, for ratios of one run."""

from collections.abc import Callable, Mapping
import resource
import time
from typing import Any

import jax
import numpy as np


def work_time() -> float:
  """Seconds of this program's own work so far, on all cores.

  What the system does for it, such as to clear fresh memory, does not count.
  """
  return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def fastest(
  functions: Mapping[Any, tuple[Any, ...]],
  repeats: int,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, float]:
  """Fastest seconds of each function, their repeats taken in turn.

  Args:
    functions: By name, a function and its arguments. Taking turns lets a change
      of the machine's speed fall on all alike.
    repeats: Counted calls of each, after one that compiles.
    clock: In seconds.

  Returns:
    Seconds by name.
  """
  seconds = {name: [] for name in functions}
  for repeat in range(repeats + 1):
    for name, (function, *args) in functions.items():
      start = clock()
      jax.block_until_ready(function(*args))
      if repeat:  # the first call compiles
        seconds[name].append(clock() - start)
  return {name: float(np.min(values)) for name, values in seconds.items()}
