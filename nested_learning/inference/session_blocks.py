"""A session as the arrays of its file: blocks that differ from its start.

Of every array, a file holds the smallest block around all numbers that changed:
nothing of levels that have not stepped, and the part of a cache that was
written. The open segment begins with the model's state where it opened, and
holds what has changed since.
"""

from collections.abc import Callable, Mapping
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning.inference import session_compiled
from nested_learning.inference import session_files
from nested_learning.inference import session_programs

# Written whole: its size in a file shows that there are as many rows as said.
_WHOLE = 'logits'


def pack(
  metadata: Mapping[str, str], now: session_programs.Snapshot, start: Any
) -> session_files.Content:
  """Returns the content of a session's file.

  Args:
    metadata: See `session_files.Content`.
    now: The session.
    start: The state of one row at a session's start.
  """
  return session_files.Content(
    metadata, pack_state(now.clocks, now.state, start)
  )


def unpack(
  path: str | os.PathLike,
  content: session_files.Content,
  programs: session_compiled.Programs,
  params: Any,
  *,
  vocab_size: int,
) -> session_programs.Snapshot:
  """Returns the session in a file, after checking it against the model.

  Args:
    path: The file, for messages.
    content: Its content.
    programs: The compiled functions.
    params: Parameters from `programs.prepare`.
    vocab_size: Tokens of the model.

  Raises:
    errors.UserError: It is that of no session on this model.
  """
  clock, age = (content.arrays.get(name) for name in ('clock', 'age'))
  for x in (clock, age):
    if x is None or x.ndim != 1 or x.dtype != np.int64 or not len(x):
      raise errors.UserError(
        f'the session {path} has no clocks of its rows; use another path.'
      )
  # Shapes alone: nothing is allocated for rows that the file does not have.
  like = programs.shapes(params, len(clock))
  start = lambda: programs.init(params, 1)
  state = unpack_state(path, content, ('clock', 'age'), like, start)
  segment = state.stream.segment
  tokens = np.asarray(segment.tokens)
  fits = (
    clock.shape == age.shape
    and (clock >= 0).all()
    and (age >= 0).all()
    and (clock % programs.segment_size == np.asarray(segment.count)).all()
    and (tokens >= 0).all()
    and (tokens < vocab_size).all()
  )
  if not fits:
    raise errors.UserError(
      f'the session {path} has clocks or tokens that no session of this '
      'model can have; use another path.'
    )
  return session_programs.Snapshot(state, clock.copy(), age.copy())


def measure(content: session_files.Content) -> dict[str, int]:
  """Returns the bytes of a file's arrays, by what they belong to."""
  sizes = {'levels': 0, 'memories and caches': 0}
  for name, x in content.arrays.items():
    is_level = name.startswith('state/stream/levels/')
    sizes['levels' if is_level else 'memories and caches'] += x.nbytes
  return sizes


def pack_state(
  clocks: Mapping[str, np.ndarray], state: Any, start: Any
) -> dict[str, np.ndarray]:
  """Returns the arrays of a file by name.

  Args:
    clocks: int64 [b] by name.
    state: A tree of arrays [b, ...].
    start: The same tree at a session's start, of one row.
  """
  arrays, known = dict(clocks), dict(session_files.leaves(state))
  first = dict(session_files.leaves(start))
  for name, x in known.items():
    x = np.asarray(x)
    block = tuple(slice(0, n) for n in x.shape)
    if name != _WHOLE:
      block = _find_block(x, _reference(name, x.shape, known, first))
    if block is not None:
      corner = ','.join(str(part.start) for part in block)
      arrays[f'state/{name}@{corner}'] = x[block]
  return arrays


def unpack_state(
  path: str | os.PathLike,
  content: session_files.Content,
  clocks: tuple[str, ...],
  like: Any,
  make_start: Callable[[], Any],
) -> Any:
  """Returns the state in a file, after checking every shape.

  Args:
    path: The file, for messages.
    content: Its content.
    clocks: Names of the arrays that are not of the state.
    like: A tree of the state's shapes and types.
    make_start: Returns that tree at a session's start, of one row; called when
      the file has been checked.

  Returns:
    A tree of arrays.

  Raises:
    errors.UserError: If an array is missing, superfluous or does not fit.
  """
  shapes = dict(session_files.leaves(like))
  blocks, more = {}, []
  for key, found in content.arrays.items():
    name, _, corner = key.removeprefix('state/').partition('@')
    if key in clocks:
      continue
    if name not in shapes or not key.startswith('state/'):
      more.append(key)
      continue
    place = _place(corner, found, shapes[name])
    if place is None:
      raise _does_not_fit(path, name, f'{found.dtype}{found.shape}', shapes)
    blocks[name] = place, found
  if more:
    raise errors.UserError(
      f'the session {path} has arrays that this model has not '
      f'({", ".join(sorted(more)[:3])}); use the model that it was begun with.'
    )
  if _WHOLE in shapes and _WHOLE not in blocks:
    raise _does_not_fit(path, _WHOLE, 'nothing', shapes)
  first, known = dict(session_files.leaves(make_start())), {}
  for name, x in shapes.items():
    array = np.array(_reference(name, x.shape, known, first))
    if name in blocks:
      place, found = blocks[name]
      array[place] = found
    known[name] = array
  return jax.tree.structure(like).unflatten(map(jnp.asarray, known.values()))


def _reference(name, shape, known, first) -> np.ndarray:
  """Returns the values that a block of an array is a change of."""
  # In the order of a state, the model's comes before the open segment's.
  twin = name.replace('stream/segment/', 'stream/', 1)
  if twin != name and twin in known:
    return np.asarray(known[twin])
  return np.broadcast_to(np.asarray(first[name]), shape)


def _find_block(x: np.ndarray, like: np.ndarray) -> tuple[slice, ...] | None:
  """Returns the block of all rows with every change; None without changes."""
  bits = f'u{x.dtype.itemsize}'  # the bits of numbers, also of NaN and -0
  changed = np.not_equal(
    *(np.ascontiguousarray(a).view(bits) for a in (x, like))
  )
  if not changed.any():
    return None
  block = [slice(0, len(x))]
  for axis in range(1, x.ndim):
    others = tuple(i for i in range(x.ndim) if i != axis)
    (hit,) = np.nonzero(changed.any(axis=others))
    block.append(slice(int(hit[0]), int(hit[-1]) + 1))
  return tuple(block)


def _place(corner: str, found: np.ndarray, x: Any) -> tuple[slice, ...] | None:
  """Returns the place of a block, or None if the array does not have it."""
  starts = corner.split(',') if corner else ['0'] * found.ndim
  fits = (found.dtype, found.ndim) == (x.dtype, len(x.shape))
  if not fits or len(starts) != found.ndim:
    return None
  if not all(start.isascii() and start.isdigit() for start in starts):
    return None
  place = tuple(
    slice(int(a), int(a) + n) for a, n in zip(starts, found.shape, strict=True)
  )
  rows = place[:1] == (slice(0, x.shape[0]),)
  whole = bool(corner) or found.shape == x.shape
  inside = all(s.stop <= n for s, n in zip(place, x.shape, strict=True))
  return place if rows and whole and inside else None


def _does_not_fit(path, name, got, shapes) -> errors.UserError:
  x = shapes[name]
  return errors.UserError(
    f'the session {path} has {got} for state/{name}, and this model has '
    f'{x.dtype}{x.shape}; use the model that it was begun with '
    '(model.max_length counts, where attention holds all tokens).'
  )
