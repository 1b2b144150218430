"""Reads the numbers of result pages against the files beside them."""

from collections.abc import Iterator, Mapping
import csv
import itertools
import json
import math
import pathlib
import re
import statistics
from typing import Any, NamedTuple

from experiments import report_files

NUMBER = r'[+-]?\d+\.\d+(?:e[+-]?\d+)?'
_ANY = rf'{NUMBER}|\d+'
_EMPTY = '–'
_FIELDS = {'train.learning_rate'}  # that sweeps tune


class Table(NamedTuple):
  """A table of a page: the text before it, its head and its rows."""

  before: str
  head: list[str]
  rows: list[list[str]]


def read_text(folder: pathlib.Path) -> str:
  return (folder / 'README.md').read_text(encoding='utf-8')


def read_summary(folder: pathlib.Path) -> dict[str, Any]:
  return json.loads((folder / 'summary.json').read_text(encoding='utf-8'))


def _read_runs(folder: pathlib.Path) -> list[dict[str, str]]:
  """Returns the finished runs of results.csv; none without the file."""
  if not (folder / 'results.csv').is_file():
    return []
  with (folder / 'results.csv').open(newline='', encoding='utf-8') as file:
    runs = list(csv.DictReader(file))
  return [run for run in runs if run['status'] == 'finished']


def _tables(text: str) -> Iterator[Table]:
  for match in re.finditer(r'(?m)(?:^\|.*\n)+', text):
    lines = [
      [cell.strip().replace('**', '') for cell in line.strip('|\n').split('|')]
      for line in match[0].splitlines()
    ]
    yield Table(text[: match.start()], lines[0], lines[2:])


def agrees(shown: str, value: float) -> bool:
  """Returns whether a printed number is a value, rounded to its digits."""
  number, _, exponent = shown.replace(',', '').partition('e')
  step = 10.0 ** (int(exponent or 0) - len(number.partition('.')[2]))
  return abs(float(shown.replace(',', '')) - value) <= 0.5001 * step


def _unlike(where: str, shown: str, *wanted: float) -> list[str]:
  """Returns a line if 'mean ± spread' are other numbers."""
  found = re.findall(rf'{NUMBER}|[+-]?\d+(?:e[+-]?\d+)?', shown)
  same = len(found) <= len(wanted) and all(map(agrees, found, wanted))
  return [] if found and same else [f'{where}: {shown} for {wanted}']


class Sweep(NamedTuple):
  """The files of a page; one that is no sweep's has no runs."""

  text: str
  summary: Mapping[str, Any]
  runs: list[dict[str, str]]

  @classmethod
  def read(cls, folder: pathlib.Path) -> 'Sweep':
    """Reads the files of a folder."""
    return cls(read_text(folder), read_summary(folder), _read_runs(folder))

  @property
  def tuned(self) -> str | None:
    """The tuned field, whose best values the summary has."""
    ends = {key.partition('/')[2] for key in self.summary}
    return next((key for key in self.runs[0] if key in ends & _FIELDS), None)

  @property
  def cells(self) -> list[str]:
    keys = [key for key in self.summary if '/' in key]
    return list(dict.fromkeys(key.partition('/')[0] for key in keys))

  def values(self, cell: str, key: str) -> dict[str, float]:
    """Returns a metric by seed, at the best value of a tuned field."""
    runs = [run for run in self.runs if run['cell'] == cell]
    best = self.summary.get(f'{cell}/{self.tuned}')
    if self.tuned and best is not None:
      runs = [
        run
        for run in self.runs
        if run['cell'].startswith(f'{cell},') and float(run[self.tuned]) == best
      ]
    return {run['seed']: float(run[key]) for run in runs}

  def tried(self, cell: str, key: str, value: str) -> float | None:
    """Returns a metric with seed 0 at a value of the tuned field."""
    for run in self.runs:
      if (
        run['cell'].startswith(f'{cell},')
        and run['seed'] == '0'
        and float(run[self.tuned]) == float(value)
      ):
        return float(run[key])
    return None


def wrong_in_sweep(folder: pathlib.Path) -> list[str]:
  """Returns a line for each number of a sweep's page that has no source."""
  sweep = Sweep.read(folder)
  summary = sweep.summary
  counts = f'{summary["finished"]} of {summary["runs"]} runs are finished'
  wrong = [] if counts in sweep.text else [f'not said: {counts}']
  tables = [t for t in _tables(sweep.text) if t.head[0] == 'cell' and t.head[1]]
  wrong += [] if tables else ['no table of cells']
  for table in tables:
    for cell, *row in table.rows:
      for key, shown in zip(table.head[1:], row, strict=True):
        wrong += _wrong_in_cell(sweep, table, cell, key, shown)
  return wrong + _wrong_best(sweep.text, summary, sweep.cells)


def _wrong_in_cell(sweep, table, cell, key, shown) -> list[str]:
  where, summary = f'{cell}, {key}', sweep.summary
  first = table.before.rstrip().rpartition('\n')[2].partition(' ')[0]
  if key == sweep.tuned:
    value = summary.get(f'{cell}/{key}')
    missing = value is None and shown == _EMPTY
    return [] if missing else _unlike(where, shown, value)
  if key == 'difference':
    ours, theirs = (sweep.values(c, first) for c in (cell, sweep.cells[0]))
    found = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    mean, spread = statistics.fmean(found), statistics.stdev(found)
    wrong = _unlike(where, shown, mean, spread)
    stored = summary[f'{cell}/{first}/difference']
    return wrong + _unlike(f'summary.json: {where}', f'{stored:.6f}', mean)
  if re.fullmatch(r'\d[\d.e+-]*', key):
    value = sweep.tried(cell, first, key)
    missing = value is None and shown == _EMPTY
    return [] if missing else _unlike(where, shown, value)
  if not any(name.endswith(f'/{key}') for name in summary):
    return []  # seeds, or words
  found = list(sweep.values(cell, key).values())
  if f'{cell}/{key}' not in summary:
    return [] if shown == _EMPTY and not found else [f'{where}: {shown}']
  wanted = [statistics.fmean(found)]
  wanted += [statistics.stdev(found)] if len(found) > 1 else []
  stored = [summary[f'{cell}/{key}'], summary.get(f'{cell}/{key}/spread')]
  same = all(map(math.isclose, stored, wanted))
  return _unlike(where, shown, *wanted) + (
    [] if same else [f'summary.json: {where}: {stored} for {wanted}']
  )


def _wrong_best(text, summary, cells) -> list[str]:
  """Compares the sentence on the best mean with the means."""
  match = re.search(r'(?m)^The (lowest|highest) (\S+) is that of (\w+)\.', text)
  if match is None:
    return []
  means = {
    cell: summary[f'{cell}/{match[2]}']
    for cell in cells
    if isinstance(summary.get(f'{cell}/{match[2]}'), float)
  }
  best = (min if match[1] == 'lowest' else max)(means, key=means.get)
  return [] if best == match[3] else [f'not the {match[1]}: {match[3]}']


def wrong_in_optimizers(folder: pathlib.Path) -> list[str]:
  """Returns a line for each score of the optimisers that has no source."""
  text, summary = read_text(folder), read_summary(folder)
  wrong, checked = [], 0
  for section in re.split(r'(?m)^## ', text):
    plot = re.search(r'\]\((\w+)\.png\)', section)
    for table in _tables(section):
      if plot is None or table.head[1:2] != ['best rate']:
        continue
      score = report_files.key(table.head[2])
      means = {}
      for name, rate, shown, *_ in table.rows:
        key = f'{plot[1]}.{report_files.key(name)}'
        if f'{key}_{score}' not in summary:
          continue
        means[name] = mean = summary[f'{key}_{score}']
        wrong += _unlike(key, shown, mean, summary[f'{key}_spread'])
        wrong += _unlike(f'{key}, rate', rate, summary[f'{key}_rate'])
        checked += 1
      said = re.search(
        rf'The lowest {table.head[2]} is that of (.+?)\.', section
      )
      if means and said and said[1] != min(means, key=means.get):
        wrong.append(f'{plot[1]}: not the lowest: {said[1]}')
  return wrong if checked > 20 else [*wrong, f'{checked} scores are checked']


def wrong_anywhere(folder: pathlib.Path) -> list[str]:
  """Returns the decimal numbers of a page that no file beside it has.

  Counts and settings have no decimal point; numbers in code and links are left
  out. A share in per cent is that of a number of the files.
  """
  text = re.sub(r'`[^`]*`|\]\([^)]*\)', '', read_text(folder))
  text = text.partition('## How it was made')[0]
  found: set[float] = set()

  def collect(value):
    if isinstance(value, Mapping):
      value = list(value.values())
    if isinstance(value, list):
      for item in value:
        collect(item)
    elif isinstance(value, int | float) and math.isfinite(value):
      found.add(float(value))
    elif isinstance(value, str):  # numbers that somebody else printed
      found.update(map(float, re.findall(NUMBER, value)))

  for path in folder.glob('*.json'):
    collect(json.loads(path.read_text(encoding='utf-8')))
  shown = re.findall(rf'(?<![\w.]){NUMBER}(?![\w.])', text)
  return [
    number
    for number in dict.fromkeys(shown)
    if not any(agrees(number, scale * v) for v in found for scale in (1, 100))
  ]


def _sections(text: str) -> tuple[str, list[str]]:
  first, *rest = re.split(r'(?m)^## ', text)
  return first, rest or [first]


def wrong_in_prose(folder: pathlib.Path) -> list[str]:
  """Returns the sections of a page by people that say not where they are from.

  A section with numbers names, or the beginning of the page does, command,
  commit and date. One without a commit of its own takes its numbers from pages
  of subfolders.
  """
  first, sections = _sections(read_text(folder))
  data = [
    path.read_text(encoding='utf-8')
    for name in ('README.md', 'summary.json', 'results.csv')
    for path in folder.glob(f'*/{name}')
  ]
  known = [float(x) for x in re.findall(NUMBER, ' '.join(data))]
  wrong = []
  for section in sections:
    title, _, body = section.partition('\n')
    said_none = body.lstrip().startswith('Not measured')
    if said_none or not re.search(rf'{NUMBER}|\n\|', body):
      continue
    for what, pattern in (
      ('command', r'`[^`]*(?:\.py|make \w+)[^`]*`'),
      ('commit', r'\b(?=\w*\d)[0-9a-f]{7}\b'),
      ('date', r'\b20\d\d-\d\d-\d\d\b'),
    ):
      if not re.search(pattern, f'{first}\n{body}'):
        wrong.append(f'{title}: no {what}')
    if known and not re.search(r'commit [0-9a-f]{7}', body):
      shown = re.findall(rf'(?<![\w.]){NUMBER}(?![\w.])', body)
      wrong += [
        f'{title}: {number}'
        for number in shown
        if not any(agrees(number, value) for value in known)
      ]
  return wrong


def wrong_in_copy(folder: pathlib.Path, made: pathlib.Path) -> list[str]:
  """Returns the numbers of a page that its cells, written again, have not."""
  lines = []
  for path in (folder, made):
    text = read_text(path).partition('## How it was made')[0]
    text += (path / 'summary.json').read_text(encoding='utf-8')
    lines.append(text.splitlines())
  wrong = []
  for shown, wanted in itertools.zip_longest(*lines, fillvalue=''):
    if re.findall(_ANY, shown) != re.findall(_ANY, wanted):
      wrong.append(f'{shown} for {wanted}')
  return wrong
