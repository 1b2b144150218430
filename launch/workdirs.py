"""The folder of a run: its lock, and whether a run may begin in it."""

from collections.abc import Iterator
import contextlib
import os
import pathlib

from nested_learning import configs
from nested_learning import errors
from nested_learning import files

# Files that exist before a run begins; a sweep makes some of them.
_NO_RUN = (
  'config.json',
  'logs',
  'lock',
  '.lock',
  'log.txt',
  'error.txt',
  'tensorboard',  # made before the first step, with an event of the start
)


def local(path: str | None) -> pathlib.Path | None:
  """Returns --workdir as a path; raises if it is not on this machine."""
  if path is not None and '://' in path:
    raise errors.UserError(
      f'--workdir={path} is no folder of this machine; mount the bucket and '
      'name the folder, or use --target=gke or tpu-vm, which mount it.'
    )
  return pathlib.Path(path) if path else None


def lock(workdir: pathlib.Path) -> contextlib.AbstractContextManager[None]:
  """Locks a workdir for one run; makes the folder if it is missing.

  Only process 0 of a run holds the lock, because it alone writes. A launcher
  does not hold it, so that it can start its run again.

  Raises:
    errors.UserError: Another run holds the lock, or the folder is not writable.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise _cannot_write(workdir, error) from error
  if not os.access(workdir, os.W_OK):
    raise _cannot_write(workdir, PermissionError(0, 'it is not writable'))
  return files.lock(workdir / 'lock', f'--workdir={workdir}')


def prepare(
  experiment: configs.Experiment,
  workdir: pathlib.Path | None,
  *,
  mode: str,
  has_config: bool,
) -> str | None:
  """Checks a workdir and, for a new run, writes its config.json.

  Args:
    experiment: The experiment to run.
    workdir: The folder; None for a mode that needs none.
    mode: The flag --mode.
    has_config: Whether --config is given. If not, the config comes from the
      workdir, and fields that --set changes may differ.

  Returns:
    A message if the run is already finished, else None.

  Raises:
    errors.UserError: The folder holds another run, or is not writable.
  """
  if workdir is not None and _holds_run(workdir):
    if mode == 'train' or has_config:
      _check_same_run(experiment.config, workdir, mode)
    if mode == 'train' and (workdir / 'summary.json').is_file():
      return (  # a run writes its summary last
        f'{workdir} holds this run, finished: see {workdir}/report.md. To run '
        'it again, use another --workdir.'
      )
  elif mode == 'train':
    config = configs.to_json(experiment.config, experiment.module)
    try:
      files.write_whole(workdir / 'config.json', config)
    except errors.UserError as error:
      raise type(error)(
        f'--workdir={workdir}: {error} Fix this or use another --workdir.'
      ) from error
  return None


@contextlib.contextmanager
def beginning(workdir: pathlib.Path) -> Iterator[None]:
  """Removes the config.json of a run that fails before it has begun.

  Without it, a corrected command does not take the wrong config for the run's.
  A config.json that was there before the block stays.

  Args:
    workdir: The folder; enter before `prepare`.

  Yields:
    Nothing.
  """
  path = workdir / 'config.json'
  is_new = not path.exists()
  try:
    yield
  except Exception:
    if is_new and not _holds_run(workdir):
      path.unlink(missing_ok=True)
    raise


def _holds_run(workdir: pathlib.Path) -> bool:
  """Returns whether a run has begun there: it has made more than empty files.

  A run that fails before its first step leaves no line in metrics.jsonl and
  nothing in checkpoints.
  """
  if not (workdir / 'config.json').is_file():
    return False
  return any(
    path.name not in _NO_RUN and not _is_empty(path)
    for path in workdir.iterdir()
  )


def _is_empty(path: pathlib.Path) -> bool:
  if path.is_dir():
    return not any(path.iterdir())
  return path.is_file() and not path.stat().st_size


def _check_same_run(config, workdir: pathlib.Path, mode: str) -> None:
  """Raises an error if the workdir holds a run of another config."""
  theirs = configs.load(str(workdir / 'config.json'))
  changed = configs.differences(config, theirs)
  if mode in ('generate', 'session'):
    changed = {
      path: values
      for path, values in changed.items()
      if not path.startswith(('generate.', 'session.'))
    }
  if not changed:
    return
  listed = [
    f'{path} ({theirs!r} there, {ours!r} here)'
    for path, (ours, theirs) in list(changed.items())[:5]
  ]
  if len(changed) > 5:
    listed.append(f'{len(changed) - 5} more')
  way_out = (
    'Use another --workdir; or leave out --config and --set to resume that run.'
    if mode == 'train'
    else 'Leave out --config to use the config of that run.'
  )
  raise errors.UserError(
    f'{workdir} holds a run that differs in {", ".join(listed)}. {way_out}'
  )


def _cannot_write(workdir: pathlib.Path, error: OSError) -> errors.UserError:
  return errors.of_disk(error.errno)(
    f'Cannot write to --workdir={workdir}: {error.strerror}. Fix this or use '
    'another --workdir.'
  )
