"""The store of sessions: in memory while they are in use, otherwise in files.

`entries.Folder` reads and writes the files; the store decides when. Its methods
are called by one thread.
"""

from collections.abc import Callable, Mapping
import hashlib
import pathlib
import secrets
import time
from typing import Any

import numpy as np

from nested_learning import errors
from nested_learning import inference
from nested_learning import levels
from nested_learning.inference import session_programs
from nested_learning.serving import entries
from nested_learning.serving import limits as limits_lib


class Store:
  """Sessions on one checkpoint."""

  def __init__(
    self,
    base: inference.Session,
    folder: pathlib.Path,
    limits: limits_lib.Limits,
    *,
    clock: Callable[[], float] = time.time,
  ):
    """Opens a store, with the sessions that are in its folder.

    Args:
      base: A session of one row that has read nothing; it does not change.
      folder: Its folder, which is made where there is none.
      limits: How many sessions it holds, and when it saves them.
      clock: Seconds since 1970.

    Raises:
      errors.UserError: If another process uses the folder, or it cannot be
        read or written.
    """
    self.base = base
    self._limits, self._clock = limits, clock
    self._folder = entries.Folder(folder, base)
    self._entries = dict(self._folder.found)

  def __len__(self) -> int:
    """Returns the number of sessions."""
    return len(self._entries)

  @property
  def num_resident(self) -> int:
    """Sessions in memory."""
    return sum(x.session is not None for x in self._entries.values())

  def all(self) -> list[entries.Entry]:
    """Returns the sessions, the oldest first."""
    return sorted(self._entries.values(), key=lambda entry: entry.created)

  def find(self, id: str) -> entries.Entry:
    """Returns a session, which need not be in memory.

    Raises:
      limits_lib.RequestError: If there is none of that id.
    """
    entry = self._entries.get(id)
    if entry is None:
      raise limits_lib.RequestError(
        f'there is no session {id[:80]!r}; POST /v1/sessions makes one.',
        status=404,
        code='session_not_found',
      )
    return entry

  def of_user(self, user: str) -> entries.Entry:
    """Returns the session of a user, and makes it at the first request."""
    id = f'user_{hashlib.sha256(user.encode()).hexdigest()[:32]}'
    if id in self._entries:
      return self._entries[id]
    return self._add(self.base.fork(), name=user[:80], id=id, kind='create')

  def create(self, name: str = '') -> entries.Entry:
    """Begins a session at the checkpoint."""
    return self._add(self.base.fork(), name=name, kind='create')

  def fork(self, id: str, name: str = '') -> entries.Entry:
    """Begins a session at the present state of another one."""
    parent = self.find(id)
    session = self.load(parent).fork()
    return self._add(
      session,
      name=name,
      kind='fork',
      messages=parent.messages,
      record={'parent': id},
    )

  def load(self, entry: entries.Entry) -> inference.Session:
    """Returns the state of a session, from its file if it is on the disk.

    Raises:
      errors.UserError: If the file is gone or damaged.
    """
    entry.used = self._clock()
    if entry.session is None:
      self._folder.load(entry)
      self._make_room(entry)
    return entry.session

  def commit(
    self,
    entry: entries.Entry,
    now: session_programs.Snapshot,
    record: Mapping[str, Any],
    *,
    messages: tuple[str, ...] | None = None,
  ) -> dict[str, int]:
    """Makes the result of a request the present state of a session.

    Args:
      entry: The session.
      now: Its state after the request.
      record: What the audit log says about it; see `audit`.
      messages: `entries.Entry.messages` after the request; None to keep them.

    Returns:
      The steps that each level took.
    """
    old = self.load(entry)
    stepped = session_programs.count_steps(old.now, now)
    with entries.undo_on_error(entry):
      entry.before, entry.session = old, old.fork()
      entry.session.move(now)
      entry.messages_before = entry.messages
      if messages is not None:
        entry.messages = messages
      self._changed(entry, {**record, 'steps': stepped})
    return stepped

  def rollback(self, id: str) -> entries.Entry:
    """Returns to the state before the last request that changed a session.

    Raises:
      limits_lib.RequestError: If there is no such state.
    """
    entry = self._idle(id)
    self.load(entry)
    if entry.before is None:
      raise limits_lib.RequestError(
        f'the session {id} has nothing to return to: it keeps one state, that '
        'before the last request that changed it.',
        status=409,
        code='nothing_to_roll_back',
      )
    with entries.undo_on_error(entry):
      entry.session, entry.before = entry.before, None
      entry.messages, entry.messages_before = entry.messages_before, ()
      self._changed(entry, {'kind': 'rollback'})
    return entry

  def reset(self, id: str) -> entries.Entry:
    """Returns to the checkpoint; `rollback` undoes it."""
    entry = self._idle(id)
    session = self.load(entry)
    with entries.undo_on_error(entry):
      entry.before, entry.session = session, self.base.fork()
      entry.messages_before, entry.messages = entry.messages, ()
      self._changed(entry, {'kind': 'reset'})
    return entry

  def health(self, id: str) -> dict[str, Any]:
    """Returns fingerprints, and the health of every level by name."""
    entry = self.find(id)
    session = self.load(entry)
    measured = session.health()
    numbers = {
      name: {k: _number(v) for k, v in level._asdict().items()}
      for name, level in measured.items()
    }
    return {
      'id': entry.id,
      'object': 'session.health',
      'tokens': entry.position,
      'checkpoint': session.fingerprint,
      'fingerprint': session.state_fingerprint(),
      'fingerprint_of_checkpoint': self.base.state_fingerprint(),
      'levels': numbers,
      'warnings': levels.health_warnings(measured),
    }

  def export(self, id: str) -> bytes:
    """Returns the file of a session."""
    entry = self.find(id)
    self.load(entry)
    self._folder.save(entry)
    return self._folder.read(entry)

  def import_file(self, content: bytes, name: str = '') -> entries.Entry:
    """Begins a session at the state in a file that `export` returned.

    Raises:
      limits_lib.RequestError: If it is not a session of this checkpoint.
    """
    try:
      session = self._folder.parse(content)
    except errors.Retryable:
      raise
    except errors.UserError as error:
      raise limits_lib.RequestError(
        str(error), code='foreign_session'
      ) from error
    return self._add(session, name=name, kind='import')

  def delete(self, id: str) -> None:
    """Removes a session and its files."""
    entry = self._idle(id)
    del self._entries[entry.id]
    self._folder.remove(entry.id)

  def audit(self, id: str) -> list[dict[str, Any]]:
    """Returns the log of a session, oldest first.

    Each line says when a change was made (`time`), of which kind, the position
    after it and, of a request, how many tokens it read and drew, their mean
    losses before and after they were learned, and the steps of each level. It
    has the text only if that was asked for. 'crash' is the start of a server
    after one that did not save: the session is at its position again, and what
    lines before it add is lost.
    """
    return self._folder.read_log(self.find(id).id)

  def tick(self) -> None:
    """Saves one session that has waited long enough, and frees idle ones."""
    now, limits = self._clock(), self._limits
    for entry in self._entries.values():
      if entry.session is None:
        continue
      if not entry.num_jobs and now - entry.used > limits.idle_seconds:
        self._evict(entry)
        return
      since = entry.unsaved_since
      if since is not None and now - since >= limits.save_seconds:
        self._folder.save(entry)
        return  # others have their turn between two saves

  def close(self) -> None:
    """Saves all sessions and gives the folder back."""
    try:
      for entry in self._entries.values():
        self._folder.save(entry)
    finally:
      self._folder.close()

  def _add(
    self,
    session: inference.Session,
    *,
    name: str,
    kind: str,
    id: str | None = None,
    messages: tuple[str, ...] = (),
    record: Mapping[str, Any] | None = None,
  ) -> entries.Entry:
    if len(self._entries) >= self._limits.max_sessions:
      raise limits_lib.RequestError(
        f'there are {len(self._entries)} sessions, as many as this server '
        'keeps; delete one.',
        status=429,
        code='too_many_sessions',
      )
    now = self._clock()
    id = f'sess_{secrets.token_hex(12)}' if id is None else id
    entry = entries.Entry(
      id, name, now, now, messages=messages, session=session
    )
    try:
      with entries.undo_on_error(entry):
        self._folder.make(entry)
        self._changed(entry, {'kind': kind, **(record or {})})
        self._folder.save(entry)  # so that its id is known after a crash
    except errors.UserError:
      self._folder.remove(id)
      raise
    self._entries[id] = entry
    self._make_room(entry)
    return entry

  def _idle(self, id: str) -> entries.Entry:
    """Returns a session that no request changes at the moment."""
    entry = self.find(id)
    if entry.num_jobs:
      raise limits_lib.RequestError(
        f'a request of the session {id} is in work; wait for it to end.',
        status=409,
        code='session_busy',
      )
    return entry

  def _changed(self, entry: entries.Entry, record: Mapping[str, Any]) -> None:
    now = self._clock()
    entry.used = now
    entry.position = int(entry.session.clock[0])
    if entry.unsaved_since is None:
      entry.unsaved_since = now
    self._log(entry, record)

  def _log(self, entry: entries.Entry, record: Mapping[str, Any]) -> None:
    line = {'time': self._clock(), **record, 'position': entry.position}
    self._folder.log(entry.id, line)

  def _make_room(self, keep: entries.Entry) -> None:
    """Frees the sessions whose last use is longest ago, if there are many."""
    resident = [x for x in self._entries.values() if x.session is not None]
    resident.sort(key=lambda entry: entry.used)
    surplus = len(resident) - self._limits.max_resident
    idle = [x for x in resident if not x.num_jobs and x is not keep]
    for entry in idle[: max(surplus, 0)]:
      self._evict(entry)

  def _evict(self, entry: entries.Entry) -> None:
    self._folder.save(entry)
    entry.session = entry.before = None


def _number(x: Any) -> float | int | bool | None:
  """Returns a number that JSON can hold."""
  value = np.asarray(x)[0].item()
  return value if np.isfinite(value) else None
