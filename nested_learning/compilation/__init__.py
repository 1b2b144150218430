"""Compiling for hardware that is not there, and reading what came out."""

from nested_learning.compilation.analysis import Analysis
from nested_learning.compilation.analysis import analyze
from nested_learning.compilation.analysis import ASSUMPTIONS
from nested_learning.compilation.analysis import estimate_seconds
from nested_learning.compilation.collectives import Collective
from nested_learning.compilation.hardware import Chip
from nested_learning.compilation.hardware import CHIPS
from nested_learning.compilation.pods import compile
from nested_learning.compilation.pods import Pod
from nested_learning.compilation.topologies import find_devices
