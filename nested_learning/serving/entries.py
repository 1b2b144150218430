"""Sessions of a store, and the folder with their files.

A session is a folder below that of the store:

    ID/N.now.session     its state, in the format of `inference.session_files`
    ID/N.before.session  its state before the last request that it learned from
    ID/session.json      N, its name, times, and hashes of messages that it read
    ID/audit.jsonl       a line for each change

N counts the saves. A save is complete once session.json, which is written last
and whole, names its files. So state and history are always of one save.

The store makes the names of all folders and files; no text of a request becomes
a part of a path.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import json
import pathlib
import secrets
import shutil
import time
from typing import Any

from nested_learning import errors
from nested_learning import files
from nested_learning import inference

_NOW, _BEFORE = '{}.now.session', '{}.before.session'
_ABOUT, _AUDIT = 'session.json', 'audit.jsonl'


# Attributes of `Entry` in session.json.
_SAVED = (
  'name',
  'created',
  'used',
  'position',
  'messages',
  'messages_before',
  'num_saves',
)


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
    num_saves: Times that it was saved.
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
  num_saves: int = 0

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


class Folder:
  """The files of the sessions on one checkpoint; locked until `close`."""

  def __init__(self, path: pathlib.Path, base: inference.Session):
    """Opens a folder.

    Args:
      path: The folder, which is made where there is none.
      base: A session on the checkpoint.

    Raises:
      errors.UserError: If another process uses the folder, or it cannot be
        read or written.
    """
    self._path, self._base = path, base
    self._held = contextlib.ExitStack()
    try:
      path.mkdir(parents=True, exist_ok=True, mode=0o700)
      self._held.enter_context(
        files.lock(path / '.lock', f'the sessions in {path}')
      )
      found = [self._find(x) for x in sorted(path.iterdir())]
    except OSError as error:
      raise errors.UserError(
        f'the folder of sessions {path} cannot be used ({error.strerror}); '
        'name another one.'
      ) from error
    self.found = {entry.id: entry for entry in found if entry is not None}

  def make(self, entry: Entry) -> None:
    """Makes the folder of a session."""
    (self._path / entry.id).mkdir(mode=0o700, exist_ok=True)

  def load(self, entry: Entry) -> None:
    """Reads the state of a session.

    Raises:
      errors.UserError: If a file is gone or damaged.
    """
    now, before = self._states(entry)
    session = self._base.load_other(now)
    entry.before = self._base.load_other(before) if before.is_file() else None
    entry.session = session

  def save(self, entry: Entry) -> None:
    """Writes a session to its files, if they are not up to date."""
    if entry.unsaved_since is None or entry.session is None:
      return
    try:
      with undo_on_error(entry):
        entry.num_saves += 1
        now, before = self._states(entry)
        entry.session.save(now, lock=False, replace=True)
        if entry.before is not None:
          entry.before.save(before, lock=False, replace=True)
        self._write_about(entry)
        entry.unsaved_since = None
    finally:
      self._sweep(entry)

  def remove(self, id: str) -> None:
    """Removes the files of a session."""
    shutil.rmtree(self._path / id, ignore_errors=True)

  def log(self, id: str, record: Mapping[str, Any]) -> None:
    """Adds a line to the audit log of a session."""
    with open(self._path / id / _AUDIT, 'a', encoding='utf-8') as file:
      file.write('\n' + json.dumps(record))  # behind what a full disk cut short

  def read_log(self, id: str) -> list[dict[str, Any]]:
    """Returns the audit log of a session, oldest first."""
    lines = (self._path / id / _AUDIT).read_text(encoding='utf-8')
    records = []
    for line in lines.splitlines():
      with contextlib.suppress(ValueError):  # one that was cut short
        records.append(json.loads(line))
    return records

  def read(self, entry: Entry) -> bytes:
    """Returns the file of a session as it was last saved."""
    return self._states(entry)[0].read_bytes()

  def parse(self, content: bytes) -> inference.Session:
    """Returns the session in a file.

    Raises:
      errors.UserError: If it is not one of this checkpoint, with one row.
    """
    path = self._path / f'.import-{secrets.token_hex(8)}'
    try:
      files.write_whole(path, content, mode=0o600)
      session = self._base.load_other(path)
    except errors.UserError as error:
      reason = str(error).replace(f'the session {path}', 'the session')
      reason = reason.replace(str(path), 'the body')
      raise type(error)(reason) from error
    finally:
      path.unlink(missing_ok=True)
    if session.num_rows != 1:
      raise errors.UserError(
        f'the session has {session.num_rows} rows; split it and send one.'
      )
    return session

  def close(self) -> None:
    """Gives the folder back."""
    self._held.close()

  def _states(self, entry: Entry) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the files of its state, and of that before."""
    path, count = self._path / entry.id, entry.num_saves
    return path / _NOW.format(count), path / _BEFORE.format(count)

  def _write_about(self, entry: Entry) -> None:
    path = self._path / entry.id
    about = {name: getattr(entry, name) for name in _SAVED}
    about['log_bytes'] = (path / _AUDIT).stat().st_size
    files.write_whole(path / _ABOUT, json.dumps(about), mode=0o600)

  def _sweep(self, entry: Entry) -> None:
    """Removes files of other saves, which are old or were cut short."""
    keep = {*(x.name for x in self._states(entry)), _ABOUT, _AUDIT}
    for path in (self._path / entry.id).iterdir():
      if path.name not in keep:
        path.unlink(missing_ok=True)

  def _find(self, path: pathlib.Path) -> Entry | None:
    """Returns the entry of a folder; None for other things."""
    try:
      about = json.loads((path / _ABOUT).read_text(encoding='utf-8'))
      entry = Entry(path.name, **{x: about[x] for x in _SAVED})
      entry.messages = tuple(entry.messages)
      entry.messages_before = tuple(entry.messages_before)
      is_lost = (path / _AUDIT).stat().st_size > about['log_bytes']
    except (OSError, ValueError, KeyError, TypeError):
      return None  # never complete: a crash before its first save
    if is_lost:  # of the lines before, some are of changes that were not saved
      line = {'kind': 'crash', 'position': entry.position}
      self.log(entry.id, {'time': time.time(), **line})
      self._write_about(entry)
    return entry


@contextlib.contextmanager
def undo_on_error(entry: Entry) -> Iterator[None]:
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
