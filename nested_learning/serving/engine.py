"""The engine: works on many requests in turn, without threads or HTTP.

    engine = Engine(session, limits.Limits(), vocab_size=257)
    ticket = engine.submit(Job(lambda: session.now, tokens, draw=...))
    while engine.step():
      pass
    session.move(ticket.outcome.now)

A job reads tokens and then draws some. `step` reads one piece of some jobs, of
at most a segment, and draws one token of every job that draws, so a long text
delays a running answer by a piece at a time. Pieces of several jobs are read by
one program (`inference.read_together`), and so are the tokens of all jobs drawn
(`inference.DrawSlots`).

A job that learns reads what it has drawn once more, as `Session.generate` does
with `keep`: levels rest while tokens are drawn. What is learned is then the
same as in a session alone that draws the same tokens: bit for bit where texts
are read one at a time, see `Limits.read_rows`. A job that does not learn reads
with levels at rest. Nobody sees the snapshot of a job
before it is complete, so a job that fails or is cancelled changes nothing.
"""

import collections
from collections.abc import Callable, Hashable
import dataclasses
from typing import Any, Literal

import jax
import numpy as np

from nested_learning import errors
from nested_learning import inference
from nested_learning.inference import session_programs
from nested_learning.serving import limits as limits_lib


@dataclasses.dataclass(frozen=True)
class Draw:
  """How a job continues what it has read."""

  num_tokens: int  # at most
  settings: inference.DrawSettings = inference.DrawSettings()
  stop_tokens: tuple[int, ...] = ()  # end a text, and are not part of it


@dataclasses.dataclass(frozen=True)
class Job:
  """A request to read tokens, and to draw some.

  Attributes:
    begin: `begin()` returns the snapshot that the job goes on from. It is
      called when the job gets a slot.
    tokens: int32 [t], read first; may be empty where something was read before.
    reset: bool [t], True at a document's first token, or None.
    learn: Whether levels learn from the tokens and from the answer.
    draw: How the text is continued; None only reads.
    measure: Whether to read all again with the levels that have learned it.
    key: Jobs of one session have the same key. A job waits until those before
      it that learn have ended. None waits for nobody.
    on_token: `on_token(drawn)` is called with every token. It returns None to
      go on, or how many of the tokens so far make up the text, which ends it.
    on_end: `on_end(ticket)` is called once the outcome is known.
  """

  begin: Callable[[], session_programs.Snapshot]
  tokens: np.ndarray
  reset: np.ndarray | None = None
  learn: bool = False
  draw: Draw | None = None
  measure: bool = False
  key: Hashable = None
  on_token: Callable[[inference.Drawn], int | None] | None = None
  on_end: Callable[['Ticket'], None] | None = None


@dataclasses.dataclass
class Outcome:
  """The result of a job.

  Attributes:
    now: The session after a job that learns; None otherwise.
    losses: float32 [t], loss of each token that was read, before it was, in
      nats; NaN where it has none.
    tokens: The tokens of the answer, without a stop token.
    answer_losses: float32 [n], as `losses`, of an answer that was learned.
    reason: 'stop' of an answer that has ended, 'length' of one that was cut.
    losses_after: float32 [t + n], as `losses` and `answer_losses`, in the same
      place but with the levels after the job; empty if that was not measured.
  """

  now: session_programs.Snapshot | None
  losses: np.ndarray
  tokens: list[int]
  answer_losses: np.ndarray
  reason: Literal['stop', 'length']
  losses_after: np.ndarray


class Ticket:
  """A job that was submitted.

  Attributes:
    job: The job.
    outcome: Its result; None before the end, and of one that failed.
    error: Why it failed; None otherwise.
    is_cancelled: Whether `Engine.cancel` ended it.
  """

  def __init__(self, job: Job):
    self.job = job
    self.outcome: Outcome | None = None
    self.error: Exception | None = None
    self.is_cancelled = False

  @property
  def has_ended(self) -> bool:
    """Whether the job is complete, failed or cancelled."""
    return bool(self.outcome or self.error or self.is_cancelled)


class _Work:
  """A job in a slot: what it has read and drawn so far."""

  def __init__(self, engine: 'Engine', ticket: Ticket):
    self.ticket, self.job = ticket, ticket.job
    self.slot: int | None = None  # in which it draws
    self.drawn: list[int] = []
    self.reason: Literal['stop', 'length'] = 'length'
    self.before = engine.begin(self.job)
    self.prompt = self.reading = engine.read(
      self.before, self.job.tokens, self.job.reset, learn=self.job.learn
    )
    self.answer: inference.Reading | None = None
    self.again: inference.Reading | None = None
    self.now: session_programs.Snapshot | None = None  # once it has learned


class Engine:
  """Works on the jobs of many sessions on one checkpoint.

  Attributes:
    read_rows: Most texts that are read by one program.
  """

  def __init__(
    self,
    session: inference.Session,
    limits: limits_lib.Limits,
    *,
    vocab_size: int,
  ):
    """Makes an engine without jobs.

    Args:
      session: A session of one row on the checkpoint; it does not change.
      limits: How many jobs may run and wait.
      vocab_size: Only tokens below it are drawn.
    """
    self._programs, self._params = session.programs, session.prepared
    self._model_vocab = session.model.config.vocab_size
    self._limits = limits
    # A CPU reads several rows no faster than one after the other.
    usual = 1 if jax.default_backend() == 'cpu' else limits.num_slots
    self.read_rows = limits.read_rows or usual
    self._slots = inference.DrawSlots(
      self._programs,
      self._params,
      num_slots=limits.num_slots,
      vocab_size=vocab_size,
    )
    self._queue: collections.deque[Ticket] = collections.deque()
    self._reading: collections.deque[_Work] = collections.deque()
    self._drawing: dict[int, _Work] = {}

  @property
  def num_waiting(self) -> int:
    """Jobs without a slot."""
    return len(self._queue)

  @property
  def num_running(self) -> int:
    """Jobs in a slot."""
    return len(self._reading) + len(self._drawing)

  @property
  def max_stream(self) -> int | None:
    """Most tokens of a prompt and its answer; None for any number."""
    return self._programs.max_stream

  def submit(self, job: Job) -> Ticket:
    """Queues a job.

    Raises:
      limits_lib.RequestError: If the queue is full, or the job is too long.
      errors.UserError: If the model does not have a token, or cannot hold them.
    """
    self.check(job)
    most = self._limits.num_slots + self._limits.max_queue
    if self.num_running + self.num_waiting >= most:
      raise limits_lib.RequestError(
        f'{self.num_running} requests are in work and {self.num_waiting} wait, '
        'which is all that this server takes; try again later.',
        status=429,
        code='queue_full',
      )
    ticket = Ticket(job)
    self._queue.append(ticket)
    return ticket

  def check(self, job: Job) -> None:
    """Checks that a job can be done, before it waits for a slot.

    Raises:
      limits_lib.RequestError: If it is too long or empty.
      errors.UserError: If the model does not have a token.
    """
    num_tokens = job.draw.num_tokens if job.draw else 0
    for value, limit, verb in (
      (len(job.tokens), self._limits.max_read_tokens, 'read'),
      (num_tokens, self._limits.max_draw_tokens, 'drawn'),
    ):
      if value > limit:
        raise limits_lib.RequestError(
          f'{value} tokens to be {verb} are more than the {limit} that this '
          'server allows in a request; send fewer.',
          code='too_many_tokens',
        )
    if len(job.tokens):
      tokens = np.asarray(job.tokens)
      inference.check_tokens(tokens, self._model_vocab)
    elif job.draw is None:
      raise limits_lib.RequestError(
        'there is nothing to read; give some text.', code='empty_text'
      )
    length, limit = len(job.tokens) + num_tokens, self.max_stream
    # Levels learn from a text of any length; its mixers begin new streams.
    bounded = job.draw is not None or not job.learn
    if limit is not None and bounded and length > limit:
      raise limits_lib.RequestError(
        f'{len(job.tokens)} tokens and {num_tokens} more to draw do not fit '
        f'the {limit} that the model holds; shorten the prompt or lower '
        'max_tokens.',
        code='context_length_exceeded',
      )

  def cancel(self, ticket: Ticket) -> None:
    """Ends a job, if it has not ended; its session stays as it was."""
    if ticket.has_ended:
      return
    if ticket in self._queue:
      self._queue.remove(ticket)
    for work in self._running():
      if work.ticket is ticket:
        self._release(work)
    ticket.is_cancelled = True
    self._tell(ticket)

  def cancel_all(self) -> None:
    """Ends all jobs; their sessions stay as they were."""
    running = [work.ticket for work in self._running()]
    for ticket in [*self._queue, *running]:
      self.cancel(ticket)

  def step(self) -> bool:
    """Reads a piece of some jobs, and draws a token of all others.

    Returns:
      Whether there is more to do.
    """
    self._admit()
    self._read()
    for slot, drawn in self._draw().items():
      if slot in self._drawing:  # what another job told may have cancelled it
        self._guard(self._drawing[slot], self._take, drawn)
    return bool(self._queue or self._reading or self._drawing)

  def begin(self, job: Job) -> session_programs.Snapshot:
    """Returns the snapshot from which a job reads; see `Job.begin`."""
    now = job.begin()
    if job.draw is not None:
      length = len(job.tokens) + job.draw.num_tokens
      now = session_programs.forget(self._programs, self._params, now, length)
      if not len(job.tokens) and not now.clock.all():
        raise limits_lib.RequestError(
          'nothing was read yet that could be continued; give a prompt.',
          code='empty_prompt',
        )
    return now

  def read(
    self,
    now: session_programs.Snapshot,
    tokens: Any,
    reset: Any,
    *,
    learn: bool,
  ) -> inference.Reading:
    """Begins to read tokens for a job, or nothing."""
    inputs = None
    if len(tokens):
      inputs = session_programs.check_inputs(
        tokens, reset, None, num_rows=1, vocab_size=self._model_vocab
      )
    return inference.Reading(self._programs, now, inputs, learn=learn)

  def _read(self) -> None:
    """Reads a piece of the job whose turn it is, and of those like it."""
    group = inference.take_group(
      [work.reading for work in self._reading], most=self.read_rows
    )
    works = [work for work in self._reading if work.reading in group]
    if group:
      try:
        found = inference.read_together(self._programs, self._params, group)
      except Exception as error:  # such as a device that has run out of memory
        self._fail_all(works, error)
        return
      for work, done in zip(works, found, strict=True):
        if work in self._reading:  # what another job told may have cancelled it
          self._reading.remove(work)
          self._reading.append(work)  # behind those that wait for their turn
          self._guard(work, self._take_piece, done)
    for work in list(self._reading):
      if work.reading.piece is None and work in self._reading:
        self._guard(work, self._end_reading)

  def _draw(self) -> dict[int, inference.Drawn]:
    """Draws a token for every job that draws; an error ends these jobs."""
    try:
      return self._slots.draw()
    except Exception as error:  # such as a device that has run out of memory
      self._fail_all(list(self._drawing.values()), error)
      return {}

  def _admit(self) -> None:
    """Gives free slots to the jobs that wait, oldest first."""
    busy = {work.job.key for work in self._running() if work.job.learn}
    waiting, self._queue = self._queue, collections.deque()
    for ticket in waiting:
      job = ticket.job
      free = self.num_running < self._limits.num_slots
      if free and (job.key is None or job.key not in busy):
        try:
          self._reading.append(_Work(self, ticket))
        except Exception as error:  # of this job; the others go on
          self._fail(ticket, error)
          continue
      else:
        self._queue.append(ticket)
      if job.learn:
        busy.add(job.key)

  def _running(self) -> list[_Work]:
    return [*self._reading, *self._drawing.values()]

  def _guard(self, work: _Work, function, *args) -> bool:
    """Calls a function of a job; an error ends that job alone."""
    try:
      return function(work, *args)
    except Exception as error:
      self._release(work)
      self._fail(work.ticket, error)
      return False

  def _take_piece(self, work: _Work, done: session_programs.PieceRead) -> None:
    """Takes a piece that was read."""
    if not np.isfinite(done.losses).all():
      raise _diverged('a token has no finite loss')
    work.reading.take(done)

  def _end_reading(self, work: _Work) -> None:
    """Goes on with a job that has read its text, or learned its answer."""
    self._reading.remove(work)
    if work.job.draw is not None and work.answer is None:
      state = work.reading.now.state
      work.slot = self._slots.add(state, work.job.draw.settings)
      self._drawing[work.slot] = work
    else:
      self._end_learning(work)

  def _take(self, work: _Work, drawn: inference.Drawn) -> bool:
    """Takes a token that was drawn; returns whether the job has ended."""
    draw, token = work.job.draw, int(drawn.token)
    if not np.isfinite(drawn.logprob):
      raise _diverged('the model predicts no finite probabilities')
    kept = None
    if token in draw.stop_tokens:
      kept = len(work.drawn)
    else:
      work.drawn.append(token)
      if work.job.on_token is not None:
        kept = work.job.on_token(drawn)
    if kept is None and len(work.drawn) < draw.num_tokens:
      return False
    if kept is not None:
      work.reason = 'stop'
      del work.drawn[kept:]
    self._release(work)
    if work.job.learn and work.drawn:
      tokens, now = np.array(work.drawn, np.int32), work.reading.now
      work.answer = work.reading = self.read(now, tokens, None, learn=True)
      self._reading.append(work)
    else:
      self._end_learning(work)
    return True

  def _end_learning(self, work: _Work) -> None:
    """Ends a job, or reads it again to measure what was learned."""
    if work.job.learn and work.again is None:
      work.now = work.reading.now
      _check_health(work.before, work.now)
      if work.job.measure and self._can_measure(work):
        work.again = work.reading = self._read_again(work)
        self._reading.append(work)
        return
    losses = lambda x: np.zeros(0, np.float32) if x is None else x.losses
    work.ticket.outcome = Outcome(
      work.now,
      work.prompt.losses,
      work.drawn,
      losses(work.answer),
      work.reason,
      losses(work.again),
    )
    self._tell(work.ticket)

  def _read_again(self, work: _Work) -> inference.Reading:
    """Begins to read text and answer in their place, with the levels after."""
    job, state, after = work.job, work.before.state, work.now.state.stream
    state = state._replace(stream=state.stream._replace(levels=after.levels))
    tokens = np.concatenate([job.tokens, work.drawn]).astype(np.int32)
    reset = np.zeros(len(tokens), bool)
    if job.reset is not None:
      reset[: len(job.reset)] = job.reset
    now = work.before._replace(state=state)
    return self.read(now, tokens, reset, learn=False)

  def _can_measure(self, work: _Work) -> bool:
    """Returns whether a level has stepped, and the mixers hold the text."""
    before, limit = work.before, self.max_stream
    length = int(before.age[0]) + len(work.job.tokens) + len(work.drawn)
    steps = session_programs.count_steps(before, work.now)
    return any(steps.values()) and (limit is None or length <= limit)

  def _release(self, work: _Work) -> None:
    if work in self._reading:
      self._reading.remove(work)
    if self._drawing.get(work.slot) is work:
      del self._drawing[work.slot]
      self._slots.remove(work.slot)

  def _fail_all(self, works: list[_Work], error: Exception) -> None:
    for work in works:
      self._release(work)
      self._fail(work.ticket, error)

  def _fail(self, ticket: Ticket, error: Exception) -> None:
    ticket.error = error
    self._tell(ticket)

  def _tell(self, ticket: Ticket) -> None:
    if ticket.job.on_end is not None:
      ticket.job.on_end(ticket)


def _check_health(before, after) -> None:
  """Raises an error if a level has diverged since `before`."""
  old, new = before.state.stream.levels, after.state.stream.levels
  for name, level in new.items():
    if np.any(np.asarray(level.frozen) > np.asarray(old[name].frozen)):
      raise _diverged(f'level {name!r} has diverged')


def _diverged(reason: str) -> errors.UserError:
  return limits_lib.RequestError(
    f'{reason}; nothing of the request was kept. Roll the session back, or '
    'begin one with a lower learning rate.',
    status=422,
    code='diverged',
  )
