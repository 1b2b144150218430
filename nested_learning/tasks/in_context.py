"""Tasks that are learned in context: associative recall and regression.

References:
  Arora et al., Zoology, arXiv:2312.04927, 2023, section 3 and appendix
    (multi-query associative recall, the law of the queries' places).
  Arora et al., Based, arXiv:2402.18668, 2024 (the mixture of lengths).
  Garg et al., What Can Transformers Learn In-Context?, arXiv:2208.01066, 2022,
    section 3 (linear functions, the row).
"""

import dataclasses
from typing import Literal

import numpy as np

from nested_learning import errors
from nested_learning.tasks import task

# Zoology's power a of the law i^(a - 1) of the queries' places.
_POWER = 0.01


@dataclasses.dataclass(frozen=True)
class MqarConfig:
  """Multi-query associative recall, with keys that may be written again.

  A row is `num_pairs + num_rewrites` pairs of a key and a value, then slots of
  two tokens. Every key is asked for once, at the first token of a slot. Slots
  are drawn without replacement with probability proportional to i^-0.99,
  so most queries follow soon after the pairs. The target is the key's last
  value, which is not among the inputs. The remaining tokens are 0, or random.
  """

  vocab_size: int = 8192  # keys 1 to V/2 - 1, values V/2 to V - 1, 0 is blank
  num_tokens: int = 64  # of a row; even
  num_pairs: int = 4  # keys, all different
  num_rewrites: int = 0  # pairs that replace a key's value
  random_filler: bool = True  # tokens between queries; False leaves them 0

  def __post_init__(self):
    task.check_at_least(self, 1, 'num_pairs')
    task.check_at_least(self, 0, 'num_rewrites')
    num_keys, num_values = self.vocab_size // 2 - 1, self.vocab_size // 2
    errors.check_field(
      self,
      'num_pairs',
      self.num_pairs <= num_keys,
      f'at most the {num_keys} keys that vocab_size={self.vocab_size} has',
    )
    errors.check_field(
      self,
      'num_rewrites',
      self.num_writes <= num_values,
      f'at most {num_values - self.num_pairs}: every pair has its own of the '
      f'{num_values} values that vocab_size={self.vocab_size} has',
    )
    needed = 2 * (self.num_writes + self.num_pairs)
    errors.check_field(
      self,
      'num_tokens',
      self.num_tokens >= needed and self.num_tokens % 2 == 0,
      f'even and at least {needed}: two tokens for each of {self.num_writes} '
      f'pairs and {self.num_pairs} queries',
    )

  @property
  def num_writes(self) -> int:
    """Number of pairs at the start of a row."""
    return self.num_pairs + self.num_rewrites

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task.make_row`."""
    del evaluating
    num_keys, half = self.num_pairs, self.vocab_size // 2
    keys = 1 + rng.choice(half - 1, num_keys, replace=False)
    values = half + rng.choice(half, self.num_writes, replace=False)
    written = np.arange(self.num_writes)  # number of each pair's key
    if self.num_rewrites:
      written[num_keys:] = rng.integers(num_keys, size=self.num_rewrites)
      rng.shuffle(written)
    answers = np.zeros(num_keys, np.int64)
    answers[written] = values  # NumPy keeps the last of equal indices

    num_context = 2 * self.num_writes
    num_slots = (self.num_tokens - num_context) // 2
    # The n largest of log p + Gumbel noise, in order, are a draw without
    # replacement with probabilities p (Efraimidis and Spirakis, 2006).
    noise = rng.gumbel(size=num_slots)
    noise += (_POWER - 1) * np.log(np.arange(1, num_slots + 1))
    slots = np.argsort(-noise)[:num_keys]
    queries = num_context + 2 * slots

    tokens = np.zeros(self.num_tokens, np.int32)
    if self.random_filler:
      tokens[:] = rng.integers(self.vocab_size, size=self.num_tokens)
    tokens[0:num_context:2] = keys[written]
    tokens[1:num_context:2] = values
    tokens[queries] = keys
    targets = np.zeros(self.num_tokens, np.int32)
    targets[queries] = answers
    mask = np.zeros(self.num_tokens, bool)
    mask[queries] = True
    return task.Row(tokens, targets, mask)

  def stretched(self, factor):
    """Returns the task with more slots, as many pairs and queries."""
    return dataclasses.replace(self, num_tokens=factor * self.num_tokens)


@dataclasses.dataclass(frozen=True)
class AliasesConfig:
  """Recall by an alias: names get values and aliases, aliases get aliases.

  A row is pairs of two tokens, then every name and alias once, in any order,
  each before a blank. The target at a name is its value, and at an alias the
  value of its name. `order` says which pairs come first; those of one rank are
  shuffled. In evaluation only the last alias of every chain counts.
  """

  vocab_size: int = 66  # names 1 to V/2 - 1, values V/2 to V - 1, 0 is blank
  num_chains: int = 4  # names with a value
  num_hops: int = 1  # aliases of each, every one of the one before it
  # Values, then first aliases, and so on; or last aliases, the ones before
  # them, and so on, then values.
  order: Literal['values_first', 'values_last', 'backwards'] = 'values_first'

  def __post_init__(self):
    errors.check_choices(self)
    task.check_at_least(self, 1, 'num_chains')
    task.check_at_least(self, 0, 'num_hops')
    num_names = self.vocab_size // 2 - 1
    errors.check_field(
      self,
      'num_chains',
      self.num_pairs <= num_names,
      f'at most {num_names // (1 + self.num_hops)}, of {1 + self.num_hops} '
      f'names each: vocab_size={self.vocab_size} has {num_names} names',
    )

  @property
  def num_pairs(self) -> int:
    """Number of pairs, and of queries."""
    return self.num_chains * (1 + self.num_hops)

  @property
  def num_tokens(self) -> int:
    """Length of a row, two tokens for each pair and query."""
    return 4 * self.num_pairs

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task.make_row`."""
    half, count = self.vocab_size // 2, self.num_chains
    values = half + rng.choice(half, count, replace=False)
    names = 1 + rng.choice(half - 1, self.num_pairs, replace=False)
    names = names.reshape(-1, count)  # [hop, chain]
    stands_for = np.concatenate([values[None], names[:-1]])
    ranks = list(range(1 + self.num_hops))
    if self.order == 'values_last':
      ranks = [*ranks[1:], 0]
    elif self.order == 'backwards':
      ranks.reverse()
    pairs = [
      np.stack([names[i], stands_for[i]], axis=1)[rng.permutation(count)]
      for i in ranks
    ]
    asked = rng.permutation(self.num_pairs)
    hops, chains = np.divmod(asked, count)
    tokens, targets = np.zeros((2, self.num_tokens), np.int32)
    mask = np.zeros(self.num_tokens, bool)
    queries = 2 * self.num_pairs + 2 * np.arange(self.num_pairs)
    tokens[: 2 * self.num_pairs] = np.concatenate(pairs).ravel()
    tokens[queries] = names.ravel()[asked]
    targets[queries] = values[chains]
    mask[queries] = (hops == self.num_hops) | (not evaluating)
    return task.Row(tokens, targets, mask)

  def stretched(self, factor):
    """Returns the task with more aliases of each name."""
    hops = factor * (1 + self.num_hops) - 1
    return dataclasses.replace(self, num_hops=hops)


@dataclasses.dataclass(frozen=True)
class RegressionConfig:
  """Linear regression: points x_1, y_1, x_2, ... with y = w x, w and x normal.

  A point is two tokens of `num_dims` numbers: x, then y as the first number.
  The target at x is y. w is drawn anew for every row.
  """

  num_dims: int = 20  # of x
  num_points: int = 41

  def __post_init__(self):
    task.check_at_least(self, 1, 'num_dims', 'num_points')

  @property
  def num_tokens(self) -> int:
    """Length of a row, two tokens per point."""
    return 2 * self.num_points

  @property
  def vocab_size(self) -> int:
    """0, since the inputs are numbers and not ids."""
    return 0

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task.make_row`."""
    del evaluating
    weights = rng.standard_normal(self.num_dims)
    x = rng.standard_normal((self.num_points, self.num_dims))
    y = x @ weights
    tokens = np.zeros((self.num_tokens, self.num_dims), np.float32)
    tokens[0::2] = x
    tokens[1::2, 0] = y
    targets = np.zeros(self.num_tokens, np.float32)
    targets[0::2] = y
    return task.Row(tokens, targets, np.arange(self.num_tokens) % 2 == 0)

  def stretched(self, factor):
    """Returns the task with more points."""
    return dataclasses.replace(self, num_points=factor * self.num_points)
