"""Levels: memories and MLPs on clocks of their own."""

from nested_learning.levels.inner import InnerConfig
from nested_learning.levels.multi_timescale import Level
from nested_learning.levels.multi_timescale import multi_timescale
from nested_learning.levels.multi_timescale import MultiTimescaleState
from nested_learning.levels.multi_timescale import telemetry
