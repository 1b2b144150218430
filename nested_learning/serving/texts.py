"""From messages to tokens, and from tokens to a text that ends at a string."""

from collections.abc import Callable, Mapping, Sequence
import hashlib
import json
from typing import Any

import numpy as np

from nested_learning import data as data_lib

# Ends an answer where there is no chat template, beside the end of a document.
PLAIN_STOPS = ('\nuser:', '\nsystem:')
_CONTEXT = 32  # tokens before new ones that decide how these are decoded

Render = Callable[[Sequence[Mapping[str, Any]]], str]


def render_plainly(messages: Sequence[Mapping[str, Any]]) -> str:
  """Renders messages for models without a chat template, a line for each."""
  lines = [f'{x["role"]}: {x["content"]}\n' for x in messages]
  return ''.join(lines) + 'assistant: '


def render_turn(
  render: Render,
  old: Sequence[Mapping[str, Any]],
  new: Sequence[Mapping[str, Any]],
) -> str:
  """Renders new messages as they go on after an answer that was read.

  A template is for whole chats: it may add a system message at the start, and
  it ends an answer. So the whole chat is rendered, and what was read before is
  taken off.

  Args:
    render: Renders messages up to where the model answers.
    old: The messages so far, of which the last is the model's answer. Any chat
      will do in their place.
    new: The messages that follow.

  Returns:
    The text between the answer and the next one.
  """
  before = render(old[:-1]) + old[-1]['content']
  whole = render([*old, *new])
  return whole[len(before) :] if whole.startswith(before) else render(new)


def hash_message(role: str, content: str) -> str:
  """Returns a hash by which a message is known again, without its text."""
  text = json.dumps([role, content])
  return hashlib.sha256(text.encode()).hexdigest()[:32]


class TextStream:
  """Turns tokens into text as they come, and finds the strings that end it.

  A text that could be the start of a stop string is held back until it is
  clear, and so is a character whose last bytes are missing.
  """

  def __init__(
    self,
    tokenizer: data_lib.Tokenizer,
    context: np.ndarray,
    stops: Sequence[str] = (),
  ):
    """Begins a text.

    Args:
      tokenizer: The tokenizer.
      context: int [t], tokens before the text.
      stops: Strings that end it; they are not part of it.
    """
    self._tokenizer = tokenizer
    self._stops = tuple(filter(None, stops))
    self._context = list(context[-_CONTEXT:])
    self._pending: list[int] = []
    # Characters after each token; None inside of a character.
    self._ends: list[int | None] = []
    self._told = 0
    self.text = ''

  def add(self, token: int) -> int | None:
    """Adds a token.

    Returns:
      How many of the tokens make up the text, if a stop string has ended it;
      None to go on.
    """
    self._pending.append(token)
    added = self._tokenizer.decode_after(self._context, self._pending)
    if added:
      self._context = [*self._context, *self._pending][-_CONTEXT:]
      self._pending = []
    searched = max(len(self.text) - max(map(len, self._stops), default=0), 0)
    self.text += added
    self._ends.append(len(self.text) if added else None)
    places = [self.text.find(stop, searched) for stop in self._stops]
    found = [place for place in places if place >= 0]
    if not found:
      return None
    self.text = self.text[: min(found)]
    whole = [
      i + 1
      for i, end in enumerate(self._ends)
      if end is not None and end <= len(self.text)
    ]
    return max(whole, default=0)

  def take(self, *, all: bool = False) -> str:
    """Returns the text that was not returned before.

    Args:
      all: Whether the text is complete, so that nothing is held back.
    """
    end = len(self.text)
    if not all:
      end -= max(
        (
          n
          for stop in self._stops
          for n in range(1, len(stop))
          if self.text.endswith(stop[:n])
        ),
        default=0,
      )
    taken, self._told = self.text[self._told : end], max(self._told, end)
    return taken
