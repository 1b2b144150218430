"""Compiles for absent hardware, and analyses compiled programs."""

from nested_learning.compilation.analysis import Analysis
from nested_learning.compilation.analysis import analyze
from nested_learning.compilation.analysis import ASSUMPTIONS
from nested_learning.compilation.analysis import estimate_seconds
from nested_learning.compilation.collectives import Collective
from nested_learning.compilation.devices import compile
from nested_learning.compilation.devices import find_devices
from nested_learning.compilation.flops import jaxpr_flops
from nested_learning.compilation.flops import matmul_flops
