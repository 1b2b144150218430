"""Sessions of a store, and the folder with their files.

A session is a folder below that of the store:

    ID/now.session     its state, in the format of `inference.session_files`
    ID/before.session  its state before the last request that it learned from
    ID/session.json    its name, times, and hashes of the messages that it read
    ID/audit.jsonl     a line for each change

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
from typing import Any

from nested_learning import errors
from nested_learning import files
from nested_learning import inference

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
      found = [_read_about(x) for x in sorted(path.iterdir())]
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
    path = self._path / entry.id
    session, before = self._base.load_other(path / _NOW), None
    if (path / _BEFORE).is_file():
      before = self._base.load_other(path / _BEFORE)
    entry.session, entry.before = session, before
    # A crash between two files leaves that of the state newer than the rest.
    entry.position = int(session.clock[0])

  def save(self, entry: Entry) -> None:
    """Writes a session to its files, if they are not up to date."""
    if entry.unsaved_since is None or entry.session is None:
      return
    path = self._path / entry.id
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

  def remove(self, id: str) -> None:
    """Removes the files of a session."""
    shutil.rmtree(self._path / id, ignore_errors=True)

  def log(self, id: str, record: Mapping[str, Any]) -> None:
    """Adds a line to the audit log of a session."""
    with open(self._path / id / _AUDIT, 'a', encoding='utf-8') as file:
      file.write(json.dumps(record) + '\n')

  def read_log(self, id: str) -> list[dict[str, Any]]:
    """Returns the audit log of a session, oldest first."""
    lines = (self._path / id / _AUDIT).read_text(encoding='utf-8')
    return [json.loads(line) for line in lines.splitlines()]

  def read(self, id: str) -> bytes:
    """Returns the file of a session as it was last saved."""
    return (self._path / id / _NOW).read_bytes()

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
      reason = str(error).replace(str(path), 'that was sent')
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


def _read_about(path: pathlib.Path) -> Entry | None:
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
