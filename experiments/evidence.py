"""Makes the pages of results anew, one after another.

    make evidence
    make evidence EVIDENCE_FLAGS=--only=facts,streams
    python experiments/evidence.py --list

Every page has one command, which goes on where it was interrupted and keeps
what it finished among the results, so that the same command again, also on
another machine, measures what is missing. A command whose page is complete
ends within a minute. --list prints the pages, with the commits that measured
them and how many commits have changed their code since.

Hardware: two CPU cores, a day for all of it.

The exit code is 0; 1, with a line for each page whose command failed; 2, with
one line, if a flag is wrong.
"""

import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if _ROOT not in sys.path:
  sys.path.insert(0, _ROOT)  # A checkout runs without being installed.

from launch import startup

if __name__ == '__main__':
  startup.begin()  # before the imports, which take longer

from collections.abc import Sequence
import pathlib
import re
import shlex
import subprocess
import time
from typing import NamedTuple

from absl import flags

from launch import programs
from nested_learning import errors

_RESULTS = 'experiments/results'
_RUN, _SWEEP = 'launch/run.py', 'launch/sweep.py'
_HERE = pathlib.Path(_ROOT)

_ONLY = flags.DEFINE_list('only', [], 'Names of pages, as --list prints them.')
_LIST = flags.DEFINE_bool('list', False, 'Prints the pages, and runs nothing.')
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/evidence', 'Folder of the runs, one below it for each page.'
)


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
  'facts': _experiment('continual/facts.py', 'facts', _LEVELS, 2.0),
  'horizon': _experiment('continual/horizon.py', 'horizon', _LEVELS, 2.0),
  'frequencies': _experiment(
    'continual/frequencies.py', 'frequencies', _LEVELS, 4.0
  ),
}


def main() -> None:
  """Parses the flags and runs."""
  programs.start(_run, example='--only=facts')


def _run() -> int:
  unknown = sorted(set(_ONLY.value) - set(PAGES))
  if unknown:
    raise errors.UserError(
      f'--only={",".join(unknown)} names no page; there are {", ".join(PAGES)}.'
    )
  programs.check_path('workdir', _WORKDIR.value, folder=True)
  pages = {x: PAGES[x] for x in PAGES if not _ONLY.value or x in _ONLY.value}
  if _LIST.value:
    for name, page in pages.items():
      print(f'{name}: {describe(page)}')
    return 0
  return make(pages, pathlib.Path(_WORKDIR.value))


def make(pages: dict[str, Page], workdir: pathlib.Path) -> int:
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


if __name__ == '__main__':
  main()
