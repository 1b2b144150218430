"""Compiles every size for slices it could be trained on, and keeps the table.

    python experiments/compiled.py
    python experiments/compiled.py --only=hope_170m,v6e:4x4

Needs libtpu (pip install '.[tpu]', or TPU_LIBRARY_PATH) and no TPU; for rows of
GPUs, jaxlib's plugin for CUDA and no GPU (without it a message names it). Each
row is a `launch/run.py --mode=compile` in a process of its own. The same
command again compiles what is missing, and what has another config by now;
--again compiles all of the chosen. After every row the page and the numbers are
written anew, to experiments/compiled/README.md and table.json.

Time: on one core two to eight minutes a row, the longer the more tokens a
device has.

Exits with 0 when every chosen row is there, with 1 when one could not be
compiled, with 2 and one line when a flag is wrong.
"""

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
import sys
from typing import Any

_ROOT = pathlib.Path(__file__).resolve().parents[1]
if str(_ROOT) not in sys.path:
  sys.path.insert(0, str(_ROOT))  # A checkout runs without being installed.

from launch import startup  # noqa: E402

if __name__ == '__main__':
  startup.begin()

from absl import flags  # noqa: E402

from experiments import report_files  # noqa: E402
from launch import programs  # noqa: E402
from nested_learning import errors  # noqa: E402

_ONLY = flags.DEFINE_list(
  'only', [], 'Rows to compile: names of experiments, topologies, or both.'
)
_AGAIN = flags.DEFINE_bool(
  'again', False, 'Compile rows that are in the table already.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/compiled', 'Folder of what each row leaves.'
)


@dataclasses.dataclass(frozen=True)
class Row:
  """An experiment, and a slice to compile it for."""

  name: str  # of its file in experiments/
  topology: str
  settings: tuple[str, ...] = ()  # as --set has them

  @property
  def key(self) -> str:
    """The row's own name, also of its folder."""
    return report_files.key(
      '_'.join([self.name, self.topology, *self.settings])
    )


ROWS = (
  Row('hope_170m', 'v5e:4x4'),
  Row('hope_170m', 'v6e:4x4'),
  Row('hope_170m', 'h100:1x8'),
  Row('hope_340m', 'v5e:4x8'),
  Row('hope_340m', 'v5p:2x4x4'),
  Row('hope_760m', 'v5e:8x8'),
  Row('hope_760m', 'v5p:4x4x4'),
  Row('hope_1p3b', 'v5e:16x16'),
  Row('hope_1p3b', 'v5p:4x4x8'),
  Row('hope_1p3b', 'v5e:8x16*2'),
  Row('hope_1p3b', 'h100:4x8'),
  Row('hope_7b', 'v5p:4x4x8'),
  Row('hope_7b', 'v6e:8x16'),
  Row('hope_70b', 'v5p:8x8x16'),
  Row('hope_70b', 'tpu7x:8x8x8'),
)

_KEPT = (  # of summary.json
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
  """Compiles the rows that the table lacks, and writes it after each.

  Args:
    rows: Those that are wanted.
    folder: Of README.md and table.json.
    compile_row: Gives what summary.json has of a row.
    again: Whether rows that are there are compiled again.

  Returns:
    A line for each row that could not be compiled.
  """
  path = folder / 'table.json'
  table = json.loads(path.read_text('utf-8')) if path.exists() else {}
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
      **{name: summary[name] for name in _KEPT if name in summary},
    }
    order = {row.key: i for i, row in enumerate(ROWS)}
    table = dict(
      sorted(table.items(), key=lambda one: order.get(one[0], len(order)))
    )
    _write(path, json.dumps(table, indent=2) + '\n')
    _write(folder / 'README.md', describe(list(table.values())))
  return failed


def compile_in_process(row: Row, workdir: pathlib.Path) -> dict[str, Any]:
  """Compiles a row with the launcher, in a process that libtpu may end.

  Args:
    row: What to compile.
    workdir: Folder for the row's own folder.

  Returns:
    Its summary.json.

  Raises:
    errors.UserError: It cannot be compiled, in the launcher's words.
  """
  folder = workdir / row.key
  result = subprocess.run(
    [
      sys.executable,
      str(_ROOT / 'launch' / 'run.py'),
      f'--config={_ROOT / "experiments" / row.name}.py',
      '--mode=compile',
      f'--topology={row.topology}',
      f'--workdir={folder}',
      *(f'--set={setting}' for setting in row.settings),
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  if result.returncode not in (0, 1):  # 1 says that it does not fit
    last = (result.stderr.strip() or 'no message').splitlines()[-1]
    raise errors.UserError(f'exit code {result.returncode}: {last}')
  summary = folder / 'summary.json'
  if not summary.exists():
    last = (result.stderr.strip() or 'no message').splitlines()[-1]
    raise errors.UserError(f'no summary.json: {last}')
  return json.loads(summary.read_text('utf-8'))


def describe(table: Sequence[dict[str, Any]]) -> str:
  """The page: one line per size and slice."""
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
    'compiled in, s of a core',
  )
  sections = [
    '# Compiled, not run',
    'What the compiler says of every shipped size on slices that it could be '
    'trained on. `python experiments/compiled.py` makes this page; '
    '`table.json` has the numbers.',
    report_files.table(head, [_line(row) for row in table]),
    'GiB are what a device needs for a training step, and has. Buffers are the '
    'results of all instructions, each once. Sent is what one device sends in '
    'a step, of all bytes that it sends, reads and writes. The time of a step '
    'is a roofline, collectives overlapping with everything: no run is faster, '
    'and all are slower. '
    'Nothing was run.',
  ]
  return '\n\n'.join(sections) + '\n'


def _line(row: dict[str, Any]) -> list[Any]:
  gib = lambda name: f'{row[name] / 2**30:.1f}' if name in row else ''
  number = lambda name, form: format(row[name], form) if name in row else ''
  mesh = [f'{axis} {size}' for axis, size in row['mesh'].items() if size > 1]
  return [
    ' '.join([row['name'], *row['settings']]),
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
    number('collective_share', '.3f'),
    number('step_seconds_overlapped', '.3f'),
    number('mfu_bound', '.2f'),
    number('compile_cpu_seconds', '.0f'),
  ]


def choose(only: Sequence[str]) -> list[Row]:
  """The rows that --only names; all where it names none.

  Args:
    only: Names of experiments and topologies.

  Returns:
    Rows with one of the names and one of the topologies.

  Raises:
    errors.UserError: No row has what is named.
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
  """Of a row's config: another experiment is another row."""
  from nested_learning import configs  # JAX comes with it: --help is quick

  path = _ROOT / 'experiments' / f'{row.name}.py'
  config = configs.override(configs.load(str(path)), list(row.settings))
  text = f'{row.topology} {configs.to_json(config)}'
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix('.tmp')  # whole, or not at all
  temporary.write_text(text, encoding='utf-8')
  temporary.replace(path)


def main() -> None:
  """Parses the flags and runs."""
  programs.start(_main, example='--only=hope_170m')


def _main() -> int:
  programs.check_path('workdir', _WORKDIR.value, folder=True)
  failed = run(
    choose(_ONLY.value),
    _ROOT / 'experiments' / 'compiled',
    lambda row: compile_in_process(row, pathlib.Path(_WORKDIR.value)),
    again=_AGAIN.value,
  )
  for line in failed:
    programs.print_error(line)
  return 1 if failed else 0


if __name__ == '__main__':
  main()
