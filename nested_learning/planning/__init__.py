"""Compiles experiments for absent accelerators, and suggests meshes."""

from nested_learning.planning.ahead_of_time import compile_for
from nested_learning.planning.ahead_of_time import run
