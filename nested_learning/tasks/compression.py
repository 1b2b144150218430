"""Compression of the MAD suite: a row from the last state, and nothing else.

References:
  Poli et al., Mechanistic Design and Scaling of Hybrid Architectures,
    arXiv:2403.17844, 2024, section 3 and appendix B (the task and settings).
"""

import dataclasses

import numpy as np

from nested_learning import errors
from nested_learning.tasks import task


@dataclasses.dataclass(frozen=True)
class CompressionConfig:
  """Random tokens and the mark V - 1; the targets are the row itself.

  What is said of any position is said from the output at the last one: the
  model needs `models.CompressionHead`.
  """

  vocab_size: int = 16
  num_tokens: int = 32  # of a row

  def __post_init__(self):
    task.check_at_least(self, 2, 'vocab_size', 'num_tokens')

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task`."""
    del evaluating
    tokens = rng.integers(self.vocab_size - 1, size=self.num_tokens)
    tokens[-1] = self.vocab_size - 1
    tokens = tokens.astype(np.int32)
    return task.Row(tokens, tokens, np.ones(self.num_tokens, bool))

  def stretched(self, factor):
    """There are none: a state is asked for as many positions as it was for."""
    raise errors.UserError(
      f'a model that decompresses {self.num_tokens} tokens says nothing of '
      f'{factor} times as many; set data.longer=() and train at each length.'
    )
