"""Draws from many sessions together: a row per session, settings by row.

    slots = DrawSlots(session.programs, session.prepared, num_slots=8)
    slot = slots.add(session.state, settings)
    drawn = slots.draw()  # one token of every slot in use, by slot
    slots.remove(slot)

The arrays of a few rows lie together, so that one program draws a token in each
of them. Their number is a power of two, so few programs are compiled, and grows
and shrinks with the slots in use. Levels rest while tokens are drawn, so a row
is not needed any more once its text is complete.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_learning.inference import sampling

MAX_TOP = 20  # alternatives of a token that a row can ask for


class DrawSettings(NamedTuple):
  """Settings of one row; see `sampling.sample`.

  Attributes:
    seed: The same seed draws the same tokens as `Session.generate` with
      `jax.random.key(seed)`.
    temperature: 0 is greedy.
    top_k: None keeps all tokens.
    top_p: 1 keeps all tokens.
    num_top: Most likely tokens that are reported with each one that is drawn.
  """

  seed: int = 0
  temperature: float = 1.0
  top_k: int | None = None
  top_p: float = 1.0
  num_top: int = 0


class Rows(NamedTuple):
  """Settings of the rows of a program, all [b].

  Attributes:
    keys: uint32 [b, 2], data of the rows' keys.
    step: int32, number of the next token.
    temperature: float32.
    top_k: int32.
    top_p: float32.
    active: bool, False for rows that nobody uses.
  """

  keys: Any
  step: Any
  temperature: Any
  top_k: Any
  top_p: Any
  active: Any


class Drawn(NamedTuple):
  """A token of every row, or of one.

  Attributes:
    token: int32 [b].
    logprob: float32 [b], its log-probability in nats at temperature 1.
    top_tokens: int32 [b, n], the most likely tokens, best first.
    top_logprobs: float32 [b, n].
  """

  token: Any
  logprob: Any
  top_tokens: Any
  top_logprobs: Any


def make_draw_token(learner: Any) -> Callable[..., tuple[Drawn, Any]]:
  """Makes `draw(params, state, rows, vocab_size=, num_top=)`.

  It draws a token in every active row and reads it, with levels at rest. The
  state is a `SessionState` and is donated. Other rows do not change.

  Args:
    learner: A model whose levels learn.

  Returns:
    A compiled function that returns `Drawn` and the next state.
  """

  def draw(params, state, rows: Rows, *, vocab_size: int, num_top: int):
    logits = state.logits[:, :vocab_size]
    keys = jax.random.wrap_key_data(rows.keys)
    token = sampling.sample_rows(
      jax.vmap(jax.random.fold_in)(keys, rows.step),
      logits,
      temperature=rows.temperature,
      top_k=rows.top_k,
      top_p=rows.top_p,
    )
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, num_top)
    after, stream = learner.decode(
      params, state.stream, token[:, None], mask=rows.active[:, None]
    )
    after = jnp.where(rows.active[:, None], after[:, 0], state.logits)
    return (
      Drawn(token, chosen, top_tokens, top_logprobs),
      state._replace(stream=stream, logits=after),
    )

  return jax.jit(
    draw, static_argnames=('vocab_size', 'num_top'), donate_argnums=1
  )


@dataclasses.dataclass
class _Slot:
  settings: DrawSettings
  key: np.ndarray  # uint32 [2]
  step: int = 0


class DrawSlots:
  """A fixed number of slots, each for one row to draw from."""

  def __init__(
    self, programs: Any, params: Any, *, num_slots: int, vocab_size: int
  ):
    """Makes empty slots.

    Args:
      programs: Programs of sessions, `Session.programs`.
      params: Parameters from `programs.prepare`.
      num_slots: Most rows at a time, at least 1.
      vocab_size: Only tokens below it are drawn.
    """
    self._programs, self._params = programs, params
    self._num_slots, self._vocab_size = num_slots, vocab_size
    self._slots: dict[int, _Slot] = {}  # by number, which a row keeps
    self._order: list[int | None] = []  # the number of each row of the state
    self._state: Any = None

  def __len__(self) -> int:
    """Returns the number of slots in use."""
    return len(self._slots)

  @property
  def is_full(self) -> bool:
    """Whether no slot is free."""
    return len(self._slots) >= self._num_slots

  def add(self, state: Any, settings: DrawSettings) -> int:
    """Takes a slot.

    Args:
      state: A `SessionState` of one row; it is copied.
      settings: How tokens are drawn.

    Returns:
      The slot's number, until `remove`.

    Raises:
      ValueError: If no slot is free.
    """
    if self.is_full:
      raise ValueError(f'all {self._num_slots} slots are in use.')
    number = min(set(range(self._num_slots)) - set(self._slots))
    # As in Session.generate, whose only row has the number 0.
    key = sampling.row_keys(jax.random.key(settings.seed), np.zeros(1, int))
    data = np.asarray(jax.random.key_data(key))[0]
    self._slots[number] = _Slot(settings, data)
    self._resize(state)
    row = self._order.index(None)
    self._order[row] = number
    self._state = _put(self._state, state, row)
    return number

  def remove(self, number: int) -> None:
    """Frees a slot."""
    del self._slots[number]
    self._order[self._order.index(number)] = None
    if not self._slots:
      self._order, self._state = [], None

  def draw(self) -> dict[int, Drawn]:
    """Draws a token in every slot in use, and reads it."""
    if not self._slots:
      return {}
    self._resize()
    asked = max(slot.settings.num_top for slot in self._slots.values())
    drawn, self._state = self._programs.draw_token(
      self._params,
      self._state,
      self._rows(),
      vocab_size=self._vocab_size,
      num_top=min(MAX_TOP, self._vocab_size) if asked else 0,
    )
    drawn = jax.device_get(drawn)
    found = {}
    for row, number in enumerate(self._order):
      if number is not None:
        slot = self._slots[number]
        slot.step += 1
        one = jax.tree.map(lambda x, row=row: x[row], drawn)
        num_top = slot.settings.num_top
        found[number] = one._replace(
          top_tokens=one.top_tokens[:num_top],
          top_logprobs=one.top_logprobs[:num_top],
        )
    return found

  def _rows(self) -> Rows:
    empty = _Slot(DrawSettings(), np.zeros(2, np.uint32))
    slots = [self._slots.get(number, empty) for number in self._order]
    settings = [slot.settings for slot in slots]
    every = self._vocab_size
    return Rows(
      keys=np.stack([slot.key for slot in slots]),
      step=np.array([slot.step for slot in slots], np.int32),
      temperature=np.array([x.temperature for x in settings], np.float32),
      # Larger numbers keep all tokens, and need not fit an int32.
      top_k=np.array(
        [min(x.top_k or every, every) for x in settings], np.int32
      ),
      top_p=np.array([x.top_p for x in settings], np.float32),
      active=np.array([number is not None for number in self._order]),
    )

  def _resize(self, row: Any = None) -> None:
    """Makes the number of rows the least power of two that holds the slots.

    Shrinks only to less than a half, since every change copies the rows.

    Args:
      row: State of a new row, whose shapes an empty batch takes; None for no
        new row.
    """
    needed = 1 << (len(self._slots) - 1).bit_length()
    width = len(self._order)
    if needed == width or (needed == width // 2 and row is None):
      return
    if width > needed and row is not None:
      return  # a row is free
    kept = [i for i, number in enumerate(self._order) if number is not None]
    index = np.array([*kept, *[0] * (needed - len(kept))])
    state = row if self._state is None else self._state
    self._state = _take(state, index)
    order = [self._order[i] for i in kept]
    self._order = order + [None] * (needed - len(kept))


@functools.partial(jax.jit, donate_argnums=0)
def _put(state, row, index):
  """Replaces one row of a state of several."""
  return jax.tree.map(lambda x, y: x.at[index].set(y[0]), state, row)


@jax.jit
def _take(state, index):
  """Returns rows of a state, which may repeat."""
  return jax.tree.map(lambda x: x[index], state)
