"""The service: requests in text, on sessions of the store, by the engine.

Its methods are called by one thread, which calls `step` again and again.
"""

from collections.abc import Callable
import dataclasses
import pathlib
import time
from typing import NamedTuple

import numpy as np

from nested_learning import inference
from nested_learning.serving import engine as engine_lib
from nested_learning.serving import limits as limits_lib
from nested_learning.serving import requests as requests_lib
from nested_learning.serving import store as store_lib
from nested_learning.serving import texts

_TICK_SECONDS = 1.0
# Stands for the messages that a session has read and nobody sends again.
_EARLIER = (
  {'role': 'user', 'content': '?'},
  {'role': 'assistant', 'content': '!'},
)


class Running(NamedTuple):
  """A request in work; see `Service.start`."""

  ticket: engine_lib.Ticket
  num_read: int


class Service:
  """Serves a checkpoint and its sessions."""

  def __init__(
    self,
    checkpoint: requests_lib.Checkpoint,
    folder: pathlib.Path,
    limits: limits_lib.Limits,
    *,
    clock: Callable[[], float] = time.time,
  ):
    """Opens the store and makes the engine.

    Args:
      checkpoint: The model.
      folder: Folder of the sessions.
      limits: How much is served.
      clock: Seconds since 1970.

    Raises:
      errors.UserError: If the folder cannot be used.
    """
    self.checkpoint, self.limits = checkpoint, limits
    self.store = store_lib.Store(
      checkpoint.session, folder, limits, clock=clock
    )
    self.engine = engine_lib.Engine(
      checkpoint.session, limits, vocab_size=checkpoint.tokenizer.vocab_size
    )
    self.is_ending = False
    self._next_tick = 0.0

  def start(
    self,
    request: requests_lib.Request,
    on_end: Callable[[requests_lib.Result | Exception], None],
    on_text: Callable[[str, list[requests_lib.Drawn]], None] | None = None,
  ) -> Running:
    """Queues a request.

    Args:
      request: The request.
      on_end: Called with the result, or with the reason why there is none.
      on_text: Called with pieces of the answer and their tokens.

    Returns:
      The ticket, for `engine.cancel`, and how many tokens will be read.

    Raises:
      limits_lib.RequestError: If it is refused.
      errors.UserError: If it cannot be rendered or encoded.
    """
    work = _Work(self, request, on_end, on_text)
    entry = request.session if request.learn else None
    if entry is not None:
      entry.num_jobs += 1
    try:
      ticket = self.engine.submit(work.job())
    except Exception:
      if entry is not None:
        entry.num_jobs -= 1
      raise
    return Running(ticket, len(work.tokens))

  def step(self) -> bool:
    """Works on the requests; returns whether there is more to do at once."""
    now = time.monotonic()
    if now >= self._next_tick:
      self._next_tick = now + _TICK_SECONDS
      self.store.tick()
    return self.engine.step()

  def encode(
    self, request: requests_lib.Request, num_known: int = 0
  ) -> tuple[np.ndarray, bool]:
    """Encodes a request.

    Args:
      request: The request.
      num_known: How many of its messages the session has read.

    Returns:
      The tokens to read, and whether a document begins with them.
    """
    tokenizer, entry = self.checkpoint.tokenizer, request.session
    if request.messages:
      messages, render = list(request.messages), self.checkpoint.render_chat
      if entry is not None and entry.messages:
        earlier = messages[:num_known] or _EARLIER
        text = texts.render_turn(render, earlier, messages[num_known:])
        return tokenizer.encode_marked(text), False
      tokens = tokenizer.encode_marked(render(messages))
      if tokens[:1].tolist() != [tokenizer.document_id]:
        tokens = np.concatenate([[tokenizer.document_id], tokens])
      return tokens.astype(np.int32), True
    if request.text is None:
      return np.zeros(0, np.int32), False
    if not isinstance(request.text, str):
      return np.asarray(request.text, np.int64), request.document
    tokens = tokenizer.encode(request.text)
    if request.document:
      tokens = np.concatenate([[tokenizer.document_id], tokens])
    return tokens.astype(np.int32), request.document

  def end_requests(self) -> None:
    """Ends all requests with an error, before the server ends."""
    self.is_ending = True
    self.engine.cancel_all()

  def close(self) -> None:
    """Saves all sessions; what is in work is lost."""
    self.store.close()


def _known(messages, hashes: tuple[str, ...]) -> int:
  """Returns how many messages were read before: all that are known, or none."""
  sent = tuple(texts.hash_message(x['role'], x['content']) for x in messages)
  is_known = len(sent) > len(hashes) and sent[: len(hashes)] == hashes
  return len(hashes) if is_known else 0


class _Work:
  """A request in work: its text so far, and what happens at its end."""

  def __init__(
    self, service: Service, request: requests_lib.Request, on_end, on_text
  ):
    self.service, self.request = service, request
    self.on_end, self.on_text = on_end, on_text
    # Messages that the session has not read; its own may change until the end.
    entry = request.session
    known = _known(request.messages, entry.messages) if entry else 0
    self.new = list(request.messages)[known:]
    self.tokens, starts = service.encode(request, known)
    self.reset = (np.arange(len(self.tokens)) == 0) & starts
    checkpoint = service.checkpoint
    self.stream = texts.TextStream(
      checkpoint.tokenizer, self.tokens, request.stops
    )
    self.drawn: list[requests_lib.Drawn] = []
    self.num_told = 0

  def job(self) -> engine_lib.Job:
    request, draw = self.request, self.request.draw
    if draw is not None:
      stops = (*draw.stop_tokens, *self.service.checkpoint.stop_tokens)
      draw = dataclasses.replace(draw, stop_tokens=stops)
    entry = request.session
    return engine_lib.Job(
      self.begin,
      self.tokens,
      reset=self.reset,
      learn=request.learn,
      draw=draw,
      measure=request.measure,
      key=None if entry is None else entry.id,
      on_token=self.take,
      on_end=self.end,
    )

  def begin(self):
    entry, store = self.request.session, self.service.store
    return (store.base if entry is None else store.load(entry)).now

  def take(self, drawn: inference.Drawn) -> int | None:
    decode = lambda token: self.service.checkpoint.tokenizer.decode(
      np.array([token])
    )
    top = zip(drawn.top_tokens, drawn.top_logprobs, strict=True)
    self.drawn.append(
      requests_lib.Drawn(
        decode(drawn.token),
        float(drawn.logprob),
        tuple((decode(token), float(x)) for token, x in top),
      )
    )
    kept = self.stream.add(int(drawn.token))
    if kept is None:
      self.tell(self.stream.take())
    return kept

  def tell(self, text: str) -> None:
    if text and self.on_text is not None:
      self.on_text(text, self.drawn[self.num_told :])
      self.num_told = len(self.drawn)

  def end(self, ticket: engine_lib.Ticket) -> None:
    entry = self.request.session if self.request.learn else None
    if entry is not None:
      entry.num_jobs -= 1
    try:
      if ticket.is_cancelled:
        self.on_end(_cancelled(self.service.is_ending))
      elif ticket.error is not None:
        self.on_end(ticket.error)
      else:
        self.finish(ticket.outcome)
    except Exception as error:  # such as a full disk
      self.on_end(error)

  def finish(self, outcome: engine_lib.Outcome) -> None:
    del self.drawn[len(outcome.tokens) :]
    self.num_told = min(self.num_told, len(self.drawn))
    self.tell(self.stream.take(all=True))
    num_read = len(self.tokens)
    result = requests_lib.Result(
      self.stream.text,
      self.drawn,
      outcome.reason,
      num_read=num_read,
      losses={
        'loss': _mean(outcome.losses),
        'loss_after': _mean(outcome.losses_after[:num_read]),
        'answer_loss': _mean(outcome.answer_losses),
        'answer_loss_after': _mean(outcome.losses_after[num_read:]),
      },
    )
    if self.request.session is not None and self.request.learn:
      self.commit(outcome, result)
    self.on_end(result)

  def commit(self, outcome, result: requests_lib.Result) -> None:
    request, entry = self.request, self.request.session
    record = {
      'kind': request.kind,
      'tokens_read': result.num_read,
      'tokens_drawn': len(result.drawn),
      **result.losses,
    }
    if request.log_text:
      text = request.messages or request.text
      record |= {'text': text, 'answer': result.text}
    store = self.service.store
    result.steps = store.commit(
      entry, outcome.now, record, messages=self.messages(result)
    )
    result.position = entry.position

  def messages(self, result: requests_lib.Result) -> tuple[str, ...] | None:
    """Returns the hashes of the messages that the session has read now."""
    if not self.new:
      return None
    said = {'role': 'assistant', 'content': result.text}
    hashes = [
      texts.hash_message(x['role'], x['content']) for x in [*self.new, said]
    ]
    return (*self.request.session.messages, *hashes)


def _cancelled(is_ending: bool) -> limits_lib.RequestError:
  if is_ending:
    return limits_lib.RequestError(
      'the server is ending; the session is as it was. Try again later.',
      status=503,
      code='ending',
    )
  return limits_lib.RequestError(
    'the request was cancelled.', status=499, code='cancelled'
  )


def _mean(losses: np.ndarray) -> float | None:
  known = losses[np.isfinite(losses)]
  return float(known.mean(dtype=np.float64)) if known.size else None
