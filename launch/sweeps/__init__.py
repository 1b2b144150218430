"""Sweeps: many runs that differ in a few fields, and a table of their results.

A sweep consists of cells. Each cell is a config and runs once per seed, in a
folder of its own, with a command that the caller makes. The package knows no
model and no trainer: it uses the fields of configs and the summary.json that a
run writes when it is finished.
"""

from launch.sweeps.cells import as_grid
from launch.sweeps.cells import Cell
from launch.sweeps.cells import load_cells
from launch.sweeps.cells import load_sweep
from launch.sweeps.cells import make_cells
from launch.sweeps.cells import parse_grid
from launch.sweeps.cells import Row
from launch.sweeps.cells import Sweep
from launch.sweeps.execution import make_array_script
from launch.sweeps.execution import Outcome
from launch.sweeps.execution import run_all
from launch.sweeps.kept import keep
from launch.sweeps.kept import restore
from launch.sweeps.record import list_runs
from launch.sweeps.record import load
from launch.sweeps.record import Record
from launch.sweeps.record import Run
from launch.sweeps.record import save
from launch.sweeps.record import update
from launch.sweeps.report import collect
from launch.sweeps.results import differ
from launch.sweeps.results import outcome
from launch.sweeps.tuning import list_due
