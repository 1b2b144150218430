"""Sweeps: many runs that differ in a few fields, and the table they make.

A sweep is made of cells, each a config; a cell is run once for every seed, in
a folder of its own, by whatever command the caller gives. This package knows no
model and no trainer: it goes by the fields of configs and the summary.json that
a finished run leaves.
"""

from nested_learning.sweeps.cells import Cell
from nested_learning.sweeps.cells import load_cells
from nested_learning.sweeps.cells import load_sweep
from nested_learning.sweeps.cells import make_cells
from nested_learning.sweeps.collect import collect
from nested_learning.sweeps.definition import parse_grid
from nested_learning.sweeps.definition import Row
from nested_learning.sweeps.definition import Sweep
from nested_learning.sweeps.local import Outcome
from nested_learning.sweeps.local import run_all
from nested_learning.sweeps.record import list_runs
from nested_learning.sweeps.record import load
from nested_learning.sweeps.record import Record
from nested_learning.sweeps.record import Run
from nested_learning.sweeps.record import save
from nested_learning.sweeps.record import update
from nested_learning.sweeps.slurm import make_array_script
