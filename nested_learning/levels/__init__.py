"""Learning inside a sequence: levels that step on the tokens that were read."""

from nested_learning.levels.health import Health
from nested_learning.levels.health import health_warnings
from nested_learning.levels.health import measure_health
from nested_learning.levels.inner import clock_warnings
from nested_learning.levels.inner import InnerConfig
from nested_learning.levels.inner import InnerLevelConfig
from nested_learning.levels.inner import make_inner
from nested_learning.levels.inner import make_levels
from nested_learning.levels.reader import make_reader
from nested_learning.levels.reader import Reader
from nested_learning.levels.reader import Segment
from nested_learning.levels.reader import State
from nested_learning.levels.rows import ReaderSpec
from nested_learning.levels.rows import Split
from nested_learning.levels.steps import InnerLevel
from nested_learning.levels.steps import LearningLevel
from nested_learning.levels.steps import segment_size
from nested_learning.levels.steps import StepSpec
from nested_learning.levels.steps import Sums
from nested_learning.levels.timescale import effective_timescale
from nested_learning.levels.timescale import measure_readability
from nested_learning.levels.timescale import Readability
