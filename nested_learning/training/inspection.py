"""Inspects the checkpoints of a run and describes them for a person.

Every array is read and compared with its checksum, one at a time on the host.
"""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from nested_learning import errors
from nested_learning import markdown
from nested_learning.training import checkpoint_files
from nested_learning.training import checkpoints


class Inspection(NamedTuple):
  """The state of a run's checkpoints.

  Attributes:
    text: A description for a person.
    damaged: The damage of each checkpoint that cannot be used, by step.
  """

  text: str
  damaged: dict[int, str]


def inspect(workdir: pathlib.Path) -> Inspection:
  """Reads all checkpoints of a run and describes them.

  A checkpoint is damaged here if and only if training passes over it.

  Args:
    workdir: The run's folder.

  Returns:
    The steps, good or damaged; of the newest good one the manifest, the levels'
    clocks and the parameters.

  Raises:
    errors.UserError: There is no checkpoint, or it cannot be read.
  """
  workdir = pathlib.Path(workdir)
  with checkpoints.explain_failure(workdir, 'Cannot read the checkpoints'):
    steps = checkpoint_files.steps(workdir)
    if not steps:
      raise errors.UserError(
        f'{workdir} holds no checkpoint; give the --workdir of a run that has '
        'one.'
      )
    looks = {step: _look(workdir, step) for step in steps}
    scores = checkpoints.read_scores(workdir)
  rows = [
    (
      f'{step:,}',
      str(look.manifest.get('time', '')),
      f'{look.disk_bytes / 2**20:,.1f}',
      'good' if not look.damages else f'DAMAGED: {look.damages[0]}',
    )
    for step, look in looks.items()
  ]
  header = ('step', 'written', 'MiB on disk', 'state')
  parts = [f'# Checkpoints in {workdir}', markdown.table(header, rows)]
  damaged = {s: look.damages[0] for s, look in looks.items() if look.damages}
  good = [step for step in steps if step not in damaged]
  if good:
    newest = good[-1]
    parts += _describe(newest, looks[newest], scores.get(newest))
  else:
    parts.append('None of them is good: start again in another --workdir.')
  return Inspection('\n\n'.join(parts), damaged)


class _Look(NamedTuple):
  """One checkpoint."""

  manifest: dict[str, Any]
  arrays: dict[str, '_Array']
  scalars: dict[str, float]
  damages: list[str]
  disk_bytes: int


class _Array(NamedTuple):
  shape: tuple[int, ...]
  dtype: str
  num_bytes: int
  norm: float


def _look(workdir: pathlib.Path, step: int) -> _Look:
  """Reads a whole checkpoint; keeps a summary of each array."""
  folder = checkpoint_files.home(workdir) / str(step)
  disk_bytes = sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())
  try:
    manifest = checkpoint_files.read_manifest(folder)
    checkpoint_files.read_data(folder, manifest)
  except (checkpoint_files.Damaged, errors.UserError) as error:
    return _Look({}, {}, {}, [str(error)], disk_bytes)
  arrays, scalars, damages = {}, {}, []
  for name, array in checkpoint_files.read_arrays(
    folder, manifest['checksums']
  ):
    damage = checkpoint_files.find_damage(folder, manifest, name, array)
    if damage:
      damages.append(str(damage))
      continue
    # float64: the norm of many small numbers loses digits in their own type.
    norm = float(np.linalg.norm(array.astype(np.float64).ravel()))
    arrays[name] = _Array(array.shape, str(array.dtype), array.nbytes, norm)
    if array.ndim == 0:
      scalars[name] = float(array)
  return _Look(manifest, arrays, scalars, damages, disk_bytes)


def _describe(step: int, look: _Look, score: float | None) -> list[str]:
  """Describes the manifest, the levels' clocks and the parameters."""
  manifest = look.manifest
  config = json.loads(manifest['config'])
  said = [
    ('experiment', config.get('name')),
    ('written by', _written_by(manifest)),
    ('tokens', manifest['tokenizer_fingerprint']),
    ('seconds of training', f'{manifest["train_seconds"]:,.1f}'),
    ('score', score),
    ('steps skipped', f'{look.scalars.get("guard/num_skipped", 0):,.0f}'),
  ]
  parts = [
    f'## Step {step:,}, the newest good one',
    markdown.table(
      ('', ''), [(key, str(value)) for key, value in said if value is not None]
    ),
  ]
  clocks = _clocks(look)
  if clocks:
    header = ('level', 'updates', 'steps since', 'norm of its gradient then')
    parts.append(markdown.table(header, clocks))
  items: dict[str, list[_Array]] = {}
  for name, array in look.arrays.items():
    items.setdefault(name.split('/')[0], []).append(array)
  rows = [
    (item, f'{len(arrays):,}', f'{sum(a.num_bytes for a in arrays):,}')
    for item, arrays in items.items()
  ]
  parts.append(markdown.table(('item', 'arrays', 'bytes'), rows))
  rows = [
    (
      name.removeprefix('params/'),
      'x'.join(map(str, array.shape)) or 'scalar',
      array.dtype,
      f'{array.norm:.6g}',
      f'{array.num_bytes:,}',
    )
    for name, array in look.arrays.items()
    if name.startswith('params/')
  ]
  header = ('parameter', 'shape', 'dtype', 'norm', 'bytes')
  return [*parts, markdown.table(header, rows)]


def _written_by(manifest: dict[str, Any]) -> str:
  version = manifest.get('version', 'of unknown version')
  software = [f'nested_learning {version}']
  if manifest.get('commit'):
    software.append(f'commit {manifest["commit"]}')
  if manifest.get('jax'):
    software.append(f'JAX {manifest["jax"]}')
  return ', '.join(software)


def _clocks(look: _Look) -> list[tuple[str, ...]]:
  """Returns a row for every level: how often it has learned, and when last."""
  ending = '/num_updates'
  rows = []
  for name, num_updates in look.scalars.items():
    level = name.removesuffix(ending)
    if name.startswith('optimizer/') and name.endswith(ending):
      get = lambda field, level=level: look.scalars.get(
        f'{level}/{field}', float('nan')
      )
      rows.append(
        (
          level.rsplit('/', 1)[-1],
          f'{num_updates:,.0f}',
          f'{get("num_accumulated"):,.0f}',
          f'{get("gradient_norm"):.4g}',
        )
      )
  return rows
