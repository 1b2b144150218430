"""Finished measurements, one small file each, so that a comparison can resume.

A cell is one measurement, for instance the training of one optimiser with one
rate and seed. Its file is written whole when it is finished. Cells of earlier
commands are also read from a folder of results, where all cells of a task are
in one file.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import math
import pathlib
from typing import Any, NamedTuple

from experiments import report_files
from launch import provenance
from nested_learning import errors
from nested_learning import files

_DIGITS = 6  # of numbers in files


@dataclasses.dataclass(frozen=True)
class Cell:
  """A finished measurement.

  Attributes:
    task: Name of its task.
    name: Its name in the task, also of its file.
    settings: Everything that it depends on, as JSON has it.
    values: Numbers by name, or lists of these; None stands for a number that is
      not finite.
    source: Command, commit, machine, date and software.
  """

  task: str
  name: str
  settings: Mapping[str, Any]
  values: Mapping[str, Any]
  source: Mapping[str, str]


class Report(NamedTuple):
  """Text and numbers of a task, for the page.

  Attributes:
    sections: Markdown.
    numbers: Numbers by name, for summary.json.
  """

  sections: list[str]
  numbers: Mapping[str, float]


class Task(NamedTuple):
  """A part of the comparison.

  Attributes:
    name: Name of the task of its cells.
    measure: Function of a store; measures every cell that is not finished.
    report: Function of (store, folder) that draws plots into the folder and
      returns a report on the cells that are finished.
  """

  name: str
  measure: Callable[['Store'], None]
  report: Callable[['Store', pathlib.Path], Report]


class Store(NamedTuple):
  """Folders of cells.

  Attributes:
    workdir: Folder of the run; its cells are in workdir/cells.
    results: Folder with earlier cells, or None.
    source: Source of the cells that this process makes.
  """

  workdir: pathlib.Path
  results: pathlib.Path | None
  source: Mapping[str, str]


def open_store(workdir: pathlib.Path, results: str | None = None) -> Store:
  """Returns the cells of a run, whose folder is made, and of other results."""
  workdir.mkdir(parents=True, exist_ok=True)
  folder = None if results is None else pathlib.Path(results)
  return Store(workdir, folder, provenance.provenance())


def measure(
  store: Store,
  task: str,
  name: str,
  settings: Mapping[str, Any],
  make_values: Callable[[], Mapping[str, Any]],
) -> Cell:
  """Returns a cell; measures and writes it if it is not finished.

  Args:
    store: The folders.
    task: Name of the task.
    name: Name of the cell; slashes are not allowed.
    settings: Everything that the values depend on. A finished cell with another
      value of a setting is measured again; see `agrees`.
    make_values: Measures the values.
  """
  settings = _plain(settings)
  found = read(store, task).get(name)
  if found is not None and agrees(found, settings):
    return found
  values = _plain(make_values())
  cell = Cell(task, name, settings, values, dict(store.source))
  path = store.workdir / 'cells' / task / f'{name}.json'
  files.write_whole(path, json.dumps(dataclasses.asdict(cell)) + '\n')
  shown = [f'{key} {value:.5g}' for key, value in _numbers(cell).items()]
  print(f'{task}: {name}: {", ".join(shown)}', flush=True)
  return cell


def read(store: Store, task: str) -> dict[str, Cell]:
  """Returns the finished cells of a task by name; those of the run come first.

  Raises:
    errors.UserError: A file is damaged.
  """
  found = {}
  if store.results is not None:
    found = _read_results(store.results / f'{task}.json', task)
  for path in sorted((store.workdir / 'cells' / task).glob('*.json')):
    cell = Cell(**_load(path))
    found[cell.name] = cell
  return found


def publish(store: Store, task: str, folder: pathlib.Path) -> None:
  """Writes all cells of a task to one file, FOLDER/TASK.json.

  Args:
    store: The folders.
    task: Name of the task; without cells, nothing is written.
    folder: Folder of results.
  """
  found = read(store, task)
  if not found:
    return
  sources, lines = [], []
  for name, cell in sorted(found.items()):
    if cell.source not in sources:
      sources.append(cell.source)
    entry = {
      'settings': cell.settings,
      'values': cell.values,
      'source': sources.index(cell.source),
    }
    lines.append(f'{json.dumps(name)}: {json.dumps(entry)}')
  # A line for each, so that changes show.
  sources, lines = (',\n'.join(x) for x in (map(json.dumps, sources), lines))
  text = f'{{"sources": [\n{sources}\n],\n"cells": {{\n{lines}\n}}}}\n'
  files.write_whole(folder / f'{task}.json', text)


def write_page(
  store: Store,
  task: str,
  config: Any,
  *,
  module: str,
  summary: Mapping[str, Any],
  sections: Sequence[str],
  plots: Sequence[str],
) -> None:
  """Writes the files of a run and, with a folder of results, a page there.

  Args:
    store: The folders; plots are in `store.workdir`.
    task: Name of the task, whose cells are published, and whose sources end the
      report.
    config: Config of the experiment.
    module: Name of the experiment's module.
    summary: See `report_files.write`.
    sections: See `report_files.write`.
    plots: Names of plots that the sections show.
  """
  sources = [cell.source for cell in read(store, task).values()]
  sections = [*sections, report_files.MADE, provenance.listed(sources, {})]
  report_files.write(
    str(store.workdir),
    config,
    module=module,
    summary=summary,
    sections=sections,
  )
  if store.results is not None:
    for name in plots:
      plot = (store.workdir / name).read_bytes()
      files.write_whole(store.results / name, plot)
    write_results(store, [task], store.results, sections, summary)


def write_results(
  store: Store,
  tasks: Sequence[str],
  folder: pathlib.Path,
  sections: Sequence[str],
  summary: Mapping[str, Any],
) -> None:
  """Writes README.md, summary.json and the cells of some tasks to a folder."""
  files.write_whole(folder / 'README.md', '\n\n'.join(sections) + '\n')
  files.write_whole(folder / 'summary.json', report_files.to_json(summary))
  for task in tasks:
    publish(store, task, folder)


def run_alone(task: Task, config: Any, workdir: str, *, module: str) -> None:
  """Runs one task as an experiment of its own.

  Args:
    task: The task.
    config: Config of the experiment.
    workdir: Folder of the run.
    module: Name of the experiment's module.
  """
  folder = pathlib.Path(workdir)
  store = open_store(folder)
  task.measure(store)
  sections, numbers = task.report(store, folder)
  report_files.write(
    workdir,
    config,
    module=module,
    summary=numbers,
    metrics=[
      {'cell': name} | _numbers(cell)
      for name, cell in read(store, task.name).items()
    ],
    sections=sections,
  )


def plain_numbers(cells: Mapping[str, Cell]) -> dict[str, float]:
  """Returns all numbers of some cells, by 'cell_number'."""
  return {
    f'{name}_{key}': value
    for name, cell in cells.items()
    for key, value in _numbers(cell).items()
  }


def agrees(cell: Cell, settings: Mapping[str, Any]) -> bool:
  """Returns whether a cell has no other value for one of these settings.

  Args:
    cell: A finished cell. Settings that it does not have were added later, and
      are those of the code that it was measured with.
    settings: Some of the settings, or all.
  """
  return _same(cell.settings, _plain(settings))


def number(cell: Cell, key: str) -> float:
  """Returns a number of a cell; infinite if it was not finite."""
  value = cell.values[key]
  return math.inf if value is None else float(value)


def _numbers(cell: Cell) -> dict[str, float]:
  return {
    key: number(cell, key)
    for key, value in cell.values.items()
    if isinstance(value, int | float | None)
  }


def _same(stored: Any, setting: Any) -> bool:
  if isinstance(stored, Mapping) and isinstance(setting, Mapping):
    return all(
      key not in setting or _same(value, setting[key])
      for key, value in stored.items()
    )
  return stored == setting


def _read_results(path: pathlib.Path, task: str) -> dict[str, Cell]:
  if not path.is_file():
    return {}
  content = _load(path)
  return {
    name: Cell(
      task,
      name,
      entry['settings'],
      entry['values'],
      content['sources'][entry['source']],
    )
    for name, entry in content['cells'].items()
  }


def _load(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f'{path} holds no cells ({error}); remove it, and run the same command '
      'again.'
    ) from error


def _plain(value: Any) -> Any:
  """Returns a tree of arrays and numbers as JSON holds it, rounded."""
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  if hasattr(value, 'tolist'):
    value = value.tolist()
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, float):
    return float(f'{value:.{_DIGITS}g}') if math.isfinite(value) else None
  return value
