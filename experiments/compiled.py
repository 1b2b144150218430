"""Compiles every model size for slices that could train it, into a table.

    python experiments/compiled.py
    python experiments/compiled.py --only=hope_170m,v6e:4x4
    python experiments/compiled.py --check

Needs libtpu (pip install '.[tpu]', or TPU_LIBRARY_PATH) but no TPU; rows of
GPUs need jaxlib's plugin for CUDA but no GPU. Each row is a
`launch/run.py --mode=compile` in a process of its own. The same command again
compiles the rows that are missing or whose config has changed; --again compiles
all chosen rows. After every row, the page and the numbers are written to
experiments/compiled/README.md and table.json.

--check compiles nothing: it lists the rows that are missing, whose config has
changed, or whose code has changed since their commit. The page marks the last.

Time: two to eight minutes a row on one core, longer with more tokens per
device.

Exits with 0 if the table has every chosen row, with 1 if one could not be
compiled or --check names one, with 2 and one line if a flag is wrong.
"""

import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if _ROOT not in sys.path:
  sys.path.insert(0, _ROOT)  # A checkout runs without being installed.

from launch import startup

if __name__ == '__main__':
  startup.begin()  # before the imports, which take longer

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
from typing import Any

from absl import flags

from experiments import report_files
from launch import programs
from launch import provenance
from nested_learning import errors
from nested_learning import files

_EXPERIMENTS = pathlib.Path(_ROOT, 'experiments')

# Other programs have flags of the same names; a test may import them as well.
_ONLY = flags.DEFINE_list(
  'only',
  [],
  'Rows to compile: names of experiments, topologies, or both.',
  allow_override=True,
)
_AGAIN = flags.DEFINE_bool(
  'again', False, 'Compile rows that the table has already, too.'
)
_CHECK = flags.DEFINE_bool(
  'check', False, 'List the rows that are out of date; compile nothing.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  'runs/compiled',
  'Folder for the output of each row.',
  allow_override=True,
)


@dataclasses.dataclass(frozen=True)
class Row:
  """An experiment, and a slice to compile it for.

  Attributes:
    name: 'hope_', 'transformer_' or 'gated_deltanet_', and a size of
      experiments/hope.py; 'llama_' and a size of
      experiments/pretrained/llama.py.
    topology: The slice, as for --topology.
    settings: Overrides, as for --set.
  """

  name: str
  topology: str
  settings: tuple[str, ...] = ()

  @property
  def spec(self) -> str:
    """The experiment, as for --config."""
    if self.name.startswith('llama_'):
      size = self.name.removeprefix('llama_')
      return f'{_EXPERIMENTS / "pretrained" / "llama.py"}:{size}'
    size = self.name.removeprefix('hope_')
    return f'{_EXPERIMENTS / "hope.py"}:{size}'

  @property
  def key(self) -> str:
    """Key in the table, and name of the row's folder."""
    return report_files.key(
      '_'.join([self.name, self.topology, *self.settings])
    )


_OLDER = '†'  # beside numbers of an older count
_CHANGED = '‡'  # beside rows whose code has changed
# The code that a row concerns; without memories, of Transformers.
_CODE = (
  'nested_learning/accelerators.py',
  'nested_learning/compilation',
  'nested_learning/layers',
  'nested_learning/levels',
  'nested_learning/models',
  'nested_learning/optimizers',
  'nested_learning/planning',
  'nested_learning/sharding.py',
  'nested_learning/training/sharded_step.py',
  'nested_learning/training/step.py',
)
_MEMORY_CODE = ('nested_learning/memory', 'nested_learning/context_parallel.py')

# Without levels that learn inside a row, to see what these cost.
_FROZEN = ('inner.levels=()',)

ROWS = (
  Row('hope_170m', 'v5e:4x4'),
  Row('hope_170m', 'v5e:4x4', _FROZEN),
  Row('transformer_170m', 'v5e:4x4'),
  Row('gated_deltanet_170m', 'v5e:4x4'),
  Row('hope_170m', 'v6e:4x4'),
  Row('hope_170m', 'h100:1x8'),
  Row('hope_340m', 'v5e:4x8'),
  Row('transformer_340m', 'v5e:4x8'),
  Row('gated_deltanet_340m', 'v5e:4x8'),
  Row('hope_340m', 'v5p:2x4x4'),
  Row('hope_760m', 'v5e:8x8'),
  Row('transformer_760m', 'v5e:8x8'),
  Row('gated_deltanet_760m', 'v5e:8x8'),
  Row('hope_760m', 'v5p:4x4x4'),
  Row('hope_1p3b', 'v5e:8x16'),
  Row('hope_1p3b', 'v5e:8x16', _FROZEN),
  Row('transformer_1p3b', 'v5e:8x16'),
  Row('gated_deltanet_1p3b', 'v5e:8x16'),
  Row('hope_1p3b', 'v5p:4x4x8'),
  Row('hope_1p3b', 'v5e:8x16*2', ('mesh.model=4',)),
  Row('hope_1p3b', 'h100:4x8', ('mesh.model=1',)),
  Row('hope_7b', 'v5p:4x4x8'),
  Row('hope_7b', 'v5p:4x4x8', _FROZEN),
  Row('transformer_7b', 'v5p:4x4x8'),
  Row('gated_deltanet_7b', 'v5p:4x4x8'),
  Row('hope_7b', 'v6e:8x16'),
  Row('hope_70b', 'v5p:8x8x16'),
  Row('hope_70b', 'v5p:8x8x16', _FROZEN),
  Row('transformer_70b', 'v5p:8x8x16'),
  Row('gated_deltanet_70b', 'v5p:8x8x16'),
  Row('hope_70b', 'tpu7x:8x8x8'),
  Row('llama_8b', 'v5p:4x4x4'),
  Row('llama_8b', 'v6e:8x8'),
)

_KEPT = (  # keys of summary.json
  'name',
  'topology',
  'num_devices',
  'mesh',
  'accumulate',
  'parameters',
  'batch_tokens',
  'hbm_bytes',
  'fits',
  'compiler',
  'peak_bytes',
  'argument_bytes',
  'temporary_bytes',
  'flops_ratio',
  'flops_in_memories',
  'results_in_memories',
  'collective_bytes',
  'collective_share',
  'collectives_in_memory_scans',
  'memory_traffic_bytes',
  'memory_traffic_bytes_padded',
  'cycles',
  'cycles_in_memories',
  'compiler_seconds',
  'step_seconds',
  'step_seconds_overlapped',
  'mfu_estimate',
  'mfu_bound',
  'compile_cpu_seconds',
)


def run(
  rows: Sequence[Row],
  folder: pathlib.Path,
  compile_row: Callable[[Row], dict[str, Any]],
  *,
  again: bool = False,
) -> list[str]:
  """Compiles the rows that the table lacks; writes it after each.

  Args:
    rows: The chosen rows.
    folder: Folder of README.md and table.json.
    compile_row: Function that compiles a row and returns its summary.
    again: Whether to compile rows again that the table has.

  Returns:
    A line for each row that could not be compiled.
  """
  path, table = folder / 'table.json', _read(folder)
  failed = []
  for row in rows:
    fingerprint = _fingerprint(row)
    if not again and table.get(row.key, {}).get('config') == fingerprint:
      print(f'{row.key}: is in the table.')
      continue
    print(f'{row.key}: compiling.', flush=True)
    try:
      summary = compile_row(row)
    except errors.UserError as error:
      failed.append(f'{row.key}: {error}')
      continue
    table[row.key] = {
      'config': fingerprint,
      'settings': list(row.settings),
      'jax': importlib.metadata.version('jax'),
      'source': provenance.provenance(),
      **{name: summary[name] for name in _KEPT if name in summary},
    }
    order = {row.key: i for i, row in enumerate(ROWS)}
    table = dict(
      sorted(table.items(), key=lambda one: order.get(one[0], len(order)))
    )
    files.write_whole(path, json.dumps(table, indent=2) + '\n')
    page = describe(list(table.values()))
    files.write_whole(folder / 'README.md', page)
  return failed


def compile_in_process(row: Row, workdir: pathlib.Path) -> dict[str, Any]:
  """Compiles a row with the launcher, in a process of its own.

  A process, because libtpu ends the one it runs in when it fails.

  Args:
    row: The row.
    workdir: Parent of the row's folder.

  Returns:
    The content of its summary.json.

  Raises:
    errors.UserError: It cannot be compiled; the message is the launcher's.
  """
  folder = workdir / row.key
  result = subprocess.run(
    [
      sys.executable,
      os.path.join(_ROOT, 'launch', 'run.py'),
      f'--config={row.spec}',
      '--mode=compile',
      f'--topology={row.topology}',
      f'--workdir={folder}',
      *(f'--set={setting}' for setting in row.settings),
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  if result.returncode not in (0, 1):  # 1: it does not fit
    last = (result.stderr.strip() or 'no message').splitlines()[-1]
    raise errors.UserError(f'exit code {result.returncode}: {last}')
  summary = folder / 'summary.json'
  if not summary.exists():
    last = (result.stderr.strip() or 'no message').splitlines()[-1]
    raise errors.UserError(f'no summary.json: {last}')
  return json.loads(summary.read_text('utf-8'))


def describe(table: Sequence[dict[str, Any]]) -> str:
  """Renders the page: one line per size and slice."""
  head = (
    'experiment',
    'slice',
    'mesh',
    'micro-batches',
    'parameters',
    'GiB per device',
    'of',
    'fits',
    'of FLOPs in memories',
    'of buffers in memories',
    'sent, GiB',
    'of all bytes',
    'step at least, s',
    'MFU at most',
    'step as the compiler estimates, s',
    'compiled in, s of a core',
  )
  sections = [
    '# Compiled, not run',
    "The compiler's numbers for every shipped size, on slices that could train "
    'it. `python experiments/compiled.py` makes this page; `table.json` has '
    'the numbers.',
    report_files.table(head, [_line(row) for row in table]),
    'GiB per device are what a training step needs, of what the device has. '
    'Buffers are the results of all instructions, each counted once. Sent are '
    'the bytes that one device sends in a step, and their share of all bytes '
    'that it sends, reads and writes. The time of a step is a roofline with '
    'collectives overlapping with everything: a lower bound. The compiler of '
    "TPUs estimates cycles, too; they are no bound, and v6e's and tpu7x's "
    'clocks are not published. Nothing was run.',
  ]
  changed = sum(stale(row) is not None for row in table)
  if changed:
    sections.append(
      f'{_CHANGED} {changed} rows are older than the code that they concern, '
      'or of a commit that is not known; `python experiments/compiled.py '
      '--check` lists them, and --again compiles them anew.'
    )
  if any(_is_older(row) for row in table):
    sections.append(
      f'{_OLDER} An older count of memory traffic: a slice that is taken in a '
      'fusion inside a fusion counted as the whole array, on TPUs the inputs '
      'of a whole row in every chunk. The share of bytes that are sent is too '
      'low, the time of a step too long, and the MFU too low, by a factor of '
      'two and more where memories read and write most bytes.'
    )
  sources = [row['source'] for row in table if 'source' in row]
  lacking = len(table) - len(sources)
  more = {'rows that left no record of these': str(lacking)} if lacking else {}
  sections += [report_files.MADE, provenance.listed(sources, more)]
  return '\n\n'.join(sections) + '\n'


def stale(row: Mapping[str, Any]) -> str | None:
  """Returns why a row of table.json is older than its code, or None."""
  commit = row.get('source', {}).get('commit')
  if commit is None:
    return 'it left no record of its commit'
  spec = Row(row['name'], row['topology']).spec.partition(':')[0]
  paths = [*_CODE, os.path.relpath(spec, _ROOT)]
  if not row['name'].startswith('transformer_'):
    paths += _MEMORY_CODE
  number = provenance.changes_since(commit, paths)
  if number is None:
    return f'its commit, {commit}, is not known here'
  if number:
    return f'its code has changed in {number} commits since {commit}'
  return None


def check(rows: Sequence[Row], folder: pathlib.Path) -> list[str]:
  """Returns a line for each row that is missing or out of date.

  Args:
    rows: The chosen rows.
    folder: Folder of table.json.
  """
  table = _read(folder)
  lines = []
  for row in rows:
    found = table.get(row.key)
    if found is None:
      reason = 'it is not in the table'
    elif found['config'] != _fingerprint(row):
      reason = 'its config has changed'
    else:
      reason = stale(found)
    if reason is not None:
      lines.append(f'{row.key}: {reason}.')
  return lines


def _read(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / 'table.json'
  return json.loads(path.read_text('utf-8')) if path.exists() else {}


def _is_older(row: dict[str, Any]) -> bool:
  """Whether the row's memory traffic was counted without nested fusions."""
  is_counted = 'mfu_bound' in row
  return is_counted and 'memory_traffic_bytes_padded' not in row


def _line(row: dict[str, Any]) -> list[Any]:
  gib = lambda name: f'{row[name] / 2**30:.1f}' if name in row else ''
  number = lambda name, form: format(row[name], form) if name in row else ''
  mesh = [f'{axis} {size}' for axis, size in row['mesh'].items() if size > 1]
  mark = _OLDER if _is_older(row) else ''
  return [
    ' '.join([row['name'], *row['settings']])
    + (_CHANGED if stale(row) else ''),
    row['topology'],
    ' x '.join(mesh) or 'one device',
    row['accumulate'],
    f'{row["parameters"]:,}',
    gib('peak_bytes') or row.get('compiler', ''),
    gib('hbm_bytes'),
    'yes' if row['fits'] else 'NO',
    number('flops_in_memories', '.2f'),
    number('results_in_memories', '.2f'),
    gib('collective_bytes'),
    number('collective_share', '.3f') + mark,
    number('step_seconds_overlapped', '.3f') + mark,
    number('mfu_bound', '.2f') + mark,
    number('compiler_seconds', '.3f'),
    number('compile_cpu_seconds', '.0f'),
  ]


def choose(only: Sequence[str]) -> list[Row]:
  """Returns the rows that --only names; all rows if it is empty.

  Args:
    only: Names of experiments and topologies.

  Returns:
    Rows with one of the names and one of the topologies.

  Raises:
    errors.UserError: A name belongs to no row, or no row is left.
  """
  names = {row.name for row in ROWS} & set(only)
  topologies = {row.topology for row in ROWS} & set(only)
  unknown = set(only) - names - topologies
  chosen = [
    row
    for row in ROWS
    if row.name in (names or (row.name,))
    and row.topology in (topologies or (row.topology,))
  ]
  if unknown or not chosen:
    rows = ', '.join(f'{row.name} on {row.topology}' for row in ROWS)
    raise errors.UserError(
      f'--only={",".join(only)} names no row of the table; there are {rows}.'
    )
  return chosen


def _fingerprint(row: Row) -> str:
  """Returns a hash of a row's config, which changes with the experiment."""
  from nested_learning import configs  # imports JAX; --help stays quick

  config = configs.override(configs.load(row.spec), list(row.settings))
  text = f'{row.topology} {configs.to_json(config)}'
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def main() -> None:
  """Parses the flags and runs."""
  programs.start(_main, example='--only=hope_170m')


def _main() -> int:
  programs.check_path('workdir', _WORKDIR.value, folder=True)
  rows, folder = choose(_ONLY.value), _EXPERIMENTS / 'compiled'
  if _CHECK.value:
    failed = check(rows, folder)
  else:
    failed = run(
      rows,
      folder,
      lambda row: compile_in_process(row, pathlib.Path(_WORKDIR.value)),
      again=_AGAIN.value,
    )
  for line in failed:
    programs.print_error(line)
  return 1 if failed else 0


if __name__ == '__main__':
  main()
