"""Times compiled functions on one machine, for ratios within one run."""

from collections.abc import Callable, Mapping
import resource
import time
from typing import Any

import jax
import numpy as np


def work_time() -> float:
  """Returns the seconds that this process has worked so far, on all cores.

  System time, for instance to clear fresh memory, does not count.
  """
  return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def fastest(
  functions: Mapping[Any, tuple[Any, ...]],
  repeats: int,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, float]:
  """Measures the fastest run of each function.

  The functions take turns, so that a change of the machine's speed affects all
  of them alike.

  Args:
    functions: By name, a function and its arguments.
    repeats: Timed calls of each, after one that compiles.
    clock: Function that returns seconds.

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
