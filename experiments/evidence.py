"""Makes the pages of results anew, one after another.

    make evidence
    make evidence EVIDENCE_FLAGS=--only=facts,streams
    python experiments/evidence.py --list

Every page has one command, which goes on where it was interrupted. Most keep
what they finished among the results, so that the same command again, also on
another machine, measures what is missing, and ends within a minute if nothing
is; to measure all anew, remove the page's runs.json or cells. Benchmarks,
languages and classes keep nothing, and are made anew if their code changed.

--list prints the pages, with the commits that measured them and how many
commits have changed their code since. A page says so, too, when its command
ends.

Hardware: two CPU cores, two days for all of it.

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

import pathlib

from absl import flags

from experiments import pages
from launch import programs
from nested_learning import errors

_ONLY = flags.DEFINE_list('only', [], 'Names of pages, as --list prints them.')
_LIST = flags.DEFINE_bool('list', False, 'Prints the pages, and runs nothing.')
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/evidence', 'Folder of the runs, one below it for each page.'
)


def main() -> None:
  """Parses the flags and runs."""
  programs.start(_run, example='--only=facts')


def _run() -> int:
  unknown = sorted(set(_ONLY.value) - set(pages.PAGES))
  if unknown:
    raise errors.UserError(
      f'--only={",".join(unknown)} names no page; there are '
      f'{", ".join(pages.PAGES)}.'
    )
  programs.check_path('workdir', _WORKDIR.value, folder=True)
  chosen = {
    name: page
    for name, page in pages.PAGES.items()
    if not _ONLY.value or name in _ONLY.value
  }
  if _LIST.value:
    for name, page in chosen.items():
      print(f'{name}: {pages.describe(page)}')
    return 0
  return pages.make(chosen, pathlib.Path(_WORKDIR.value))


if __name__ == '__main__':
  main()
