"""Sessions: a model that goes on learning from the text that it is fed.

    session = Session(model, params, inner)
    session.feed(tokens)          # reads and learns
    session.generate(100, prompt=tokens)
    session.save('me.session')

A session is a checkpoint, which it never changes, the state of a stream whose
levels learn (`levels.reader`), and a clock. It has one row or several, each
with weights, memories and clocks of its own. Levels learn from whole segments
by one compiled program, so they learn the same bits however the tokens are cut
into calls.

Attention to all tokens holds a limited number of them. Where the next segment
would not fit, the mixers of that row begin a new stream; its levels keep what
they learned.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import os
from typing import Any

import jax
import numpy as np

from nested_learning import errors
from nested_learning import levels
from nested_learning import models
from nested_learning.inference import generate as generate_lib
from nested_learning.inference import sampling
from nested_learning.inference import session_blocks
from nested_learning.inference import session_compiled
from nested_learning.inference import session_files
from nested_learning.inference import session_programs


@dataclasses.dataclass(frozen=True)
class SessionConfig:
  """A session from the command line."""

  path: str | None = None  # file of the session; begun where there is none
  feed: tuple[str, ...] = ()  # files of text, read in this order
  prompt: str | None = None  # text that is answered, then read
  # Share by which the loss may be above that of the frozen model, which reads
  # the text too; None reads once. For runs with a pretrained base alone.
  guard: float | None = 0.05

  def __post_init__(self):
    fine = self.guard is None or self.guard > 0
    errors.check_field(self, 'guard', fine, 'above 0, or None')
    if self.path is not None:
      session_files.resolve(self.path)
    if self.prompt is not None:
      generate_lib.check_text('prompt', self.prompt)


def default_inner(config: models.ModelConfig) -> levels.InnerConfig:
  """Returns how levels learn by default: every 128, 512, 2K, ... tokens.

  The papers begin at 512, for models of 10^8 parameters and more; smaller ones
  learn more from shorter segments.

  Args:
    config: The model; all levels of its chain learn.
  """
  sizes = tuple(128 * 4**i for i in range(len(config.levels)))
  return levels.make_inner(sizes)


class Session:
  """One or several streams of a model that learns while it reads.

  A call that raises leaves the session as it was.

  Attributes:
    model: The model.
    params: Its parameters; no method changes them.
    inner: How levels learn.
    programs: The compiled functions, which sessions on equal configs share.
    prepared: The parameters in the form that `programs` take.
  """

  def __init__(
    self,
    model: models.Model,
    params: Any,
    inner: levels.InnerConfig | None = None,
    *,
    num_rows: int = 1,
    tokenizer_fingerprint: str = '',
  ):
    """Begins a session.

    Args:
      model: From `models.make_model`.
      params: The parameters of a checkpoint.
      inner: How the levels learn; None for `default_inner`. Where all rest,
        memories alone learn.
      num_rows: Streams that are fed together.
      tokenizer_fingerprint: `Tokenizer.fingerprint`; `load` refuses a session
        that was fed by another tokenizer.

    Raises:
      errors.UserError: If neither levels nor memories learn, the levels do not
        fit the model, its state does not hold a segment, or there are no rows.
    """
    self.model, self.params = model, params
    self.inner = default_inner(model.config) if inner is None else inner
    if num_rows < 1:
      raise errors.UserError(f'{num_rows=} must be at least 1.')
    self._tokenizer = tokenizer_fingerprint
    self.programs = session_programs.make_programs(model, self.inner)
    # Splits off the blocks that learn once, not in every call; forks share it.
    self.prepared = self.programs.prepare(params)
    self._now = session_programs.begin(self.programs, self.prepared, num_rows)
    self._model_fingerprint = functools.cache(
      lambda: session_files.fingerprint(model, params)
    )
    self._seen = session_files.Seen({})
    self.mark()

  @property
  def segment_size(self) -> int:
    """Tokens of a segment; levels learn at the end of one."""
    return self.programs.segment_size

  @property
  def num_rows(self) -> int:
    """Streams that are fed together."""
    return len(self.clock)

  @property
  def now(self) -> session_programs.Snapshot:
    """Everything that the session remembers; it never changes in place."""
    return self._now

  @property
  def fingerprint(self) -> str:
    """SHA-256 of the checkpoint; computed once, and shared by forks."""
    return self._model_fingerprint()

  @property
  def state(self) -> session_compiled.SessionState:
    """The model's memories and the levels, on the devices."""
    return self._now.state

  @property
  def clock(self) -> np.ndarray:
    """int64 [b], tokens that were read."""
    return self._now.clock

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
      errors.UserError: If there are no tokens, or the model does not have one;
        nothing was read.
    """
    losses, self._now = self._read(self._now, tokens, reset, mask)
    return losses

  def loss(self, tokens: Any, *, reset: Any = None, mask: Any = None) -> float:
    """Returns the mean loss per token that `feed` would give, in nats.

    Args:
      tokens: As for `feed`; the session does not change.
      reset: As for `feed`.
      mask: As for `feed`.

    Returns:
      The mean over tokens that have a loss; NaN if there are none.
    """
    losses, _ = self._read(self._now, tokens, reset, mask)
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
    stop_token: int | tuple[int, ...] | None = None,
    vocab_size: int | None = None,
    keep: bool = False,
  ) -> sampling.Generated:
    """Generates a continuation of what was read, and of a prompt.

    Levels learn from the prompt, and with `keep` from the generated text: then
    the session goes on as if it had been fed both. Where attention would not
    hold prompt and text, it forgets what it read before them.

    Args:
      num_tokens: Most tokens to generate in a row.
      prompt: int [b, t] or [t], read first; None for none.
      reset: bool like the prompt, True at a document's first token, or None.
      key: From `jax.random.key`; None is key 0.
      temperature: See `sampling.sample`.
      top_k: See `sampling.sample`.
      top_p: See `sampling.sample`.
      stop_token: The token that ends a row, or several of them; None for none.
      vocab_size: Only tokens below it are drawn; None for all of the model's.
      keep: Whether prompt and text stay in the session.

    Returns:
      The tokens.

    Raises:
      errors.UserError: If nothing was read and there is no prompt, attention
        does not hold the text, or a setting is out of range.
    """
    config = sampling.DrawConfig(
      num_tokens, temperature, top_k, top_p, stop_token, vocab_size
    )
    sampling.check_draw(config, self.model.config.vocab_size)
    now = session_programs.read_prompt(
      self.programs,
      self.prepared,
      self._now,
      None if prompt is None else self._check(prompt, reset, None),
      num_tokens,
      forgets=not keep,
    )
    key = jax.random.key(0) if key is None else key
    draw = self.programs.make_draw(config)
    generated = draw(self.prepared, now.state, key)
    if keep:
      mask = np.arange(num_tokens) < np.asarray(generated.lengths)[:, None]
      if mask.any():
        _, now = self._read(now, np.asarray(generated.tokens), None, mask)
      self._now = now
    return generated

  def fork(self) -> 'Session':
    """Returns a copy; neither of the two changes the other."""
    other = object.__new__(Session)
    other.__dict__.update(self.__dict__)
    other.mark()
    return other

  def mark(self) -> None:
    """Makes `rollback` return to the present."""
    self._marked = self._now

  def rollback(self) -> None:
    """Returns to the last `mark`, `save`, `load`, `fork` or the beginning."""
    self._now = self._marked

  def move(self, now: session_programs.Snapshot) -> None:
    """Makes a snapshot of a session on the same checkpoint the present."""
    self._now = now

  def health(self) -> dict[str, levels.Health]:
    """Returns updates and drift of the levels; see `levels.measure_health`."""
    return levels.measure_health(self.state.stream)

  def split(self) -> list['Session']:
    """Returns one session per row."""
    rows = (slice(i, i + 1) for i in range(self.num_rows))
    return [self._with(self._now.take_rows(row)) for row in rows]

  def state_fingerprint(self) -> str:
    """Returns the SHA-256 of all that the session remembers.

    Two sessions on one checkpoint have the same if and only if their states are
    equal, bit for bit.
    """
    return session_files.state_fingerprint(self._now.clocks, self._now.state)

  def save(
    self,
    path: str | os.PathLike,
    *,
    lock: bool = True,
    replace: bool = False,
  ) -> dict[str, int]:
    """Writes the session to a file and marks it.

    Args:
      path: The file. An old one is replaced when the new one is whole, and only
        if it is the one that this session was read from or last written to.
      lock: False for a caller that holds `session_files.lock`.
      replace: Whether any other session may be replaced.

    Returns:
      Bytes by part: 'levels', and 'memories and caches' for the rest.

    Raises:
      errors.UserError: If the file is another session, was changed by another
        one, or cannot be written.
    """
    metadata = {
      'model': self.fingerprint,
      'tokenizer': self._tokenizer,
      'inner': session_files.write_inner(self.inner),
    }
    content = session_blocks.pack(
      metadata, self._now, self.programs.init(self.prepared, 1)
    )
    with session_files.lock(path) if lock else contextlib.nullcontext():
      if not replace:
        self._seen.check(path)
      checksum = session_files.write(path, content)
    self._seen = self._seen.add(path, checksum)
    self.mark()
    return session_blocks.measure(content)

  @classmethod
  def load(
    cls,
    path: str | os.PathLike,
    model: models.Model,
    params: Any,
    *,
    tokenizer_fingerprint: str = '',
  ) -> 'Session':
    """Reads a session that `save` wrote.

    Args:
      path: The file.
      model: The model that it was saved with.
      params: The parameters that it was saved with.
      tokenizer_fingerprint: See `Session`.

    Returns:
      The session, exactly as it was.

    Raises:
      errors.UserError: If the file is damaged, or belongs to another model,
        checkpoint, tokenizer or version.
    """
    content = session_files.read(path)
    session_files.check_tokenizer(path, content, tokenizer_fingerprint)
    inner = session_files.read_inner(path, content.metadata['inner'])
    session = cls(
      model, params, inner, tokenizer_fingerprint=tokenizer_fingerprint
    )
    session._restore(path, content)
    return session

  def load_other(self, path: str | os.PathLike) -> 'Session':
    """Reads another session on this checkpoint whose levels learn alike.

    The two share programs and parameters, so that it costs no more than reading
    the file.

    Args:
      path: The file.

    Returns:
      The session; this one does not change.

    Raises:
      errors.UserError: As `load` does, and if its levels learn otherwise.
    """
    content = session_files.read(path)
    session_files.check_tokenizer(path, content, self._tokenizer)
    inner = session_files.read_inner(path, content.metadata['inner'])
    if inner != self.inner:
      raise errors.UserError(
        f'the levels of the session {path} learn by {inner}, and these by '
        f'{self.inner}; begin another session.'
      )
    other = self.fork()
    other._restore(path, content)
    return other

  def _check(self, tokens, reset, mask) -> session_programs.Inputs:
    return session_programs.check_inputs(
      tokens,
      reset,
      mask,
      num_rows=self.num_rows,
      vocab_size=self.model.config.vocab_size,
    )

  def _read(self, now, tokens, reset, mask):
    inputs = self._check(tokens, reset, mask)
    return session_programs.read(self.programs, self.prepared, now, inputs)

  def _with(self, now: session_programs.Snapshot) -> 'Session':
    """Returns a session with other rows, which is in no file yet."""
    other = self.fork()
    other._now, other._seen = now, session_files.Seen({})
    other.mark()
    return other

  def _restore(self, path, content) -> None:
    """Takes the state of a file, after checking it against the checkpoint."""
    session_files.check_model(path, content, self.fingerprint)
    self._now = session_blocks.unpack(
      path,
      content,
      self.programs,
      self.prepared,
      vocab_size=self.model.config.vocab_size,
    )
    self._seen = self._seen.add(path, content.metadata['sha256'])
    self.mark()


def join(sessions: Sequence[Session]) -> Session:
  """Returns one session with the rows of several sessions on one model.

  Args:
    sessions: At least one; all with the same model, parameters and levels.

  Returns:
    A session that shares nothing with them.

  Raises:
    errors.UserError: If there are none, or their parameters or levels differ.
  """
  if not sessions:
    raise errors.UserError('there is no session to join; give at least one.')
  first = sessions[0]
  for other in sessions[1:]:
    if other.params is not first.params or other.inner != first.inner:
      raise errors.UserError(
        'sessions of different checkpoints or levels cannot be joined.'
      )
  snapshots = [session.now for session in sessions]
  return first._with(session_programs.join_rows(snapshots))
