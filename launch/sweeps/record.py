"""The record of a sweep in its folder, and its runs."""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import fnmatch
import json
import os
import pathlib
import shlex
import time
from typing import Any, NamedTuple

from launch import provenance
from launch.sweeps import cells as cells_lib
from nested_learning import configs
from nested_learning import errors
from nested_learning import files
from nested_learning.configs import serialization

_FILE = 'sweep.json'
_LOCK = '.lock'
_PATIENCE = 30  # seconds for others to write sweep.json
SUMMARY = 'summary.json'
ERROR = 'error.txt'
LOG = 'log.txt'
_OLD_ROOM, _ROOM = '"nested_learning.sweeps.', '"launch.sweeps.'


@dataclasses.dataclass(frozen=True)
class Record:
  """A sweep as its sweep.json keeps it."""

  spec: str  # --config
  assignments: tuple[str, ...]  # --set of all cells
  base: str  # JSON of the config that the cells change
  fields: tuple[str, ...]  # paths of the grid, the tuned field among them
  cells: tuple[cells_lib.Cell, ...]
  num_seeds: int = 1
  seed_fields: tuple[str, ...] = ()
  metrics: tuple[str, ...] = ()
  printed: str = ''
  commands: tuple[str, ...] = ()  # every command that added to it
  tune: str = ''  # path of the tuned field
  descends: bool = False  # see cells.Sweep
  commits: tuple[str, ...] = ()  # of runs of earlier versions


class Run(NamedTuple):
  """One cell with one seed.

  Attributes:
    name: For example `cell/seed_0`.
    folder: Workdir of the run.
    cell: Its cell.
    seed: Its seed, from 0.
    assignments: All changes to the config, as for --set.
    config: The config with these changes.
  """

  name: str
  folder: pathlib.Path
  cell: cells_lib.Cell
  seed: int
  assignments: tuple[str, ...]
  config: Any

  @property
  def finished(self) -> bool:
    """Whether summary.json exists, which a run writes last."""
    return (self.folder / SUMMARY).is_file()


def load(workdir: pathlib.Path) -> Record | None:
  """Reads the sweep of a folder; returns None if the folder is empty.

  Raises:
    errors.UserError: The folder holds something else, or cannot be read.
  """
  path = workdir / _FILE
  if path.is_file():
    try:
      text = path.read_text(encoding='utf-8')
      record = configs.from_json(_modernise(text))
    except (OSError, UnicodeDecodeError) as error:
      raise errors.UserError(f'Cannot read {path}: {error}.') from error
    except errors.UserError as error:
      raise errors.UserError(f'{path}: {error}') from error
    if isinstance(record, Record):
      return record
  elif not workdir.is_dir() or {p.name for p in workdir.iterdir()} <= {_LOCK}:
    return None
  raise errors.UserError(
    f'{workdir} holds no sweep but other files; use another --workdir.'
  )


def save(record: Record, workdir: pathlib.Path) -> Record:
  """Adds a sweep to the sweep.json of its folder.

  Another process may have added to it since this one read it, so the file is
  read again under a lock.

  Returns:
    The sweep as it is written.

  Raises:
    errors.UserError: The folder is not writable, or holds another sweep now.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  with _lock(workdir):
    record = update(record, load(workdir))
    files.write_whole(workdir / _FILE, configs.to_json(record))
  return record


def update(record: Record, stored: Record | None) -> Record:
  """Adds a sweep to the stored sweep of a folder.

  A folder keeps one sweep: one experiment, one config that all cells change,
  one set of fields in the grid. Rows, values and seeds can be added. A call
  that does not name some of them removes none.

  Args:
    record: The sweep of this call.
    stored: The sweep of the folder, if any.

  Returns:
    Both together, with the metrics of this call.

  Raises:
    errors.UserError: They differ in more than rows, values and seeds.
  """
  if stored is None:
    return record
  for what, ours, theirs in (
    ('of', os.path.normpath(record.spec), os.path.normpath(stored.spec)),
    ('over', _listed(record.fields), _listed(stored.fields)),
    ('with seeds in', _listed(record.seed_fields), _listed(stored.seed_fields)),
  ):
    if ours != theirs:
      raise _refuse(f'{what} {theirs}, and this one is {what} {ours}')
  changed = _differences(record.base, stored.base)
  for path, (ours, theirs) in changed.items():
    more = f' and {len(changed) - 1} more' if len(changed) > 1 else ''
    raise _refuse(f'with {path}={theirs!r}{more}, and here it is {ours!r}')
  together = {cell.name: cell for cell in stored.cells}
  for cell in record.cells:
    old = together.get(cell.name, cell)
    if (old.spec, old.assignments) != (cell.spec, cell.assignments):
      raise _refuse(
        f'whose cell {cell.name} is {_cell(old)}, and here it is {_cell(cell)}'
      )
    together[cell.name] = cell
  commands = [  # those of earlier versions may hold passwords
    provenance.shown_command(shlex.split(command)[1:])
    for command in (*stored.commands, *record.commands)
  ]
  return dataclasses.replace(
    record,
    cells=tuple(together.values()),
    num_seeds=max(record.num_seeds, stored.num_seeds),
    commands=tuple(dict.fromkeys(commands)),
    commits=tuple(dict.fromkeys((*stored.commits, *record.commits))),
  )


def list_runs(
  record: Record, workdir: pathlib.Path, *, only: str = '*'
) -> list[Run]:
  """Lists the runs of a sweep, all cells of a seed before the next seed.

  Args:
    record: The sweep.
    workdir: Its folder.
    only: Pattern for the names of cells or runs.

  Returns:
    The runs that match, finished ones too.

  Raises:
    errors.UserError: A config is wrong, a folder holds a run of another config,
      or nothing matches.
  """
  loaded = cells_lib.load_cells(
    record.cells, num_seeds=record.num_seeds, seed_fields=record.seed_fields
  )
  runs = []
  for seed in range(record.num_seeds):
    for cell in record.cells:
      name = f'{cell.name}/seed_{seed}'
      assignments, config = loaded[cell.name, seed]
      folder = workdir / 'cells' / name
      if any(fnmatch.fnmatchcase(n, only) for n in (cell.name, name)):
        runs.append(Run(name, folder, cell, seed, assignments, config))
  if not runs:
    raise errors.UserError(
      f'No cell is called {only!r}; there are '
      f'{", ".join(cell.name for cell in record.cells)}.'
    )
  for run in runs:
    _check_same(run)
  return runs


@contextlib.contextmanager
def _lock(workdir: pathlib.Path) -> Iterator[None]:
  """Waits for the lock of a sweep's folder, and holds it."""
  deadline = time.monotonic() + _PATIENCE
  with contextlib.ExitStack() as held:
    while True:
      try:
        held.enter_context(files.lock(workdir / _LOCK, f'--workdir={workdir}'))
        break
      except errors.UserError as error:
        is_busy = isinstance(error.__cause__, BlockingIOError)
        if not is_busy or time.monotonic() > deadline:
          raise
      time.sleep(0.05)
    yield


def _modernise(text: str) -> str:
  """Turns a sweep.json of an earlier version into one of this version."""
  data = serialization.decode(text.replace(_OLD_ROOM, _ROOM))
  if isinstance(data.get('base'), dict):
    data['base'] = json.dumps(data['base'])
  return json.dumps(data)


def _differences(ours: str, theirs: str) -> dict[str, tuple[Any, Any]]:
  """Returns the fields in which two configs, given as JSON, differ.

  Fields that the code got since `theirs` was written have their defaults in it.
  """
  with contextlib.suppress(errors.UserError):  # a field that is gone
    theirs = configs.to_json(configs.from_json(theirs))
  left, right = (
    dict(serialization.leaves(json.loads(text), '')) for text in (ours, theirs)
  )
  absent = '(absent)'
  return {
    path: (left.get(path, absent), right.get(path, absent))
    for path in left | right
    if left.get(path, absent) != right.get(path, absent)
  }


def _check_same(run: Run) -> None:
  """Raises an error if the folder holds a run of another config."""
  path = run.folder / 'config.json'
  if not path.is_file():
    return
  changed = configs.differences(run.config, configs.load(str(path)))
  for field, (ours, theirs) in changed.items():
    raise errors.UserError(
      f'{run.folder} holds a run with {field}={theirs!r}, and here it is '
      f'{ours!r}; use another --workdir, or remove that folder to run it anew.'
    )


def _refuse(difference: str) -> errors.UserError:
  return errors.UserError(
    f'The --workdir holds a sweep {difference}. Use another --workdir; only '
    'rows, values and seeds can be added to a sweep.'
  )


def _listed(names: Sequence[str]) -> str:
  return ', '.join(names) or 'no field'


def _cell(cell: cells_lib.Cell) -> str:
  return ' '.join((cell.spec, *cell.assignments))
