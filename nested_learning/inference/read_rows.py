"""Reads texts of many sessions together: a row per session, piece by piece.

    readings = [Reading(programs, params, session.now, inputs), ...]
    while group := take_group(readings, most=8):
      for reading, done in zip(group, read_together(programs, params, group)):
        reading.take(done)

Every text is cut where it would be cut alone. Texts whose next pieces are read
by the same program are read by it together, one row each. A text that is alone
is read as by `Session.feed`, bit for bit. Rows of a larger program may be
rounded otherwise, by the matrix products of some backends.
"""

from collections.abc import Hashable, Iterable, Sequence
import functools
from typing import Any

import jax
import numpy as np

from nested_learning.inference import session_compiled
from nested_learning.inference import session_programs


class Reading:
  """A text that a session of one row reads.

  Attributes:
    now: The session after the pieces so far.
    losses: float32 [t], as `PieceRead.losses`; NaN for tokens without one.
    learn: See `session_programs.read`.
    piece: The next piece; None once the text is read.
  """

  def __init__(
    self,
    programs: session_compiled.Programs,
    now: session_programs.Snapshot,
    inputs: session_programs.Inputs | None,
    *,
    learn: bool,
  ):
    """Begins to read.

    Args:
      programs: The compiled functions.
      now: The session before.
      inputs: Tokens of one row; None for none.
      learn: Whether levels learn.
    """
    self.now, self.inputs, self.learn = now, inputs, learn
    length = 0 if inputs is None else inputs.tokens.shape[1]
    self.losses = np.full(length, np.nan, np.float32)
    self._size = programs.segment_size
    self._pieces = iter(())
    if inputs is not None:
      self._pieces = session_programs.cut(programs, now, inputs, learn=learn)
    self.piece = next(self._pieces, None)

  @property
  def program(self) -> Hashable:
    """A key; the next pieces of readings with one key are read together."""
    count = int(self.piece.mask.sum())
    ends = (int(self.now.clock[0]) + count) % self._size == 0
    return self.learn, self.learn and ends, self.learn and count == self._size

  def take(self, done: session_programs.PieceRead) -> None:
    """Goes on to the next piece."""
    self.now = done.now
    self.losses[done.places] = done.losses
    self.piece = next(self._pieces, None)


def take_group(readings: Iterable[Reading], *, most: int) -> list[Reading]:
  """Returns those whose next pieces are read together: the first and its like.

  Their number is a power of two, so that few programs are compiled.

  Args:
    readings: Texts, of which those that are read are left out.
    most: Largest number of them.
  """
  waiting = [reading for reading in readings if reading.piece is not None]
  group = [x for x in waiting if x.program == waiting[0].program][:most]
  return group[: 1 << (len(group).bit_length() - 1)] if group else []


def read_together(
  programs: session_compiled.Programs, params: Any, group: Sequence[Reading]
) -> list[session_programs.PieceRead]:
  """Reads the next piece of every text by one program.

  Args:
    programs: The compiled functions.
    params: Parameters from `programs.prepare`.
    group: Texts that `take_group` returned; they do not change.

  Returns:
    What `Reading.take` takes, of each text.
  """
  learn, width = group[0].learn, group[0].piece.mask.shape[1]
  if len(group) > 1:
    width = programs.segment_size  # one shape for every number of rows
  pad = lambda x: np.pad(x, ((0, 0), (0, width - x.shape[1])))
  parts = [
    session_programs.gather(reading.inputs, reading.piece) for reading in group
  ]
  inputs = session_programs.Inputs(
    *(np.concatenate([pad(x) for x in xs]) for xs in zip(*parts, strict=True))
  )
  now = session_programs.join_rows([reading.now for reading in group])
  done = session_programs.read_piece(programs, params, now, inputs, learn=learn)
  return _split(done, [reading.piece for reading in group])


def _split(done, pieces):
  """Returns what was read row by row, with places in each row's text."""
  states = [done.now.state]
  if len(pieces) > 1:
    states = _take_rows(done.now.state, num_rows=len(pieces))
  found = []
  for i, (state, piece) in enumerate(zip(states, pieces, strict=True)):
    mine, row = done.rows == i, slice(i, i + 1)
    found.append(
      session_programs.PieceRead(
        session_programs.Snapshot(
          state, done.now.clock[row], done.now.age[row]
        ),
        np.zeros(mine.sum(), int),
        piece.index[0, done.places[mine]],
        done.losses[mine],
      )
    )
  return found


@functools.partial(jax.jit, static_argnames='num_rows')
def _take_rows(state, *, num_rows):
  take = lambda i: jax.tree.map(lambda x: x[i : i + 1], state)
  return [take(i) for i in range(num_rows)]
