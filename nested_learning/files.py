"""Files and folders that are written whole or not at all, and locks on them."""

from collections.abc import Iterator
import contextlib
import errno
import os
import pathlib
import shutil
import socket
import tempfile

from nested_learning import errors

try:
  import fcntl
except ImportError:  # Windows has no such locks
  fcntl = None

# What file systems without locks answer, such as some that mount buckets.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


def shown(path: str | os.PathLike) -> str:
  """Returns a path as it stands in a message: one line, printable."""
  text = os.fspath(path)
  return text if text.isprintable() else ascii(text)


def write_whole(
  path: str | os.PathLike, content: bytes | str, *, mode: int = 0o644
) -> None:
  """Writes a file whole or not at all, also beside others who write it.

  The content goes to a new file with a name of its own in the same folder,
  which then takes the place of `path`. A symbolic link at `path` is followed:
  its target is replaced and the link stays.

  Args:
    path: The file. Missing folders are made.
    content: Bytes, or text that is written as UTF-8.
    mode: Permissions of the file.

  Raises:
    errors.UserError: If the file cannot be written; it names path and reason.
      A full disk is an `errors.Retryable`.
  """
  if isinstance(content, str):
    content = content.encode()
  temporary = None
  try:
    target = pathlib.Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
      raise errors.UserError(f'Cannot write {path}: it is not a plain file.')
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix='.writing-')
    with open(handle, 'wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, mode)
    os.replace(temporary, target)
    temporary = None
    _sync_folder(target.parent)
  except (OSError, ValueError) as error:
    if isinstance(error, errors.UserError):
      raise
    reason = getattr(error, 'strerror', None) or error
    kind = errors.of_disk(getattr(error, 'errno', None))
    raise kind(f'Cannot write {path}: {reason}.') from error
  finally:
    if temporary is not None:
      with contextlib.suppress(OSError):
        os.unlink(temporary)


def _sync_folder(folder: pathlib.Path) -> None:
  """Makes a new name in a folder outlive a power cut, where that is known."""
  with contextlib.suppress(OSError):  # Windows, and some network file systems
    handle = os.open(folder, os.O_RDONLY)
    try:
      os.fsync(handle)
    finally:
      os.close(handle)


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Makes a folder whole or not at all.

  Args:
    folder: Its name. If another process makes it first, that one stays.

  Yields:
    A draft beside it, which is renamed when the block ends without an error.
  """
  folder.parent.mkdir(parents=True, exist_ok=True)
  draft = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix='draft-'))
  try:
    yield draft
    umask = os.umask(0)
    os.umask(umask)
    draft.chmod(0o777 & ~umask)  # mkdtemp makes it private to its owner
    try:
      draft.rename(folder)
    except OSError:
      if not folder.exists():
        raise
  finally:
    shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def lock(path: str | os.PathLike, what: str) -> Iterator[None]:
  """Holds a lock file for as long as the block runs.

  The lock belongs to the process: it ends with it, however it ends. The file
  stays and holds the name of its last owner. Without locks in the file system
  the block runs unlocked.

  Args:
    path: The lock file; its folder must exist.
    what: The thing that it protects, for the error: '--workdir=runs/a'.

  Yields:
    Nothing.

  Raises:
    errors.UserError: If another process holds it; it names that process.
  """
  try:
    handle = os.open(
      path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
    )
  except OSError as error:
    raise errors.of_disk(error.errno)(
      f'Cannot lock {what}: {path}: {error.strerror}.'
    ) from error
  try:
    try:
      if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      owner = os.read(handle, 200).decode(errors='replace').strip()
      owner = owner or 'another process'
      raise errors.UserError(
        f'{what} is in use by {owner}; wait for it to end, stop it, or use '
        'another one.'
      ) from error
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
    # A full disk: the lock holds anyway. Not through a file object, which would
    # write once more when it is closed, and hide the error of the block.
    with contextlib.suppress(OSError):
      owner = f'process {os.getpid()} on {socket.gethostname()}\n'
      os.ftruncate(handle, 0)
      os.write(handle, owner.encode())
    yield
  finally:
    with contextlib.suppress(OSError):
      os.close(handle)
