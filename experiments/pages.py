"""The pages of results: which command makes each, and how old it is."""

from collections.abc import Mapping, Sequence
import pathlib
import re
import shlex
import subprocess
import sys
import time
from typing import NamedTuple

_HERE = pathlib.Path(__file__).resolve().parents[1]
_RESULTS = 'experiments/results'
_RUN, _SWEEP = 'launch/run.py', 'launch/sweep.py'


class Page(NamedTuple):
  """A page of results.

  Attributes:
    folder: Its folder in experiments/results.
    program: The program that makes it, and its arguments but for the folders.
    code: Files and folders whose code it measures.
    hours: About how long it takes on two cores, from nothing.
  """

  folder: str
  program: tuple[str, ...]
  code: tuple[str, ...]
  hours: float

  def command(self, workdir: pathlib.Path) -> list[str]:
    """Returns the command that makes the page."""
    name = '--set=results' if self.program[0] == _RUN else '--results'
    return [
      *self.program,
      f'--workdir={workdir}',
      f'{name}={_RESULTS}/{self.folder}',
    ]


def _experiment(path: str, folder: str, code: Sequence[str], hours: float):
  program = _RUN, f'--config=experiments/{path}'
  return Page(folder, program, (f'experiments/{path}', *code), hours)


def _sweep(path: str, folder: str, hours: float, *flags: str):
  path = f'experiments/{path}'
  program = _SWEEP, f'--config={path}', '--seeds=3', *flags
  return Page(folder, program, (path, *_MODEL), hours)


_MODEL = ('nested_learning/memory', 'nested_learning/layers')
_LEVELS = (*_MODEL, 'nested_learning/levels')
_QUICKSTART = (
  'bits_per_byte',
  'bits_per_byte_writes_off',
  'stream_bits_per_byte_writes_off',
  'stream_bits_per_byte',
  'stream_bits_per_byte_levels_learning',
  'train_seconds',
)
PAGES = {
  'quickstart': _sweep(
    'quickstart.py', 'quickstart', 0.3, f'--metrics={",".join(_QUICKSTART)}'
  ),
  'hope': _sweep('ablations/hope.py', 'ablations/hope', 6.0),
  'streams': _experiment('streams.py', 'streams', _LEVELS, 1.0),
  'pretrained_streams': _experiment(
    'pretrained/streams.py', 'pretrained_streams', _LEVELS, 8.0
  ),
  'optimizers': _experiment(
    'optimizers/compare.py', 'optimizers', ('nested_learning/optimizers',), 4.0
  ),
  'forgetting': _experiment(
    'optimizers/forgetting.py',
    'forgetting',
    ('nested_learning/optimizers',),
    0.1,
  ),
  'facts': _experiment('continual/facts.py', 'facts', _LEVELS, 2.0),
  'horizon': _experiment('continual/horizon.py', 'horizon', _LEVELS, 2.0),
  'frequencies': _experiment(
    'continual/frequencies.py', 'frequencies', _LEVELS, 4.0
  ),
}


def make(pages: Mapping[str, Page], workdir: pathlib.Path) -> int:
  """Runs the commands of some pages; returns the exit code.

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
    code = subprocess.run([sys.executable, *command], cwd=_HERE).returncode
    if code:
      failed.append(f'{name}: exit code {code}')
  for line in failed:
    print(line, file=sys.stderr)
  return 1 if failed else 0


def describe(page: Page) -> str:
  """Returns one line on how old a page is."""
  path = _HERE / _RESULTS / page.folder / 'README.md'
  if not path.is_file():
    return f'not made yet; about {page.hours:g} hours'
  lines = re.findall(r'(?m)^- commit: (.+)$', path.read_text(encoding='utf-8'))
  commits = sorted(set(re.findall(r'\b[0-9a-f]{7,40}\b', ' '.join(lines))))
  ages = [_count_changes(commit, page.code) for commit in commits]
  if not commits or None in ages:
    return f'{_RESULTS}/{page.folder}, of a commit that is not known here'
  age = max(ages)
  state = (
    f'its code has changed in {age} commits since' if age else 'up to date'
  )
  return f'{_RESULTS}/{page.folder}, of {", ".join(commits)}: {state}'


def _count_changes(commit: str, paths: Sequence[str]) -> int | None:
  """Returns how many commits since then changed the paths; None: not known."""
  git = ['git', '-C', str(_HERE), 'rev-list', '--count', f'{commit}..HEAD']
  try:
    found = subprocess.run(
      [*git, '--', *paths], capture_output=True, text=True, check=True
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return int(found.stdout)
