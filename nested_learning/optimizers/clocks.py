"""Computes how often each level updates, and on which steps."""

from collections.abc import Sequence
import math
import numbers
from typing import Any

from nested_learning.optimizers import settings

# Phases are searched among the last so many steps of a period. Only residues
# modulo the other periods matter, so more candidates would bring nothing.
_NUM_PHASES = 4096


def make_periods(
  levels: Sequence[Any], tokens_per_step: int | None
) -> dict[str, int]:
  """Counts the steps between two updates of each level.

  Args:
    levels: Objects with a `name` and a clock `every`.
    tokens_per_step: Tokens of a step, or None if clocks are in steps.

  Returns:
    Steps by name of level.

  Raises:
    ValueError: If there are no levels, two levels have one name, or a clock is
      not a whole number of steps.
  """
  if not levels:
    raise ValueError('levels is empty: give at least one Level.')
  if tokens_per_step is not None and tokens_per_step < 1:
    raise ValueError(
      f'{tokens_per_step=} must be at least 1, or None to count in steps.'
    )
  periods = {}
  for level in levels:
    name, every = level.name, level.every
    if name in periods:
      raise ValueError(f'Two levels are named {name!r}: rename or join them.')
    if not isinstance(every, numbers.Integral) or every < 1:
      raise ValueError(
        f'Level {name!r}: {every=} must be a whole number of at least 1.'
      )
    unit = tokens_per_step or 1
    if every % unit:
      lower = max(unit, every // unit * unit)
      raise ValueError(
        f'Level {name!r}: {every=} is not a multiple of {tokens_per_step=}; '
        f'set every to {lower} or {lower + unit}, or change the tokens per '
        'step (batch size x sequence length).'
      )
    periods[name] = every // unit
  return periods


def make_phases(periods: Sequence[int], name: str) -> tuple[int, ...]:
  """Chooses the update step of every period; see `multi_timescale`.

  Args:
    periods: Steps between two updates, by level.
    name: 'staggered' or 'aligned'.

  Returns:
    For each period, the residue of its update steps.

  Raises:
    ValueError: If the name is unknown.
  """
  settings.check_choice(('aligned', 'staggered'), phases=name)
  if name == 'aligned':
    return tuple(period - 1 for period in periods)
  chosen = []  # (period, phase)
  for period in periods:
    others = [(p, phase) for p, phase in chosen if p > 1]
    candidates = range(period - 1, max(-1, period - 1 - _NUM_PHASES), -1)
    shares = {
      phase: _share_of_meetings(period, phase, others) for phase in candidates
    }
    chosen.append((period, min(shares, key=shares.get)))
  return tuple(phase for _, phase in chosen)


def _share_of_meetings(period, phase, others) -> float:
  """Returns the share of a level's updates that fall on those of others."""
  # phase + m period and phase' + n period' meet iff the phases agree modulo
  # the greatest common divisor; one update in period' / gcd then does.
  divisors = [math.gcd(period, p) for p, _ in others]
  return sum(
    divisor / p
    for divisor, (p, other_phase) in zip(divisors, others, strict=True)
    if (phase - other_phase) % divisor == 0
  )
