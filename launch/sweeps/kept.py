"""Finished runs beside the results of a sweep, from which another goes on.

A workdir is large and stays on one machine. The folder of results keeps the
summary, source, config and evaluations of every finished run in one file.
"""

from collections.abc import Mapping, Sequence
import contextlib
import json
import pathlib
from typing import Any

from launch import provenance
from launch.sweeps import record as record_lib
from nested_learning import configs
from nested_learning import errors
from nested_learning import files
from nested_learning.configs import serialization

_FILE = 'runs.json'
_METRICS = 'metrics.jsonl'  # of a run: a line for each log and evaluation
_VALIDATION, _KEY = 'validation/', 'evaluations'


def keep(runs: Sequence[record_lib.Run], folder: pathlib.Path) -> None:
  """Writes the finished runs to FOLDER/runs.json; others in it stay.

  Args:
    runs: Runs of a sweep.
    folder: Folder of results.
  """
  finished = [run for run in runs if run.finished]
  base, kept = _read(folder)
  if not finished:
    return
  base = base or _fields(finished[0].config)
  for run in finished:
    fields = _fields(run.config)
    summary = (run.folder / record_lib.SUMMARY).read_text('utf-8')
    kept[run.name] = {
      'changes': {p: x for p, x in fields.items() if base.get(p, run) != x},
      'without': [path for path in base if path not in fields],
      'source': provenance.read_starts(run.folder),
      'summary': json.loads(summary),
    }
    if evaluations := _read_evaluations(run.folder / _METRICS):
      kept[run.name][_KEY] = evaluations
  # A line for each, so that changes show.
  lines = [f'{json.dumps(n)}: {json.dumps(x)}' for n, x in sorted(kept.items())]
  text = ',\n'.join(lines)
  text = f'{{"base": {json.dumps(base)},\n"runs": {{\n{text}\n}}}}\n'
  files.write_whole(folder / _FILE, text)


def restore(runs: Sequence[record_lib.Run], folder: pathlib.Path) -> list[str]:
  """Makes finished runs of a workdir out of those in FOLDER/runs.json.

  Args:
    runs: Runs of a sweep. One that has begun in its workdir is left alone, and
      so is one whose config has another value; fields that were added later do
      not count.
    folder: Folder of results.

  Returns:
    Names of the runs that were made.

  Raises:
    errors.UserError: The file cannot be read.
  """
  base, kept = _read(folder)
  made = []
  for run in runs:
    entry = kept.get(run.name)
    if entry is None or (run.folder / 'config.json').exists():
      continue
    stored = {p: x for p, x in base.items() if p not in entry['without']}
    stored |= entry['changes']
    fields = _fields(run.config)
    if any(fields.get(path, run) != x for path, x in stored.items()):
      continue
    lines = lambda items: ''.join(json.dumps(item) + '\n' for item in items)
    run.folder.mkdir(parents=True, exist_ok=True)
    for name, text in {
      'config.json': configs.to_json(run.config),
      provenance.STARTS: lines(entry['source']),
      **({_METRICS: lines(entry[_KEY])} if _KEY in entry else {}),
      # Last: it says that the run is finished.
      record_lib.SUMMARY: json.dumps(entry['summary'], indent=2) + '\n',
    }.items():
      files.write_whole(run.folder / name, text)
    made.append(run.name)
  return made


def _read_evaluations(path: pathlib.Path) -> list[dict[str, float]]:
  """Returns the lines of a run's metrics.jsonl with numbers of validation."""
  if not path.is_file():
    return []
  found = []
  for line in path.read_text('utf-8', errors='replace').splitlines():
    # A process that died while it was writing leaves a part of a line.
    with contextlib.suppress(ValueError):
      value = json.loads(line)
      if any(key.startswith(_VALIDATION) for key in value):
        found.append(value)
  return found


def _fields(config: Any) -> dict[str, Any]:
  """Returns the values of all fields by path, as JSON has them."""
  encoded = serialization.encode(config, '')
  return json.loads(json.dumps(dict(serialization.leaves(encoded, ''))))


def _read(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, Mapping]]:
  """Returns the fields of the base, and the entries by name of the run."""
  path = folder / _FILE
  if not path.is_file():
    return {}, {}
  try:
    content = json.loads(path.read_text('utf-8'))
    return content['base'], content['runs']
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise errors.UserError(f'Cannot read {path}: {error!r}.') from error
