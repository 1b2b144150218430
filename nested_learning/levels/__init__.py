"""Levels: memories and MLPs on clocks of their own."""

from nested_learning.levels.health import Health
from nested_learning.levels.health import health
from nested_learning.levels.health import warnings
from nested_learning.levels.in_context import segment_size
from nested_learning.levels.inner import InnerConfig
from nested_learning.levels.inner import make_levels
from nested_learning.levels.timescale import effective_timescale
from nested_learning.levels.timescale import measure_readability
from nested_learning.levels.timescale import Readability
