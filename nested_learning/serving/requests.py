"""Requests to a checkpoint, and their results, in text."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import NamedTuple

from nested_learning import data as data_lib
from nested_learning import inference
from nested_learning.serving import engine as engine_lib
from nested_learning.serving import entries
from nested_learning.serving import texts


class Checkpoint(NamedTuple):
  """A model to serve.

  Attributes:
    name: Its name in the API.
    session: A session of one row that has read nothing.
    tokenizer: Its tokenizer.
    render_chat: Renders messages up to where the model answers.
    stop_tokens: Tokens that end an answer.
    chat_stops: Strings that end an answer in a chat.
  """

  name: str
  session: inference.Session
  tokenizer: data_lib.Tokenizer
  render_chat: texts.Render = texts.render_plainly
  stop_tokens: tuple[int, ...] = ()
  chat_stops: tuple[str, ...] = texts.PLAIN_STOPS


class Drawn(NamedTuple):
  """A token of an answer, as the API reports it.

  Attributes:
    text: The text of the token alone.
    logprob: Its log-probability in nats.
    top: The most likely texts in its place, with theirs.
  """

  text: str
  logprob: float
  top: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Request:
  """A text to read, and how to continue it.

  Attributes:
    kind: 'observe', 'complete' or 'chat', for the audit log.
    text: A text or its tokens; None for none.
    messages: Messages of a chat, in place of the text; each has a role and its
      content.
    session: The session; None begins one for this request alone.
    learn: Whether levels learn from text and answer, and the session keeps it.
    document: Whether the text begins a new document.
    draw: How it is continued; None only reads. Stop tokens are added.
    stops: Strings that end the answer.
    measure: Whether to read text and answer again once a level has stepped,
      for their losses after it.
    log_text: Whether the audit log keeps text and answer.
  """

  kind: str
  text: str | Sequence[int] | None = None
  messages: Sequence[Mapping[str, str]] = ()
  session: entries.Entry | None = None
  learn: bool = False
  document: bool = True
  draw: engine_lib.Draw | None = None
  stops: tuple[str, ...] = ()
  measure: bool = False
  log_text: bool = False


@dataclasses.dataclass
class Result:
  """The result of a request.

  Attributes:
    text: The answer.
    drawn: Its tokens.
    reason: 'stop' or 'length'.
    num_read: Tokens that were read before the answer.
    losses: Mean losses in nats: 'loss' of the text as it was read, before each
      segment was learned, and 'answer_loss' of an answer that was learned;
      'loss_after' and 'answer_loss_after' of the same tokens, in the same
      place, with the levels after the request. None for what was not measured.
    position: Tokens that the session has read; 0 without a session.
    steps: Steps of each level, if the request has learned.
  """

  text: str
  drawn: list[Drawn]
  reason: str
  num_read: int
  losses: dict[str, float | None]
  position: int = 0
  steps: dict[str, int] = dataclasses.field(default_factory=dict)
