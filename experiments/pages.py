"""The pages of results: which command makes each, and how old it is."""

import ast
from collections.abc import Iterator, Mapping, Sequence
import os
import pathlib
import re
import shlex
import sys
import time
from typing import NamedTuple

from launch import programs
from launch import provenance
from nested_learning import files

_HERE = pathlib.Path(__file__).resolve().parents[1]
_RESULTS = 'experiments/results'
_RUN, _SWEEP = 'launch/run.py', 'launch/sweep.py'
_COMMIT = re.compile(r'(?im)^(?:- )?commit: (.+)$')
_AGE = '- code: '  # line of a page that is older than its code
_DIRTY = '-dirty'


class Page(NamedTuple):
  """A page of results.

  Attributes:
    folder: Its folder in experiments/results.
    program: The program that makes it, and its arguments but for the folders.
    code: Files and folders whose code it measures. An experiment stands for
      all that it imports from experiments/.
    hours: About how long it takes on two cores, from nothing.
    flag: Flag that takes the folder; None if the program makes a report in its
      workdir, which is copied.
  """

  folder: str
  program: tuple[str, ...]
  code: tuple[str, ...]
  hours: float
  flag: str | None = '--results'

  def command(self, workdir: pathlib.Path) -> list[str]:
    """Returns the command that makes the page."""
    folder = [] if self.flag is None else [f'{self.flag}={self.path}']
    return [*self.program, f'--workdir={workdir}', *folder]

  @property
  def path(self) -> pathlib.Path:
    """Its folder in the checkout."""
    return pathlib.Path(os.path.normpath(f'{_RESULTS}/{self.folder}'))


def _experiment(
  path: str,
  folder: str,
  code: Sequence[str],
  hours: float,
  flag: str | None = '--set=results',
) -> Page:
  name = f'experiments/{path}'
  code = name.partition(':')[0], *code
  return Page(folder, (_RUN, f'--config={name}'), code, hours, flag)


def _sweep(path: str, folder: str, hours: float, *flags: str) -> Page:
  path = f'experiments/{path}'
  program = _SWEEP, f'--config={path}', '--seeds=3', *flags
  return Page(folder, program, (path, *_MODEL), hours)


_MODEL = (
  'nested_learning/memory',
  'nested_learning/layers',
  'nested_learning/models',
)
_LEVELS = (*_MODEL, 'nested_learning/levels')
_QUICKSTART = (
  'bits_per_byte',
  'bits_per_byte_writes_off',
  'stream_bits_per_byte_writes_off',
  'stream_bits_per_byte',
  'stream_bits_per_byte_levels_learning',
  'train_seconds',
)
_ABLATIONS = (
  'components',
  'levels',
  'memory',
  'erase',
  'read',
  'retain_to',
  'atlas',
  'local_targets',
)
_BENCHMARKS = {  # rooms that they measure, and hours
  'engine': (_MODEL, 0.2),
  'zoo': (_MODEL, 0.4),
  'levels': (_LEVELS, 0.2),
  'adapters': (('nested_learning/pretrained', *_LEVELS), 0.3),
  'serving': (('nested_learning/serving', *_LEVELS), 0.5),
  'optimizers': (('nested_learning/optimizers',), 0.8),
}
PAGES = {
  'quickstart': _sweep(
    'quickstart.py', 'quickstart', 0.3, f'--metrics={",".join(_QUICKSTART)}'
  ),
  'hope': _sweep('ablations/hope.py', 'ablations/hope', 6.0),
  'rows': _experiment('benchmarks/rows.py', 'benchmarks/rows', _MODEL, 0.2),
  'small': Page(
    'small',
    ('experiments/bench_small.py',),
    ('experiments/bench_small.py', 'nested_learning/tasks', *_MODEL),
    1.5,
  ),
  'streams': _experiment('streams.py', 'streams', _LEVELS, 1.0),
  'pretrained_streams': _experiment(
    'pretrained/streams.py', 'pretrained_streams', _LEVELS, 8.0
  ),
  'aliases_trained': _sweep('small/aliases.py', 'aliases_trained', 2.0),
  'aliases': _experiment('aliases.py', 'aliases', _MODEL, 0.1),
  'optimizers': _experiment(
    'optimizers/compare.py', 'optimizers', ('nested_learning/optimizers',), 4.0
  ),
  'forgetting': _experiment(
    'optimizers/forgetting.py',
    'forgetting',
    ('nested_learning/optimizers',),
    0.1,
  ),
  'facts': _experiment('continual/facts.py:full', 'facts', _LEVELS, 3.0),
  'closed_book': _experiment(
    'continual/closed_book.py', 'closed_book', _LEVELS, 1.0
  ),
  'horizon': _experiment('continual/horizon.py', 'horizon', _LEVELS, 2.0),
  'frequencies': _experiment(
    'continual/frequencies.py', 'frequencies', _LEVELS, 4.0
  ),
  'languages': _experiment(
    'continual/languages.py', 'languages', _LEVELS, 0.5, None
  ),
  'classes': _experiment('continual/classes.py', 'classes', _LEVELS, 1.0, None),
  **{
    name: _sweep(f'ablations/{name}.py', f'ablations/{name}', 0.5)
    for name in _ABLATIONS
  },
  **{
    f'benchmark_{name}': _experiment(
      f'benchmarks/{name}.py', f'benchmarks/{name}', code, hours, None
    )
    for name, (code, hours) in _BENCHMARKS.items()
  },
  'compiled': Page(
    '../compiled',
    ('experiments/compiled.py',),
    ('experiments/compiled.py', 'experiments/hope.py', *_MODEL),
    2.0,
    None,
  ),
}


def make(pages: Mapping[str, Page], workdir: pathlib.Path) -> int:
  """Runs the commands of some pages; returns the exit code.

  A page that is copied has no cells to go on from; it is made anew if its code
  has changed.

  Args:
    pages: The pages by name, in order.
    workdir: Folder of the runs.
  """
  failed, begin = [], time.monotonic()
  for i, (name, page) in enumerate(pages.items()):
    command = page.command(workdir / name)
    left = sum(x.hours for x in list(pages.values())[i:])
    print(
      f'[{i + 1} of {len(pages)}] {name}: {shlex.join(["python", *command])}\n'
      f'  {(time.monotonic() - begin) / 3600:.1f} hours since the start; at '
      f'most about {left:g} from here, less what is finished',
      flush=True,
    )
    if page.flag is None and _age(page) == 0:
      print('  up to date')
      continue
    code = programs.call([sys.executable, *command], _HERE)
    if code:
      failed.append(f'{name}: exit code {code}')
      continue
    if page.flag is None:
      _copy(workdir / name, _HERE / page.path)
    _note_age(page)
  for line in failed:
    print(line, file=sys.stderr)
  return 1 if failed else 0


def describe(page: Page) -> str:
  """Returns one line on how old a page is."""
  if not (_HERE / page.path / 'README.md').is_file():
    return f'not made yet; about {page.hours:g} hours'
  commits, age = _commits(page), _age(page)
  if age is None:
    return f'{page.path}, of a commit that is not known here'
  state = _changed(age) if age else 'up to date'
  if any(commit.endswith(_DIRTY) for commit in commits):
    state += ', and it had changes that are in no commit'
  return f'{page.path}, of {", ".join(commits)}: {state}'


def _changed(age: int) -> str:
  return f'its code has changed in {age} commits since'


def _commits(page: Page) -> list[str]:
  """Returns the commits that a page names, with '-dirty' where it says so."""
  text = (_HERE / page.path / 'README.md').read_text(encoding='utf-8')
  lines = ' '.join(_COMMIT.findall(text))
  return sorted(set(re.findall(rf'\b[0-9a-f]{{7,40}}(?:{_DIRTY})?\b', lines)))


def _age(page: Page) -> int | None:
  """Returns how many commits changed a page's code; None if not known."""
  if not (_HERE / page.path / 'README.md').is_file():
    return None
  code = sorted({path for start in page.code for path in _imported(start)})
  ages = [provenance.changes_since(commit, code) for commit in _commits(page)]
  return None if not ages or None in ages else max(ages)


def _imported(path: str, seen: frozenset[str] = frozenset()) -> Iterator[str]:
  """Yields a file of experiments/ and those that it imports there; any path."""
  yield path
  file = _HERE / path
  if path in seen or file.suffix != '.py' or not file.is_file():
    return
  for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
    if isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        found = f'{node.module}.{alias.name}'.replace('.', '/') + '.py'
        if found.startswith('experiments/') and (_HERE / found).is_file():
          yield from _imported(found, seen | {path})


def _copy(workdir: pathlib.Path, folder: pathlib.Path) -> None:
  """Copies the report of a run, its plots and summary.json to a page."""
  if not (workdir / 'report.md').is_file():
    return  # the program writes its page itself
  plots = {path.name: path.name for path in workdir.glob('*.png')}
  names = {'report.md': 'README.md', 'summary.json': 'summary.json', **plots}
  for name, target in names.items():
    files.write_whole(folder / target, (workdir / name).read_bytes())


def _note_age(page: Page) -> None:
  """Adds to a page that its code has changed, if it has, and nothing else."""
  path = _HERE / page.path / 'README.md'
  if not path.is_file():
    return
  text = re.sub(rf'(?m)^{_AGE}.*\n', '', path.read_text(encoding='utf-8'))
  if age := _age(page):
    line = rf'\1{_AGE}**{_changed(age)}**\n'
    text = re.sub(r'(?m)^(- commit: .*\n)', line, text)
  files.write_whole(path, text)
