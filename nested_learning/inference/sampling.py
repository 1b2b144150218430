"""Sampling: a token from logits, and the loop that draws a text."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import errors
from nested_learning import models


class DrawConfig(NamedTuple):
  """Settings of a draw.

  Attributes:
    num_tokens: Largest number of tokens to draw.
    temperature: See `sample`.
    top_k: See `sample`.
    top_p: See `sample`.
    stop_token: The token that ends a row, or several of them; None for none.
    vocab_size: Only tokens below it are drawn; None for all tokens.
  """

  num_tokens: int
  temperature: float = 1.0
  top_k: int | None = None
  top_p: float = 1.0
  stop_token: int | tuple[int, ...] | None = None
  vocab_size: int | None = None

  @property
  def stop_tokens(self) -> tuple[int, ...]:
    """The tokens that end a row."""
    if self.stop_token is None:
      return ()
    one = not isinstance(self.stop_token, tuple)
    return (self.stop_token,) if one else self.stop_token


class Generated(NamedTuple):
  """Generated tokens.

  Attributes:
    tokens: int32 [b, n]; the (first) stop token from a row's end on.
    lengths: int32 [b], tokens of each row before its stop token.
  """

  tokens: jax.Array
  lengths: jax.Array


class _Loop(NamedTuple):
  step: jax.Array  # int32, tokens drawn so far
  logits: jax.Array  # [b, v], of the next token
  state: Any
  tokens: jax.Array  # int32 [b, n]
  running: jax.Array  # bool [b]


def check_sampling(temperature: float, top_k: int | None, top_p: float) -> None:
  """Checks the settings of `sample`.

  Args:
    temperature: See `sample`.
    top_k: See `sample`.
    top_p: See `sample`.

  Raises:
    errors.UserError: If one of them is out of range.
  """
  if not 0 <= temperature < math.inf:
    raise errors.UserError(
      f'{temperature=} must be a number from 0 (greedy) up.'
    )
  if top_k is not None and top_k < 1:
    raise errors.UserError(f'{top_k=} must be at least 1, or None to keep all.')
  if not 0 < top_p <= 1:
    raise errors.UserError(
      f'{top_p=} must be above 0 and at most 1 (keep all).'
    )


def check_draw(config: DrawConfig, vocab_size: int) -> None:
  """Checks the settings of a draw from a model.

  Args:
    config: The settings.
    vocab_size: Tokens of the model.

  Raises:
    errors.UserError: If one of them is out of range.
  """
  check_sampling(config.temperature, config.top_k, config.top_p)
  if config.num_tokens < 1:
    raise errors.UserError(
      f'num_tokens={config.num_tokens} must be at least 1.'
    )
  for stop in config.stop_tokens:
    if not 0 <= stop < vocab_size:
      raise errors.UserError(
        f'stop_token={stop} is not one of the {vocab_size} tokens of the '
        'model; use the tokenizer that the model was trained with.'
      )
  limit = config.vocab_size
  if limit is not None and not 1 <= limit <= vocab_size:
    raise errors.UserError(
      f'vocab_size={limit} must be at least 1 and at most the {vocab_size} '
      'tokens of the model; use the tokenizer that it was trained with.'
    )


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
  """Sets all but the k largest logits to minus infinity.

  Args:
    logits: [..., v].
    k: How many to keep, at least 1; ties with the k-th are kept too.

  Returns:
    An array like logits.
  """
  k = min(k, logits.shape[-1])
  smallest = jax.lax.top_k(logits, k)[0][..., -1:]
  return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
  """Keeps the fewest most likely tokens that together have probability >= p.

  Args:
    logits: [..., v].
    p: In (0, 1]. The most likely token is always kept, and so are ties with the
      least likely one that is kept.

  Returns:
    An array like logits, minus infinity where dropped.

  References:
    Holtzman et al., arXiv:1904.09751, 2019, section 3.1 (nucleus sampling).
  """
  descending = -jnp.sort(-logits, axis=-1)
  probability = jax.nn.softmax(descending, axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability
  kept = jnp.where(before < p, descending, jnp.inf)
  smallest = jnp.min(kept, axis=-1, keepdims=True)
  return jnp.where(logits < smallest, -jnp.inf, logits)


def sample(
  key: jax.Array,
  logits: jax.Array,
  *,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float = 1.0,
) -> jax.Array:
  """Draws one token per row, the most likely one at temperature 0.

  Args:
    key: A key from `jax.random.key`.
    logits: float32 [b, v].
    temperature: Divides the logits; 0 is greedy.
    top_k: Draws among the k most likely tokens; None is all of them.
    top_p: Draws among the most likely tokens of this total probability, after
      temperature and top_k; 1 is all of them.

  Returns:
    Tokens, int32 [b].

  Raises:
    errors.UserError: If a setting is out of range.
  """
  check_sampling(temperature, top_k, top_p)
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  # With the largest logit at zero, a tiny temperature sends all others to minus
  # infinity; without, the largest would overflow too. Temperatures below the
  # smallest normal number are flushed to zero by some backends.
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  logits = logits / max(temperature, float(jnp.finfo(logits.dtype).tiny))
  if top_k is not None:
    logits = keep_top_k(logits, top_k)
  if top_p < 1:
    logits = keep_top_p(logits, top_p)
  return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def sample_rows(
  keys: jax.Array,
  logits: jax.Array,
  *,
  temperature: jax.Array,
  top_k: jax.Array,
  top_p: jax.Array,
) -> jax.Array:
  """Draws one token per row by settings of its own; see `sample`.

  One compiled program serves all settings, and a row draws what `sample` draws
  with its key and settings.

  Args:
    keys: Keys [b].
    logits: float32 [b, v].
    temperature: float32 [b], 0 is greedy.
    top_k: int32 [b], at least 1; v or more keeps all tokens.
    top_p: float32 [b]; 1 keeps all tokens.

  Returns:
    Tokens, int32 [b].
  """
  vocab_size = logits.shape[-1]

  def restrict(logits):
    descending = -jnp.sort(-logits, axis=-1)
    last = jnp.minimum(top_k, vocab_size)[:, None] - 1
    least = jnp.take_along_axis(descending, last, axis=-1)  # [b, 1]
    descending = jnp.where(descending < least, -jnp.inf, descending)
    probability = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = jnp.where(before < top_p[:, None], descending, jnp.inf)
    nucleus = jnp.min(kept, axis=-1, keepdims=True)
    # The sum of all probabilities may round to 1 before the last token.
    nucleus = jnp.where(top_p[:, None] < 1, nucleus, -jnp.inf)
    return jnp.where(logits < jnp.maximum(least, nucleus), -jnp.inf, logits)

  greedy = jnp.argmax(logits, axis=-1)
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  tiny = jnp.finfo(logits.dtype).tiny  # see `sample`
  logits = logits / jnp.maximum(temperature, tiny)[:, None]
  restricted = jnp.any((top_k < vocab_size) | (top_p < 1))
  logits = jax.lax.cond(restricted, restrict, lambda x: x, logits)
  draw = lambda key, x: jax.random.categorical(key, x[None], axis=-1)[0]
  drawn = jax.vmap(draw)(keys, logits)
  return jnp.where(temperature == 0, greedy, drawn).astype(jnp.int32)


def row_keys(key: jax.Array, rows: Any) -> jax.Array:
  """Returns one key per row, which depends on the key and the row's number.

  Args:
    key: A key from `jax.random.key`.
    rows: int [b], the numbers of the rows.

  Returns:
    Keys [b].
  """
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(rows))


def make_draw(
  model: models.Model, config: DrawConfig
) -> Callable[..., tuple[Generated, jax.Array, Any]]:
  """Makes `draw(params, logits, state, keys, start=0)`.

  It draws a token per row from logits [b, v], reads it with the model, and so
  on until all rows have ended. Token number n of a row is drawn with
  `fold_in(key of the row, n)`, so it depends neither on the other rows nor on
  how many tokens are drawn in one call; `start` is the number of the first.

  Args:
    model: From `models.make_model`.
    config: The settings; see `check_draw`.

  Returns:
    A function to be jitted. It returns `Generated`, and the logits and the
    state after the last token that was read.
  """
  stops = config.stop_tokens
  fill = stops[0] if stops else 0

  def draw_token(key, logits):
    token = sample(
      key,
      logits[None, : config.vocab_size],
      temperature=config.temperature,
      top_k=config.top_k,
      top_p=config.top_p,
    )
    return token[0]

  def draw(params, logits, state, keys, start=0):
    def body(loop: _Loop) -> _Loop:
      step_keys = jax.vmap(jax.random.fold_in, (0, None))(
        keys, start + loop.step
      )
      token = jax.vmap(draw_token)(step_keys, loop.logits)  # [b]
      running = loop.running
      if stops:
        running = running & ~jnp.isin(token, jnp.array(stops))
        token = jnp.where(running, token, fill)
      logits, state = model.decode(
        params, loop.state, token[:, None], mask=running[:, None]
      )
      tokens = loop.tokens.at[:, loop.step].set(token)
      return _Loop(loop.step + 1, logits[:, 0], state, tokens, running)

    def unfinished(loop: _Loop):
      return (loop.step < config.num_tokens) & loop.running.any()

    batch_size = logits.shape[0]
    params, state = model.to_layers(params, state)
    loop = _Loop(
      jnp.zeros((), jnp.int32),
      logits,
      state,
      tokens=jnp.full((batch_size, config.num_tokens), fill, jnp.int32),
      running=jnp.ones((batch_size,), bool),
    )
    loop = jax.lax.while_loop(unfinished, body, loop)
    if not stops:
      lengths = jnp.full((batch_size,), config.num_tokens, jnp.int32)
    else:
      lengths = jnp.sum(loop.tokens != fill, axis=1)
    state = model.from_layers(loop.state)
    return Generated(loop.tokens, lengths), loop.logits, state

  return draw
