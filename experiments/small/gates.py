"""What the suite is to show, as lines that pass or fail."""

from collections.abc import Sequence
from typing import NamedTuple


class Gate(NamedTuple):
  """A bound that a model has to keep on a task, with every seed.

  Attributes:
    task: Of the suite.
    family: Of the zoo.
    key: Of a run's summary.json.
    at_least: The value must not be below it.
    below: The value must be below it.
  """

  task: str
  family: str
  key: str
  at_least: float = float('-inf')
  below: float = float('inf')

  def judge(self, values: Sequence[float]) -> bool | None:
    """Whether all values pass; None where there are none."""
    if not values:
      return None
    return all(self.at_least <= value < self.below for value in values)


_SOLVED = 0.95

GATES = (
  # A sum of writes does not replace a value.
  Gate('mqar', 'linear_attention', 'all_right', below=0.5),
  Gate('mqar', 'deltanet', 'accuracy', at_least=_SOLVED),
  Gate('mqar', 'gated_deltanet', 'accuracy', at_least=_SOLVED),
  Gate('mqar', 'titans', 'accuracy', at_least=_SOLVED),
  Gate('mqar', 'hope', 'accuracy', at_least=_SOLVED),
  # One layer's state has to change its sign, or be read non-linearly.
  Gate('parity', 'hope', 'all_right_2x', at_least=_SOLVED),
  Gate('parity', 'transformer', 'all_right_2x', below=_SOLVED),
  Gate('parity', 'linear_attention', 'all_right_2x', below=_SOLVED),
  Gate('aa', 'hope', 'all_right_2x', at_least=_SOLVED),
  Gate('aa', 'transformer', 'all_right_2x', below=_SOLVED),
  Gate('aa', 'linear_attention', 'all_right_2x', below=_SOLVED),
  # What was read stays, however much hay follows.
  Gate('s_niah_1', 'hope', 'all_right_8x', at_least=_SOLVED),
)
