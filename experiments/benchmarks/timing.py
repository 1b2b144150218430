"""Timing of compiled functions on one machine, for ratios of one run."""

from collections.abc import Mapping
import time
from typing import Any

import jax
import numpy as np


def fastest(
  functions: Mapping[Any, tuple[Any, ...]], repeats: int
) -> dict[Any, float]:
  """Fastest seconds of each function, their repeats taken in turn.

  Args:
    functions: By name, a function and its arguments. Taking turns lets a change
      of the machine's speed fall on all alike.
    repeats: Counted calls of each, after one that compiles.

  Returns:
    Seconds by name.
  """
  seconds = {name: [] for name in functions}
  for repeat in range(repeats + 1):
    for name, (function, *args) in functions.items():
      start = time.perf_counter()
      jax.block_until_ready(function(*args))
      if repeat:  # the first call compiles
        seconds[name].append(time.perf_counter() - start)
  return {name: float(np.min(values)) for name, values in seconds.items()}
