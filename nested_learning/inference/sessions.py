"""Sessions: a model that goes on learning from what one user feeds it.

    session = Session(model, params, inner)
    session.feed(tokens)          # reads and learns
    session.generate(100, prompt=tokens)
    session.save('me.session')

A session is a checkpoint, which it never changes, the state of a stream whose
levels learn (`levels.in_context`), and a clock. It has one row or several, each
with weights, memories and clocks of its own. Whatever the calls in which tokens
arrive, levels learn from whole segments by one compiled program, so that what a
session has learned is the same bits however it was fed.

Attention to all tokens holds a limited number of them. Where the next segment
would not fit, the mixers of that row begin a new stream; its levels keep what
they learned.
"""

from collections.abc import Sequence
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import configs
from nested_learning import errors
from nested_learning import levels
from nested_learning import models
from nested_learning.inference import generate as generate_lib
from nested_learning.inference import session_config
from nested_learning.inference import session_contents
from nested_learning.inference import session_files
from nested_learning.inference import session_inputs
from nested_learning.inference import session_programs


class Session:
  """One or several streams of a model that learns while it reads.

  Nothing that a method computes is lost on a failure: a call that raises leaves
  the session as it was.

  Attributes:
    model: The model.
    params: Its parameters; no method changes them.
    inner: How levels learn.
    state: A `session_programs.SessionState`.
    clock: int64 [b], tokens read.
  """

  def __init__(
    self,
    model: models.Model,
    params: Any,
    inner: levels.InnerConfig | None = None,
    *,
    num_rows: int = 1,
    tokens_are: str = '',
  ):
    """Begins a session.

    Args:
      model: From `models.make_model`.
      params: Of a checkpoint.
      inner: Which levels learn, how often and how; None for `default_inner`.
      num_rows: Streams that are fed together.
      tokens_are: Fingerprint of what the tokens stand for; a file of a session
        on other tokens is refused.

    Raises:
      errors.UserError: The levels do not fit the model, or the model's state
        does not hold a segment.
    """
    self.model, self.params = model, params
    self.inner = inner or session_config.default_inner(model.config)
    self._tokens_are = tokens_are
    self._programs = session_programs.make_programs(model, self.inner)
    self._limit = models.max_stream_length(model.config)
    size = self._programs.segment_size
    longest = model.config.max_length
    if size > longest:
      raise errors.UserError(
        f'a segment of {size} tokens (inner.chunk_sizes='
        f'{self.inner.chunk_sizes}) is longer than model.max_length={longest}; '
        'lower the one or raise the other.'
      )
    # A copy of the blocks, so that no call makes one; forks share it.
    self._prepared = self._programs.prepare(params)
    self.state = self._programs.init(self._prepared, num_rows)
    self.clock = np.zeros(num_rows, np.int64)
    self._age = np.zeros(num_rows, np.int64)  # tokens that the mixers hold
    self._fingerprint = None
    self.mark()

  @property
  def segment_size(self) -> int:
    """Tokens between two looks at whether a level is due."""
    return self._programs.segment_size

  @property
  def num_rows(self) -> int:
    """Streams that are fed together."""
    return len(self.clock)

  def feed(
    self, tokens: Any, *, reset: Any = None, mask: Any = None
  ) -> np.ndarray:
    """Reads tokens and learns from them.

    Args:
      tokens: int [b, t], or [t] for one row.
      reset: bool like tokens, True at a document's first token, or None.
      mask: bool like tokens, False for padding, or None.

    Returns:
      The loss of each token in nats, float32 [b, t], as predicted before it was
      read; NaN for padding, first tokens of documents and of the session.

    Raises:
      errors.UserError: There are no tokens, or some that the model does not
        have; nothing was read.
    """
    tokens, reset, mask = session_inputs.check(
      tokens,
      reset,
      mask,
      num_rows=self.num_rows,
      vocab_size=self.model.config.vocab_size,
    )
    losses = np.full(tokens.shape, np.nan, np.float32)
    state, clock, age = self.state, self.clock.copy(), self._age.copy()
    size = self._programs.segment_size
    for piece in session_programs.pieces(mask, clock % size, size):
      state, age = self._make_room(state, clock, age)
      take = lambda x, p=piece: np.take_along_axis(x, p.index, axis=1)
      inputs = take(tokens), take(reset) & piece.there
      known = piece.there & ~inputs[1]
      known[:, 0] &= clock > 0
      count = piece.there.sum(axis=1)
      is_segment = (count == size).all()  # and so begins at a border
      if is_segment:
        found, state = self._programs.segment(self._prepared, state, *inputs)
      else:
        found, state = self._programs.piece(
          self._prepared, state, *inputs, piece.there
        )
      clock, age = clock + count, age + count
      if not is_segment:
        state = self._end_segments(state, (clock % size == 0) & (count > 0))
      rows, places = np.nonzero(known)
      losses[rows, piece.index[rows, places]] = np.asarray(found)[rows, places]
    self.state, self.clock, self._age = state, clock, age
    return losses

  def loss(self, tokens: Any, **marks: Any) -> float:
    """Mean loss per token, in nats, of what `feed` would read; nothing stays.

    Args:
      tokens: As for `feed`.
      **marks: As for `feed`.

    Returns:
      The mean over the tokens that something predicts; NaN if there are none.
    """
    losses = self.fork().feed(tokens, **marks)
    known = losses[np.isfinite(losses)]
    return float(known.mean(dtype=np.float64)) if known.size else float('nan')

  def generate(
    self,
    num_tokens: int,
    *,
    prompt: Any = None,
    reset: Any = None,
    key: jax.Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_token: int | None = None,
    vocab_size: int | None = None,
    keep: bool = False,
  ) -> generate_lib.Generated:
    """Writes on after what was read, and after a prompt.

    Levels learn from the prompt, but not from what they write, unless it is
    kept: then the session goes on as if it had been fed both. Where attention
    would not hold prompt and text, it forgets what it read before them.

    Args:
      num_tokens: Most tokens to write in a row.
      prompt: int [b, t] or [t], read first; None for none.
      reset: bool like the prompt, True at a document's first token, or None.
      key: From `jax.random.key`; None is key 0.
      temperature: See `sampling.sample`.
      top_k: See `sampling.sample`.
      top_p: See `sampling.sample`.
      stop_token: The token that ends a row; None for no such token.
      vocab_size: Tokens from this one on are never drawn.
      keep: Whether prompt and text stay in the session.

    Returns:
      `Generated`.

    Raises:
      errors.UserError: Nothing was read and there is no prompt, or attention
        does not hold the text.
    """
    if num_tokens < 1:
      raise errors.UserError(f'{num_tokens=} must be at least 1.')
    reader = self.fork()
    length = 0 if prompt is None else np.shape(prompt)[-1]
    if not keep:
      reader._forget_for(length + num_tokens)
    if prompt is not None:
      reader.feed(prompt, reset=reset)
    if not reader.clock.all():
      raise errors.UserError(
        'nothing was read yet to write on after; give a prompt.'
      )
    age = int(reader._age.max())
    if self._limit is not None and age + num_tokens > self._limit:
      raise errors.UserError(
        f'{num_tokens} tokens after the {age} that attention holds are more '
        f'than model.max_length={self._limit}; ask for fewer.'
      )
    write = self._programs.make_write(
      generate_lib.DrawConfig(
        num_tokens, temperature, top_k, top_p, stop_token, vocab_size
      )
    )
    key = jax.random.key(0) if key is None else key
    written = write(self._prepared, reader.state, key)
    if keep:
      mask = np.arange(num_tokens) < np.asarray(written.lengths)[:, None]
      if mask.any():
        reader.feed(np.asarray(written.tokens), mask=mask)
      self.state, self.clock, self._age = (
        reader.state,
        reader.clock,
        reader._age,
      )
    return written

  def fork(self) -> 'Session':
    """Another session that is now as this one is; neither changes the other."""
    other = object.__new__(Session)
    other.__dict__.update(self.__dict__)
    other.mark()
    return other

  def mark(self) -> None:
    """Makes the present what `rollback` returns to."""
    self._marked = self.state, self.clock, self._age

  def rollback(self) -> None:
    """Returns to the last mark: the beginning, a fork, `save` or `load`."""
    self.state, self.clock, self._age = self._marked

  def health(self) -> dict[str, levels.Health]:
    """How the levels are doing; see `levels.health`."""
    return levels.health(self.state.stream)

  def split(self) -> list['Session']:
    """One session for each row."""
    return [self._rows(slice(i, i + 1)) for i in range(self.num_rows)]

  def save(self, path: str | pathlib.Path) -> int:
    """Writes the session to a file and marks it.

    Args:
      path: Where; a file that is there is replaced when the new one is whole.

    Returns:
      Bytes written.

    Raises:
      errors.UserError: It cannot be written.
    """
    header = {
      'model': self._model_fingerprint(),
      'tokens_are': self._tokens_are,
      'inner': configs.to_json(self.inner),
      'num_rows': self.num_rows,
    }
    clocks = {'clock': self.clock, 'age': self._age}
    content = session_contents.pack(header, clocks, self.state)
    size = session_files.write(path, content)
    self.mark()
    return size

  @classmethod
  def load(
    cls,
    path: str | pathlib.Path,
    model: models.Model,
    params: Any,
    *,
    tokens_are: str = '',
  ) -> 'Session':
    """Reads a session that `save` wrote.

    Args:
      path: The file.
      model: The model that it was saved with.
      params: The parameters that it was saved with.
      tokens_are: See `Session`.

    Returns:
      The session, exactly as it was.

    Raises:
      errors.UserError: The file is damaged, or of another model, checkpoint,
        tokenizer or version.
    """
    content = session_contents.read(path, tokens_are=tokens_are)
    session = cls(
      model,
      params,
      configs.from_json(content.header['inner']),
      num_rows=content.header['num_rows'],
      tokens_are=tokens_are,
    )
    session_contents.check_model(path, content, session._model_fingerprint())
    session.state = session_contents.unpack(path, content, session.state)
    arrays = content.arrays
    session.clock, session._age = arrays['clock'].copy(), arrays['age'].copy()
    session.mark()
    return session

  def _rows(self, rows) -> 'Session':
    other = self.fork()
    other.state = jax.tree.map(lambda x: x[rows], self.state)
    other.clock, other._age = self.clock[rows], self._age[rows]
    other.mark()
    return other

  def _end_segments(self, state, whole):
    """Learns in the rows whose segment is whole, by the program of segments."""
    if not whole.any():
      return state
    segment = state.stream.segment
    stream = state.stream._replace(
      model=segment.model,
      segment=segment._replace(count=jnp.zeros_like(segment.count)),
    )
    _, learned = self._programs.segment(
      self._prepared,
      state._replace(stream=stream),
      segment.tokens,
      segment.reset,
    )
    return self._programs.where(whole, learned, state)

  def _make_room(self, state, clock, age):
    """New streams for rows at a border whose next segment would not fit."""
    size = self._programs.segment_size
    if self._limit is None:
      return state, age
    full = (clock % size == 0) & (age + size > self._limit)
    if full.any():
      state = self._programs.restart(self._prepared, state, full)
    return state, np.where(full, 0, age)

  def _forget_for(self, num_tokens):
    """New streams, if attention has no room; the open segment is dropped."""
    if self._limit is None or self._age.max() + num_tokens <= self._limit:
      return
    everywhere = np.ones(self.num_rows, bool)
    state = self._programs.restart(self._prepared, self.state, everywhere)
    segment = state.stream.segment
    segment = segment._replace(count=jnp.zeros_like(segment.count))
    self.state = state._replace(stream=state.stream._replace(segment=segment))
    # Never of a clock that had begun back to its beginning: something was read.
    size = self._programs.segment_size
    self.clock = self.clock // size * size + size * (self.clock > 0)
    self._age = np.zeros_like(self._age)

  def _model_fingerprint(self) -> str:
    if self._fingerprint is None:
      self._fingerprint = session_contents.fingerprint(self.model, self.params)
    return self._fingerprint


def join(sessions: Sequence[Session]) -> Session:
  """One session whose rows are those of several on one model.

  Args:
    sessions: At least one; all with the same model, parameters and levels.

  Returns:
    A session; what it reads does not reach the others.

  Raises:
    errors.UserError: They are not on one model, or learn differently.
  """
  first = sessions[0]
  for other in sessions[1:]:
    if other.params is not first.params or other.inner != first.inner:
      raise errors.UserError(
        'sessions of different checkpoints or levels cannot be read together.'
      )
  joined = first.fork()
  joined.state = jax.tree.map(
    lambda *x: jnp.concatenate(x), *(session.state for session in sessions)
  )
  joined.clock = np.concatenate([session.clock for session in sessions])
  joined._age = np.concatenate([session._age for session in sessions])
  joined.mark()
  return joined
