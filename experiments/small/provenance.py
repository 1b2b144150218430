"""Where, when and with what a run was started."""

import datetime
from importlib import metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_FILE = 'started.jsonl'
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')


def note_start(folder: pathlib.Path, *, num_jobs: int) -> None:
  """Adds a line to a run's started.jsonl: code, machine, date, versions."""
  cores = f'{num_cores()} cores, {_processor()}'
  versions = [f'{name} {metadata.version(name)}' for name in _PACKAGES]
  line = {
    'command': shlex.join(['python', *sys.argv]),
    'commit': _commit(),
    'machine': f'{cores}, {num_jobs} runs at a time',
    'date': datetime.date.today().isoformat(),
    'software': ', '.join([f'Python {platform.python_version()}', *versions]),
  }
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / _FILE, 'a', encoding='utf-8') as file:
    file.write(json.dumps(line) + '\n')


def read_starts(folder: pathlib.Path) -> list[dict[str, str]]:
  """What `note_start` wrote, one line for each time the run was started."""
  path = folder / _FILE
  if not path.is_file():
    return []
  lines = path.read_text(encoding='utf-8').splitlines()
  return [json.loads(line) for line in lines]


def num_cores() -> int:
  """Cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _commit() -> str:
  """The commit of the code, '-dirty' behind it where files differ."""
  command = ['git', '-C', str(_ROOT), 'describe', '--always', '--dirty']
  try:
    result = subprocess.run(command, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'
  return result.stdout.strip()


def _processor() -> str:
  """What the processor calls itself."""
  path = pathlib.Path('/proc/cpuinfo')
  if path.is_file():
    for line in path.read_text(encoding='utf-8').splitlines():
      name, _, value = line.partition(':')
      if name.strip() == 'model name':
        return value.strip()
  return platform.processor() or platform.machine()
