"""Sweeps: many runs that differ in a few fields, and the table they make.

A sweep is made of cells, each a config; a cell is run once for every seed, in
a folder of its own, by whatever command the caller gives. This package knows no
model and no trainer: it goes by the fields of configs and the summary.json that
a finished run leaves.
"""

from launch.sweeps.cells import Cell
from launch.sweeps.cells import load_cells
from launch.sweeps.cells import load_sweep
from launch.sweeps.cells import make_cells
from launch.sweeps.collect import collect
from launch.sweeps.definition import parse_grid
from launch.sweeps.definition import Row
from launch.sweeps.definition import Sweep
from launch.sweeps.local import Outcome
from launch.sweeps.local import run_all
from launch.sweeps.record import list_runs
from launch.sweeps.record import load
from launch.sweeps.record import Record
from launch.sweeps.record import Run
from launch.sweeps.record import save
from launch.sweeps.record import shown_command
from launch.sweeps.record import update
from launch.sweeps.slurm import make_array_script
