"""Generation: reads a prompt in a few calls, then draws token by token.

`forward` of a model reads the prompt, and `decode` the tokens that were drawn.
The state, whose size does not depend on how much was read, and the logits of
the next token are carried from call to call.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning import models
from nested_learning.inference import sampling


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
  """A prompt, and how its continuation is drawn."""

  prompt: str = 'def '  # text that is continued
  # 'chat' takes the prompt for a message, in the template of the run's base.
  template: Literal['none', 'chat'] = 'none'
  num_tokens: int = 256  # most tokens to draw; the end of a document stops
  temperature: float = 0.8  # divides the logits; 0 is greedy
  top_k: int | None = None  # draws among the k most likely; None is all
  top_p: float = 1.0  # draws among this probability mass; 1 is all
  seed: int = 0  # the same seed draws the same tokens
  # Special tokens that end a text, by name, beside the one between documents.
  stop: tuple[str, ...] = ()

  def __post_init__(self):
    errors.check_choices(self)
    errors.check_field(self, 'num_tokens', self.num_tokens >= 1, 'at least 1')
    sampling.check_sampling(self.temperature, self.top_k, self.top_p)
    errors.check_field(
      self, 'seed', 0 <= self.seed < 2**32, 'at least 0 and below 2^32'
    )
    check_text('prompt', self.prompt)


def check_text(name: str, text: str) -> None:
  """Checks that a text from the command line is Unicode.

  Bytes of the command line that are not UTF-8 arrive as lone surrogates, which
  no tokenizer can encode.

  Args:
    name: Name of the setting.
    text: Its value.

  Raises:
    errors.UserError: If the text holds a lone surrogate.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise errors.UserError(
      f'{name}={text!r} is not UTF-8 text; convert it, or check the encoding '
      'of the terminal.'
    ) from error


def check_length(
  config: models.ModelConfig, prompt_length: int, num_tokens: int
) -> None:
  """Checks that the state of a model holds a prompt and its continuation.

  Args:
    config: The model.
    prompt_length: Tokens of the prompt.
    num_tokens: Tokens to generate.

  Raises:
    errors.UserError: If they are more than the model's state holds.
  """
  limit = models.max_stream_length(config)
  if limit is not None and prompt_length + num_tokens > limit:
    raise errors.UserError(
      f'a prompt of {prompt_length} tokens and generate.num_tokens='
      f'{num_tokens} are together more than model.max_length={limit}; shorten '
      'the prompt, lower generate.num_tokens or raise model.max_length.'
    )


def check_tokens(
  tokens: np.ndarray, vocab_size: int, mask: np.ndarray | None = None
) -> None:
  """Checks that a model has all of these tokens.

  Args:
    tokens: Array of any shape.
    vocab_size: Tokens of the model.
    mask: bool like tokens, False where a token is ignored; None for nowhere.

  Raises:
    errors.UserError: If they are not integers, or one is out of range.
  """
  if not np.issubdtype(tokens.dtype, np.integer):
    raise errors.UserError(f'tokens are {tokens.dtype}; give integers.')
  wrong = (tokens < 0) | (tokens >= vocab_size)
  if mask is not None:
    wrong &= mask
  if wrong.any():
    raise errors.UserError(
      f'token {tokens[wrong][0]} is not one of the {vocab_size} of the model; '
      'use the tokenizer that the model was trained with.'
    )


def make_prompt_reader(
  model: models.Model,
  *,
  piece: int | None = None,
  put: Callable[[np.ndarray], Any] = np.asarray,
) -> Callable[..., tuple[jax.Array, Any]]:
  """Makes `read_prompt(params, tokens, mask) -> (logits, state)`.

  It takes tokens int32 [b, t] and mask bool [b, t], False for padding on either
  side, both NumPy arrays. It returns the logits [b, v] after the last token of
  each row, and the state. A prompt longer than a piece is read by one program
  in a loop over pieces, so that neither compilation nor the memory for
  activations grows with it.

  Args:
    model: From `models.make_model`.
    piece: Most tokens of a call; None for model.max_length.
    put: Places an array [b, ...] on the devices.

  Returns:
    The function.
  """
  piece = model.config.max_length if piece is None else piece

  @jax.jit
  def init(params, tokens):
    return _no_logits(model, tokens), model.init_state(params, len(tokens))

  @jax.jit
  def read(params, carry, tokens, mask):
    logits, state = (
      (_no_logits(model, tokens), None) if carry is None else carry
    )
    all_logits, state = model.forward(params, state, tokens, mask=mask)
    # The last token that is there, whichever side the padding is on.
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    read = jnp.take_along_axis(all_logits, last[:, None, None], axis=1)[:, 0]
    return jnp.where(mask.any(axis=1)[:, None], read, logits), state

  def read_prompt(params, tokens, mask):
    length = tokens.shape[1]
    if length <= piece:
      return read(params, None, put(tokens), put(mask))
    # All pieces have one shape, the last one with padding: one compilation.
    padding = ((0, 0), (0, -length % piece))
    tokens, mask = np.pad(tokens, padding), np.pad(mask, padding)
    carry = init(params, put(tokens[:, :1]))
    for start in range(0, length, piece):
      part = slice(start, start + piece)
      carry = read(params, carry, put(tokens[:, part]), put(mask[:, part]))
    return carry

  return read_prompt


def make_generate(
  model: models.Model,
  *,
  num_tokens: int,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float = 1.0,
  stop_token: int | tuple[int, ...] | None = None,
  vocab_size: int | None = None,
) -> Callable[..., sampling.Generated]:
  """Makes `generate(params, prompt, key, mask=None) -> Generated`.

  It takes a prompt int [b, t] and, where prompts differ in length, a mask bool
  [b, t], False for padding on either side. It is compiled once per shape of the
  prompt up to model.max_length, and once for all longer ones. A row draws what
  it would draw in any other batch at the same place.

  Args:
    model: From `models.make_model`.
    num_tokens: Most tokens to generate.
    temperature: See `sampling.sample`.
    top_k: See `sampling.sample`.
    top_p: See `sampling.sample`.
    stop_token: The token that ends a row, or several of them; None for none.
    vocab_size: Only tokens below it are drawn; None for all of the model's.

  Returns:
    The function. It raises UserError if a prompt is empty, holds a token that
    the model does not have, or is with the generated tokens more than the
    model's state holds.

  Raises:
    errors.UserError: If a setting is out of range.
  """
  config = sampling.DrawConfig(
    num_tokens, temperature, top_k, top_p, stop_token, vocab_size
  )
  sampling.check_draw(config, model.config.vocab_size)
  read_prompt = make_prompt_reader(model)
  draw = jax.jit(sampling.make_draw(model, config))

  def generate(params, prompt, key, mask=None):
    prompt = np.asarray(prompt)
    if prompt.ndim != 2:
      raise errors.UserError(
        f'the prompt has shape {prompt.shape}; give tokens [rows, tokens].'
      )
    mask = np.ones(prompt.shape, bool) if mask is None else np.asarray(mask)
    if not mask.any(axis=1).all():
      raise errors.UserError('the prompt is empty; give at least one token.')
    check_tokens(prompt, model.config.vocab_size, mask)
    check_length(model.config, prompt.shape[1], num_tokens)
    prompt = np.where(mask, prompt, 0).astype(np.int32)
    logits, state = read_prompt(params, prompt, mask)
    keys = sampling.row_keys(key, np.arange(len(prompt)))
    generated, _, _ = draw(params, logits, state, keys)
    return generated

  return generate


def _no_logits(model: models.Model, tokens: jax.Array) -> jax.Array:
  """Returns zeros [b, v], the logits of rows that have read nothing."""
  shape = (tokens.shape[0], model.config.vocab_size)
  return jnp.zeros(shape, jnp.float32)
