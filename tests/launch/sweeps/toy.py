"""A config without a model, and sweeps of it, for tests."""

import dataclasses
import pathlib

from launch import sweeps
from nested_learning import configs

EXPERIMENT = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Config:
  size: int = 1
  roles: tuple[str, ...] = ('k',)
  text: str = ''
  seed: int = 0

def get_config(arg=None):
  return Config(size=int(arg or 1))
"""


def write_experiment(folder: str, name: str) -> str:
  """Writes an experiment file with its own module name; returns its path."""
  path = pathlib.Path(folder, 'experiments', f'{name}.py')
  path.parent.mkdir(exist_ok=True)
  path.write_text(EXPERIMENT)
  return str(path)


def make_record(spec: str, *grid: str, **changes) -> sweeps.Record:
  """Returns the record of a sweep over a grid."""
  sweep = sweeps.Sweep(grid=grid)
  assignments = changes.pop('assignments', ())
  record = sweeps.Record(
    spec=spec,
    assignments=assignments,
    base=configs.to_json(configs.override(configs.load(spec), assignments)),
    fields=tuple(sweeps.parse_grid(text)[0] for text in grid),
    cells=sweeps.make_cells(spec, sweep, assignments=assignments),
    seed_fields=('seed',),
  )
  return dataclasses.replace(record, **changes)
