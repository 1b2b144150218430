"""Provenance of results: command, commit, machine, date and software."""

from collections.abc import Iterable, Mapping, Sequence
import datetime
from importlib import metadata
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys

STARTS = 'started.jsonl'  # in a run's folder: a line for each start
_ROOT = pathlib.Path(__file__).resolve().parents[1]
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')
_DIRTY = '-dirty'
# The part of an argument before the value of an environment variable.
_SECRET = re.compile(
  r'(?s)(.*?--?(?:env|export)[= ]\w[^=]*=|--?run_flag=[A-Za-z_]\w*=)'
)
_TAKES_SECRET = re.compile('--?(run_flag|sbatch|env|export)$')


def provenance() -> dict[str, str]:
  """Returns the command, commit, machine, date and software of this process.

  A commit ends in '-dirty' if files of the code differ from it; results do not
  count.
  """
  versions = [f'{name} {metadata.version(name)}' for name in _PACKAGES]
  return {
    'command': portable(shown_command(sys.argv)),
    'commit': _commit(),
    'machine': f'{num_cores()} cores, {_processor()}',
    'date': datetime.date.today().isoformat(),
    'software': ', '.join([f'Python {platform.python_version()}', *versions]),
  }


def note_start(folder: pathlib.Path, *, num_jobs: int, is_here: bool) -> None:
  """Adds a line on this process to the started.jsonl of a run.

  Args:
    folder: Workdir of the run, which exists.
    num_jobs: Number of runs at a time.
    is_here: Whether the run is on this machine. Otherwise neither machine nor
      software is known.
  """
  source = provenance()
  source['machine'] += f', {num_jobs} runs at a time' if num_jobs > 1 else ''
  if not is_here:
    del source['machine'], source['software']
  with open(folder / STARTS, 'a', encoding='utf-8') as file:
    file.write(json.dumps(source) + '\n')


def read_starts(folder: pathlib.Path) -> list[dict[str, str]]:
  """Reads the lines of started.jsonl, one per start of a run."""
  path = folder / STARTS
  if not path.is_file():
    return []
  lines = path.read_text(encoding='utf-8').splitlines()
  return [json.loads(line) for line in lines]


def changes_since(commit: str, paths: Sequence[str]) -> int | None:
  """Returns how many commits changed the code at some paths.

  Args:
    commit: The commit of a result, perhaps with '-dirty'; later ones count.
    paths: Files and folders, from the root of the repository.

  Returns:
    The number, or None if the commit is not known here.
  """
  since = f'{commit.removesuffix(_DIRTY)}..HEAD'
  git = ['git', '-C', str(_ROOT), 'rev-list', '--count', since]
  try:
    found = subprocess.run(
      [*git, '--', *paths, ':!*.md'], capture_output=True, text=True, check=True
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return int(found.stdout)


def listed(
  sources: Iterable[Mapping[str, str]], more: Mapping[str, str]
) -> str:
  """Returns a Markdown list of the sources of some numbers.

  Args:
    sources: From `provenance` or `read_starts`; keys may be missing.
    more: Further lines.

  Returns:
    A line for each key with all its values, and one for each command. Dates
    are from the first to the last one. Commits with changes are marked.
  """
  found: dict[str, set[str]] = {}
  for source in sources:
    for key, value in source.items():
      found.setdefault(key, set()).add(value)
  lines = []
  for key, values in found.items():
    values = sorted(values)
    if key == 'command':
      lines += ['- commands:', *(f'  - `{_quoted(v)}`' for v in values)]
      continue
    if key == 'date':
      values = [' to '.join(dict.fromkeys((values[0], values[-1])))]
    text = '; '.join(
      f'**{value}: with changes that are in no commit**'
      if key == 'commit' and value.endswith(_DIRTY)
      else value
      for value in values
    )
    lines.append(f'- {key}: {text}')
  return '\n'.join([*lines, *(f'- {key}: {more[key]}' for key in more)])


def shown_command(arguments: Sequence[str]) -> str:
  """Returns a command line without the values of environment variables.

  A value of --env, or of sbatch's --export, may be a password, and pages of
  results are meant to be shown.

  Args:
    arguments: The program and its arguments, as typed.
  """
  shown = ['python']
  for before, argument in zip(['', *arguments], arguments, strict=False):
    secret = _SECRET.match(argument)
    if not secret and _TAKES_SECRET.search(before):
      secret = re.match(r'([A-Za-z_]\w*=)', argument)
    shown.append(f'{secret[1]}...' if secret else argument)
  return shlex.join(shown)


def portable(command: str) -> str:
  """Returns a command without the folders that absolute paths begin with."""
  return re.sub(r"(?<![\w.])/(?:[^\s/'=]+/)+", '', command)


def num_cores() -> int:
  """Returns the number of cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _quoted(command: str) -> str:
  """Returns a command with words in double quotes that contain single ones."""
  return ' '.join(
    f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else quoted
    for word in shlex.split(command)
    for quoted in [shlex.quote(word)]
  )


def _commit() -> str:
  """Returns the commit of the code, or 'unknown'."""
  git = ['git', '-C', str(_ROOT)]
  changes = [
    'status', '--porcelain', '--untracked-files=no', '--', '.',
    ':!experiments/results',
  ]  # fmt: skip
  try:
    commit, changed = (
      subprocess.run(
        [*git, *arguments], capture_output=True, text=True, check=True
      ).stdout.strip()
      for arguments in (['rev-parse', '--short', 'HEAD'], changes)
    )
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'
  return f'{commit}{_DIRTY}' if changed else commit


def _processor() -> str:
  """Returns the name of the processor."""
  path = pathlib.Path('/proc/cpuinfo')
  if path.is_file():
    for line in path.read_text(encoding='utf-8').splitlines():
      name, _, value = line.partition(':')
      if name.strip() == 'model name':
        return value.strip()
  return platform.processor() or platform.machine()
