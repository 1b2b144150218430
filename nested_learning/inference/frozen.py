"""The model without its learning, beside a session on the same text."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import errors
from nested_learning import models

_HORIZON = 2048  # tokens over which losses are averaged


class FrozenReader:
  """Reads what a session reads, with levels at rest.

  Where attention has no room for the next call, it begins a new stream, as a
  session does.
  """

  def __init__(self, model: models.Model, params: Any):
    """Begins a stream of one row.

    Args:
      model: From `models.make_model`, without levels that learn.
      params: Its parameters.
    """
    self._params, self._start = params, model.init_state(params, 1)
    self._limit = models.max_stream_length(model.config)
    self._state, self._age, self._logits = self._start, 0, None

    @jax.jit
    def read(params, state, before, tokens, reset):
      logits, state = model.forward(params, state, tokens, reset=reset)
      shifted = jnp.concatenate([before[:, None], logits[:, :-1]], axis=1)
      losses = optax.softmax_cross_entropy_with_integer_labels(shifted, tokens)
      return losses[0], state, logits[:, -1]

    self._read = read
    self._vocab_size = model.config.vocab_size
    self._longest = model.config.max_length

  def losses(self, tokens: np.ndarray, reset: np.ndarray) -> np.ndarray:
    """Returns the loss of each token [t] in nats, NaN at first tokens."""
    cuts = range(self._longest, len(tokens), self._longest)
    parts = zip(np.split(tokens, cuts), np.split(reset, cuts), strict=True)
    return np.concatenate([self._losses(*part) for part in parts])

  def _losses(self, tokens, reset):
    if self._limit is not None and self._age + len(tokens) > self._limit:
      self._state, self._age = self._start, 0
    is_first = self._logits is None
    if is_first:
      self._logits = jnp.zeros((1, self._vocab_size), jnp.float32)
    found, self._state, self._logits = self._read(
      self._params, self._state, self._logits, tokens[None], reset[None]
    )
    self._age += len(tokens)
    unknown = np.array(reset)
    unknown[0] |= is_first
    return np.where(unknown, np.nan, np.asarray(found))


class Guard:
  """Compares the loss of a session with that of the frozen model.

  Attributes:
    tolerance: Share by which the session's loss may be above the other.
  """

  def __init__(self, tolerance: float):
    self.tolerance = tolerance
    self._sums = np.zeros(3)  # tokens, learned, frozen; all decay

  def add(self, learned: np.ndarray, frozen: np.ndarray) -> None:
    """Takes the losses [t] of the same tokens, NaN in both at first tokens."""
    known = np.isfinite(frozen)
    decay = 0.5 ** (len(learned) / _HORIZON)
    new = known.sum(), learned[known].sum(), frozen[known].sum()
    self._sums = decay * self._sums + np.array(new, np.float64)

  @property
  def excess(self) -> float:
    """Share by which the session's recent loss is above the frozen model's."""
    count, learned, frozen = self._sums
    if not count or frozen <= 0:
      return 0.0
    # Weights that are not finite have losses that are not.
    return learned / frozen - 1 if np.isfinite(learned) else np.inf

  def check(self, name: str) -> None:
    """Checks the losses so far.

    Args:
      name: The text, for the message.

    Raises:
      errors.UserError: Learning has made the session worse.
    """
    if self.excess > self.tolerance:
      raise errors.UserError(
        f'{name}: what the session learned makes it {self.excess:.1%} worse '
        f'than the frozen model (session.guard={self.tolerance}); it is kept '
        'as it was before. Lower inner.levels.all.learning_rate in another '
        '--session, or set session.guard=none.'
      )
