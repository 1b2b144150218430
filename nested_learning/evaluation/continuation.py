r"""Text that a model generates after a context, until a string appears.

    generate = make_generate_until(model, tokenizer, batch_size=8)
    texts = generate(params, ['1, 2, 3, '], GenerateUntilConfig(until=('\n',)))

Strings that end a text are searched in the text, not among the tokens, so they
end it wherever tokens begin and end.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

from absl import logging
import jax
import numpy as np

from nested_learning import data as data_lib
from nested_learning import errors
from nested_learning import inference
from nested_learning import models
from nested_learning import sharding
from nested_learning.evaluation import scoring

_BLOCK = 16  # tokens drawn between two searches of the text


@dataclasses.dataclass(frozen=True)
class GenerateUntilConfig:
  """When a text ends, and how its tokens are drawn."""

  until: tuple[str, ...] = ()  # the first of these ends the text before it
  max_tokens: int = 256  # most tokens
  temperature: float = 0.0  # divides the logits; 0 is greedy
  top_k: int | None = None  # draws among the k most likely; None is all
  top_p: float = 1.0  # draws among this probability mass; 1 is all

  def __post_init__(self):
    errors.check_field(self, 'max_tokens', self.max_tokens >= 1, 'at least 1')
    inference.check_sampling(self.temperature, self.top_k, self.top_p)


def make_generate_until(
  model: models.Model,
  tokenizer: data_lib.Tokenizer,
  *,
  batch_size: int = 8,
  max_length: int | None = None,
  seed: int = 0,
  mesh: jax.sharding.Mesh | None = None,
) -> Callable[..., list[str]]:
  """Makes `generate(params, contexts, config, *, description=None) -> [str]`.

  It returns the texts in the order of the contexts, and shows a progress bar if
  there is a description. What is drawn for a context depends on the seed and on
  its place among the contexts, not on its batch. Where a context leaves no room
  for max_tokens in a model's longest stream, its beginning is left out.

  Args:
    model: From `models.make_model`.
    tokenizer: The tokenizer of the texts.
    batch_size: Texts that are generated together.
    max_length: Most tokens of one call, and of one stream for models that have
      a longest; None for model.max_length.
    seed: Seed of what is drawn.
    mesh: Devices to spread the rows over, with the parameters on it; None for
      where the parameters are.

  Returns:
    The function.

  Raises:
    errors.UserError: If batch_size or max_length is out of range, or the model
      has fewer tokens than the tokenizer; the function, if max_tokens leave no
      room for a context.
  """
  limits = scoring.read_limits(model.config, max_length)
  rows = scoring.num_rows(batch_size, mesh)
  vocab_size = scoring.check_vocab_size(model.config, tokenizer.vocab_size)
  read_prompt = inference.make_prompt_reader(
    model,
    piece=limits.piece,
    put=functools.partial(scoring.put, mesh=mesh),
  )
  whole = None if mesh is None else sharding.replicated(mesh)

  @functools.cache
  def make_draw(temperature, top_k, top_p):
    draw = inference.make_draw(
      model,
      inference.DrawConfig(
        _BLOCK, temperature, top_k, top_p, tokenizer.document_id, vocab_size
      ),
    )
    # Every process needs all tokens, to see where the texts end.
    return jax.jit(draw, out_shardings=(whole, None, None))

  def generate_batch(params, contexts, keys, config):
    draw = make_draw(config.temperature, config.top_k, config.top_p)
    padded = scoring.pad(contexts, rows, limits.piece)
    logits, state = read_prompt(params, np.maximum(padded, 0), padded >= 0)
    drawn = np.zeros((rows, 0), np.int32)
    texts = [None] * len(contexts)
    while any(text is None for text in texts):
      start = drawn.shape[1]
      block, logits, state = draw(params, logits, state, keys, start)
      drawn = np.concatenate([drawn, jax.device_get(block.tokens)], axis=1)
      for i, context in enumerate(contexts):
        if texts[i] is None:
          texts[i] = finished_text(tokenizer, context, drawn[i], config)
    return texts

  def generate(params, contexts, config, *, description=None):
    tokens = [scoring.encode_context(tokenizer, c) for c in contexts]
    tokens = _make_room(tokens, config.max_tokens, limits.stream)
    keys = inference.row_keys(
      jax.random.key(seed), np.arange(max(len(tokens), 1))
    )
    texts = [''] * len(tokens)
    with scoring.progress(len(tokens), description) as bar:
      for places in scoring.batches([len(t) for t in tokens], rows):
        padded = [*places, *[places[0]] * (rows - len(places))]
        batch = [tokens[place] for place in places]
        generated = generate_batch(
          params, batch, keys[np.array(padded)], config
        )
        for place, text in zip(places, generated, strict=True):
          texts[place] = text
        bar.update(len(places))
    return texts

  return generate


def finished_text(
  tokenizer: data_lib.Tokenizer,
  context: np.ndarray,
  drawn: np.ndarray,
  config: GenerateUntilConfig,
) -> str | None:
  """Returns the text of tokens if it has ended, otherwise None.

  It ends before the mark of the next document, after max_tokens, and before the
  first string of `until`. A string of `until` that names a special token, which
  decodes to nothing, ends the text at that token.

  Args:
    tokenizer: The tokenizer.
    context: int32 [n], the tokens before them.
    drawn: int32 [t].
    config: When the text ends.

  Returns:
    The text, or None.
  """
  marks = [tokenizer.document_id]
  marks += [
    tokenizer.special[s] for s in config.until if s in tokenizer.special
  ]
  ends = np.flatnonzero(np.isin(drawn, marks))
  length = min(int(ends[0]) if len(ends) else len(drawn), config.max_tokens)
  text = tokenizer.decode_after(context, drawn[:length])
  places = [text.find(string) for string in config.until]
  places = [place for place in places if place >= 0]
  if places:
    return text[: min(places)]
  has_ended = len(ends) > 0 or len(drawn) >= config.max_tokens
  return text if has_ended else None


def _make_room(
  contexts: Sequence[np.ndarray], num_tokens: int, limit: int | None
) -> list[np.ndarray]:
  """Cuts contexts on the left, to leave room for `num_tokens`."""
  if limit is None:
    return list(contexts)
  room = limit - num_tokens
  if room < 1:
    raise errors.UserError(
      f'{num_tokens} tokens to generate leave no room for a context among the '
      f'{limit} that attention holds; lower max_gen_toks of the task or raise '
      'model.max_length.'
    )
  num_cut = sum(len(context) > room for context in contexts)
  if num_cut:
    logging.warning(
      '%d of %d contexts are longer than the %d tokens that attention holds '
      'beside %d to generate: their beginning is left out.',
      num_cut,
      len(contexts),
      room,
      num_tokens,
    )
  return [context[-room:] for context in contexts]
