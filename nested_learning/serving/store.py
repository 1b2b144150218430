"""The store of sessions: in memory while they are in use, otherwise in files.

A session is a folder below the store's own:

    ID/now.session     its state, in the format of `inference.session_files`
    ID/before.session  its state before the last request that it learned from
    ID/session.json    its name, times, and hashes of the messages that it read
    ID/audit.jsonl     a line for each change

The store makes the names of all folders and files; no text of a request becomes
a part of a path. Its methods are called by one thread.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import secrets
import shutil
import time
from typing import Any

import numpy as np

from nested_learning import errors
from nested_learning import files
from nested_learning import inference
from nested_learning import levels
from nested_learning.inference import session_programs
from nested_learning.serving import limits as limits_lib

_NOW, _BEFORE = 'now.session', 'before.session'
_ABOUT, _AUDIT = 'session.json', 'audit.jsonl'


@dataclasses.dataclass
class Entry:
  """A session of the store.

  Attributes:
    id: Name of its folder.
    name: Name that the user chose; '' for none.
    created: Seconds since 1970.
    used: Seconds since 1970 of the last request.
    position: Tokens that it has read.
    messages: Hashes of the messages of a chat that it has read, in order.
    session: Its state; None while it is on the disk alone.
    before: Its state before it last learned or was reset; None for none.
    messages_before: `messages` of that state.
    num_jobs: Requests in work that learn.
    unsaved_since: Seconds since 1970 of the first change that is not in its
      file; None if there is none.
  """

  id: str
  name: str
  created: float
  used: float
  position: int = 0
  messages: tuple[str, ...] = ()
  session: inference.Session | None = None
  before: inference.Session | None = None
  messages_before: tuple[str, ...] = ()
  num_jobs: int = 0
  unsaved_since: float | None = None

  def describe(self) -> dict[str, Any]:
    """Returns what a list of sessions says about it."""
    return {
      'id': self.id,
      'object': 'session',
      'name': self.name,
      'created': int(self.created),
      'used': int(self.used),
      'tokens': self.position,
      'messages': len(self.messages),
      'in_memory': self.session is not None,
      'saved': self.unsaved_since is None,
    }


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
    self._folder, self._limits, self._clock = folder, limits, clock
    self._held = contextlib.ExitStack()
    try:
      folder.mkdir(parents=True, exist_ok=True, mode=0o700)
      self._held.enter_context(
        files.lock(folder / '.lock', f'the sessions in {folder}')
      )
      found = [self._read_about(path) for path in sorted(folder.iterdir())]
    except OSError as error:
      raise errors.UserError(
        f'the folder of sessions {folder} cannot be used ({error.strerror}); '
        'name another one.'
      ) from error
    self._entries = {entry.id: entry for entry in found if entry is not None}

  def __len__(self) -> int:
    """Returns the number of sessions."""
    return len(self._entries)

  @property
  def num_resident(self) -> int:
    """Sessions in memory."""
    return sum(x.session is not None for x in self._entries.values())

  def all(self) -> list[Entry]:
    """Returns the sessions, the oldest first."""
    return sorted(self._entries.values(), key=lambda entry: entry.created)

  def find(self, id: str) -> Entry:
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

  def of_user(self, user: str) -> Entry:
    """Returns the session of a user, and makes it at the first request."""
    id = f'user_{hashlib.sha256(user.encode()).hexdigest()[:32]}'
    if id in self._entries:
      return self._entries[id]
    return self._add(self.base.fork(), name=user[:80], id=id, kind='create')

  def create(self, name: str = '') -> Entry:
    """Begins a session at the checkpoint."""
    return self._add(self.base.fork(), name=name, kind='create')

  def fork(self, id: str, name: str = '') -> Entry:
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

  def load(self, entry: Entry) -> inference.Session:
    """Returns the state of a session, from its file if it is on the disk.

    Raises:
      errors.UserError: If the file is gone or damaged.
    """
    entry.used = self._clock()
    if entry.session is None:
      path = self._folder / entry.id
      entry.session = self._load_file(path / _NOW)
      if (path / _BEFORE).is_file():
        entry.before = self._load_file(path / _BEFORE)
      self._make_room(entry)
    return entry.session

  def commit(
    self,
    entry: Entry,
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
      messages: `Entry.messages` after the request; None to keep them.

    Returns:
      The steps that each level took.
    """
    old = self.load(entry)
    stepped = _count_steps(old.now, now)
    with _undo_on_error(entry):
      entry.before, entry.session = old, old.fork()
      entry.session.move(now)
      entry.messages_before = entry.messages
      if messages is not None:
        entry.messages = messages
      self._changed(entry, {**record, 'steps': stepped})
    return stepped

  def note(self, entry: Entry, record: Mapping[str, Any]) -> None:
    """Adds a line to the audit log of a session, if it still exists."""
    if self._entries.get(entry.id) is entry:
      self._log(entry, record)

  def rollback(self, id: str) -> Entry:
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
    with _undo_on_error(entry):
      entry.session, entry.before = entry.before, None
      entry.messages, entry.messages_before = entry.messages_before, ()
      self._changed(entry, {'kind': 'rollback'})
    return entry

  def reset(self, id: str) -> Entry:
    """Returns to the checkpoint; `rollback` undoes it."""
    entry = self._idle(id)
    session = self.load(entry)
    with _undo_on_error(entry):
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
    self.save(entry)
    return (self._folder / id / _NOW).read_bytes()

  def import_file(self, content: bytes, name: str = '') -> Entry:
    """Begins a session at the state in a file that `export` returned.

    Raises:
      limits_lib.RequestError: If it is not a session of this checkpoint.
    """
    path = self._folder / f'.import-{secrets.token_hex(8)}'
    try:
      files.write_whole(path, content, mode=0o600)
      session = self._load_file(path)
      if session.num_rows != 1:
        raise errors.UserError(
          f'the session has {session.num_rows} rows; split it and send one.'
        )
    except limits_lib.RequestError:
      raise
    except errors.UserError as error:
      reason = str(error).replace(str(path), 'that was sent')
      raise limits_lib.RequestError(reason, code='foreign_session') from error
    finally:
      path.unlink(missing_ok=True)
    return self._add(session, name=name, kind='import')

  def delete(self, id: str) -> None:
    """Removes a session and its files."""
    entry = self._idle(id)
    del self._entries[entry.id]
    shutil.rmtree(self._folder / entry.id, ignore_errors=True)

  def audit(self, id: str) -> list[dict[str, Any]]:
    """Returns the log of a session, oldest first.

    Each line says when a change was made (`time`), of which kind, the position
    after it and, of a request, how many tokens it read and drew, their mean
    loss, and the steps of each level. It has the text only if that was asked
    for.
    """
    path = self._folder / self.find(id).id / _AUDIT
    lines = path.read_text(encoding='utf-8').splitlines()
    return [json.loads(line) for line in lines]

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
        self.save(entry)
        return  # others have their turn between two saves

  def save(self, entry: Entry) -> None:
    """Writes a session to its files, if they are not up to date."""
    if entry.unsaved_since is None or entry.session is None:
      return
    path = self._folder / entry.id
    entry.session.save(path / _NOW, lock=False, replace=True)
    if entry.before is not None:
      entry.before.save(path / _BEFORE, lock=False, replace=True)
    else:
      (path / _BEFORE).unlink(missing_ok=True)
    about = {
      'name': entry.name,
      'created': entry.created,
      'used': entry.used,
      'position': entry.position,
      'messages': entry.messages,
      'messages_before': entry.messages_before,
    }
    files.write_whole(path / _ABOUT, json.dumps(about), mode=0o600)
    entry.unsaved_since = None

  def close(self) -> None:
    """Saves all sessions and gives the folder back."""
    try:
      for entry in self._entries.values():
        self.save(entry)
    finally:
      self._held.close()

  def _add(
    self,
    session: inference.Session,
    *,
    name: str,
    kind: str,
    id: str | None = None,
    messages: tuple[str, ...] = (),
    record: Mapping[str, Any] | None = None,
  ) -> Entry:
    if len(self._entries) >= self._limits.max_sessions:
      raise limits_lib.RequestError(
        f'there are {len(self._entries)} sessions, as many as this server '
        'keeps; delete one.',
        status=429,
        code='too_many_sessions',
      )
    now = self._clock()
    id = f'sess_{secrets.token_hex(12)}' if id is None else id
    entry = Entry(id, name, now, now, messages=messages, session=session)
    try:
      with _undo_on_error(entry):
        (self._folder / id).mkdir(mode=0o700, exist_ok=True)
        self._changed(entry, {'kind': kind, **(record or {})})
        self.save(entry)  # so that its id is known after a crash
    except errors.UserError:
      shutil.rmtree(self._folder / id, ignore_errors=True)
      raise
    self._entries[id] = entry
    self._make_room(entry)
    return entry

  def _idle(self, id: str) -> Entry:
    """Returns a session that no request changes at the moment."""
    entry = self.find(id)
    if entry.num_jobs:
      raise limits_lib.RequestError(
        f'a request of the session {id} is in work; wait for it to end.',
        status=409,
        code='session_busy',
      )
    return entry

  def _changed(self, entry: Entry, record: Mapping[str, Any]) -> None:
    now = self._clock()
    entry.used = now
    entry.position = int(entry.session.clock[0])
    if entry.unsaved_since is None:
      entry.unsaved_since = now
    self._log(entry, record)

  def _log(self, entry: Entry, record: Mapping[str, Any]) -> None:
    line = {'time': self._clock(), **record, 'position': entry.position}
    path = self._folder / entry.id / _AUDIT
    with open(path, 'a', encoding='utf-8') as file:
      file.write(json.dumps(line) + '\n')

  def _make_room(self, keep: Entry) -> None:
    """Frees the sessions whose last use is longest ago, if there are many."""
    resident = [x for x in self._entries.values() if x.session is not None]
    resident.sort(key=lambda entry: entry.used)
    surplus = len(resident) - self._limits.max_resident
    idle = [x for x in resident if not x.num_jobs and x is not keep]
    for entry in idle[: max(surplus, 0)]:
      self._evict(entry)

  def _evict(self, entry: Entry) -> None:
    self.save(entry)
    entry.session = entry.before = None

  def _load_file(self, path: pathlib.Path) -> inference.Session:
    return self.base.load_other(path)

  def _read_about(self, path: pathlib.Path) -> Entry | None:
    """Returns the entry of a folder; None for other things."""
    try:
      about = json.loads((path / _ABOUT).read_text(encoding='utf-8'))
      return Entry(
        path.name,
        name=str(about['name']),
        created=float(about['created']),
        used=float(about['used']),
        position=int(about['position']),
        messages=tuple(map(str, about['messages'])),
        messages_before=tuple(map(str, about['messages_before'])),
      )
    except (OSError, ValueError, KeyError, TypeError):
      return None  # never complete: a crash before its first save


@contextlib.contextmanager
def _undo_on_error(entry: Entry) -> Iterator[None]:
  """Gives an entry its old values back if the block fails.

  Raises:
    errors.UserError: If the disk fails, such as a full one.
  """
  old = dict(vars(entry))
  try:
    yield
  except Exception as error:
    vars(entry).update(old)
    if not isinstance(error, OSError):
      raise
    raise errors.of_disk(error.errno)(
      f'the session {entry.id} cannot be written ({error.strerror}); it is as '
      'it was.'
    ) from error


def _count_steps(before, after) -> dict[str, int]:
  """Returns how many steps each level took."""
  old, new = before.state.stream.levels, after.state.stream.levels
  count = lambda level: int(level.num_updates[0])
  return {name: count(level) - count(old[name]) for name, level in new.items()}


def _number(x: Any) -> float | int | bool | None:
  """Returns a number that JSON can hold."""
  value = np.asarray(x)[0].item()
  return value if np.isfinite(value) else None
