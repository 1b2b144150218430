"""Generation: the prompt in one forward, then token by token.

The model's one `forward` does both. What is carried is its state, whose size
does not depend on how much has been read, and the logits of the next token.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import errors
from nested_learning import models
from nested_learning.inference import sampling


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
  """What to generate, and how tokens are drawn."""

  prompt: str = 'def '  # text that is continued
  num_tokens: int = 256  # most tokens to generate; a document's end stops
  temperature: float = 0.8  # divides the logits; 0 is greedy
  top_k: int | None = None  # draw among the k most likely; None is all
  top_p: float = 1.0  # draw among this probability mass; 1 is all
  seed: int = 0  # the same seed draws the same tokens

  def __post_init__(self):
    if self.num_tokens < 1:
      raise errors.UserError(
        f'generate.num_tokens={self.num_tokens} must be at least 1.'
      )
    if self.temperature < 0:
      raise errors.UserError(
        f'generate.temperature={self.temperature} must be at least 0, which is '
        'greedy.'
      )
    if self.top_k is not None and self.top_k < 1:
      raise errors.UserError(
        f'generate.top_k={self.top_k} must be at least 1, or None to keep all.'
      )
    if not 0 < self.top_p <= 1:
      raise errors.UserError(
        f'generate.top_p={self.top_p} must be above 0 and at most 1 (keep all).'
      )


class Generated(NamedTuple):
  """Generated tokens.

  Attributes:
    tokens: int32 [b, n]; after a row's end, the stop token.
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


def check_length(
  config: models.ModelConfig, prompt_length: int, num_tokens: int
) -> None:
  """Refuses a prompt that leaves no room for what is to be generated.

  Args:
    config: The model.
    prompt_length: Tokens of the prompt.
    num_tokens: Tokens to generate.

  Raises:
    errors.UserError: Together they are more than the model's state holds.
  """
  limit = models.max_stream_length(config)
  if limit is not None and prompt_length + num_tokens > limit:
    raise errors.UserError(
      f'a prompt of {prompt_length} tokens and generate.num_tokens='
      f'{num_tokens} are together more than model.max_length={limit}; shorten '
      'the prompt, lower generate.num_tokens or raise model.max_length.'
    )


class DrawConfig(NamedTuple):
  """How tokens are drawn, see `make_generate`."""

  num_tokens: int
  temperature: float = 1.0
  top_k: int | None = None
  top_p: float = 1.0
  stop_token: int | None = None
  vocab_size: int | None = None


def make_draw(
  forward: Callable[..., tuple[jax.Array, Any]], config: DrawConfig
) -> Callable[..., Generated]:
  """Makes `draw(params, logits, state, key) -> Generated`.

  It draws from logits [b, v], reads what it drew with `forward(params, state,
  tokens, mask=mask)`, and so on until all rows have ended.

  Args:
    forward: Of a model.
    config: How many tokens, and how they are drawn.

  Returns:
    A function to be jitted.
  """
  stop_token = config.stop_token
  fill = 0 if stop_token is None else stop_token

  def draw(params, logits, state, key):
    def body(loop: _Loop) -> _Loop:
      token = sampling.sample(
        jax.random.fold_in(key, loop.step),
        loop.logits[:, : config.vocab_size],
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
      )
      running = loop.running
      if stop_token is not None:
        running = running & (token != stop_token)
        token = jnp.where(running, token, stop_token)
      logits, state = forward(
        params, loop.state, token[:, None], mask=running[:, None]
      )
      tokens = loop.tokens.at[:, loop.step].set(token)
      return _Loop(loop.step + 1, logits[:, 0], state, tokens, running)

    def unfinished(loop: _Loop):
      return (loop.step < config.num_tokens) & loop.running.any()

    batch_size = logits.shape[0]
    loop = _Loop(
      jnp.zeros((), jnp.int32),
      logits,
      state,
      tokens=jnp.full((batch_size, config.num_tokens), fill, jnp.int32),
      running=jnp.ones((batch_size,), bool),
    )
    tokens = jax.lax.while_loop(unfinished, body, loop).tokens
    if stop_token is None:
      lengths = jnp.full((batch_size,), config.num_tokens, jnp.int32)
      return Generated(tokens, lengths)
    return Generated(tokens, jnp.sum(tokens != stop_token, axis=1))

  return draw


def make_generate(
  model: models.Model,
  *,
  num_tokens: int,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float = 1.0,
  stop_token: int | None = None,
  vocab_size: int | None = None,
) -> Callable[..., Generated]:
  """Makes `generate(params, prompt, key, mask=None) -> Generated`.

  It takes a prompt int32 [b, t] with t >= 1 and, where prompts differ in
  length, a mask bool [b, t], False for padding on either side. It is compiled
  once per shape of the prompt. Row i of a batch does not draw what it would
  draw alone, except at temperature 0.

  Args:
    model: From `models.make_model`.
    num_tokens: Most tokens to generate.
    temperature: See `sampling.sample`.
    top_k: See `sampling.sample`.
    top_p: See `sampling.sample`.
    stop_token: The token that ends a row; None for no such token.
    vocab_size: Tokens from this one on are never drawn; None for the model's.

  Returns:
    The function. It raises UserError if the prompt is empty, or if prompt and
    generated tokens are more than the model's state holds.
  """
  piece = model.config.max_length

  def read_prompt(params, prompt, mask):
    state = None
    logits = jnp.zeros((prompt.shape[0], model.config.vocab_size), jnp.float32)
    for start in range(0, prompt.shape[1], piece):
      piece_mask = mask[:, start : start + piece]
      all_logits, state = model.forward(
        params, state, prompt[:, start : start + piece], mask=piece_mask
      )
      last = piece_mask.shape[1] - 1 - jnp.argmax(piece_mask[:, ::-1], axis=1)
      read = jnp.take_along_axis(all_logits, last[:, None, None], axis=1)[:, 0]
      logits = jnp.where(piece_mask.any(axis=1)[:, None], read, logits)
    return logits, state

  draw = make_draw(
    model.forward,
    DrawConfig(num_tokens, temperature, top_k, top_p, stop_token, vocab_size),
  )

  @jax.jit
  def run(params, prompt, key, mask):
    return draw(params, *read_prompt(params, prompt, mask), key)

  def generate(params, prompt, key, mask=None):
    length = prompt.shape[1]
    if length < 1:
      raise errors.UserError('the prompt is empty; give at least one token.')
    check_length(model.config, length, num_tokens)
    mask = jnp.ones(prompt.shape, bool) if mask is None else mask
    return run(params, prompt, key, mask)

  return generate
