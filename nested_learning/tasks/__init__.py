"""Generated tasks that test memories."""

from nested_learning.tasks.documents import DocumentConfig
from nested_learning.tasks.in_context import AliasesConfig
from nested_learning.tasks.in_context import MqarConfig
from nested_learning.tasks.in_context import RegressionConfig
from nested_learning.tasks.mad import CompressionConfig
from nested_learning.tasks.mad import FuzzyRecallConfig
from nested_learning.tasks.mad import MemorizationConfig
from nested_learning.tasks.mad import RecallConfig
from nested_learning.tasks.mad import SelectiveCopyingConfig
from nested_learning.tasks.needles import NeedleConfig
from nested_learning.tasks.registry import make_config
from nested_learning.tasks.registry import TaskConfig
from nested_learning.tasks.registry import TASKS
from nested_learning.tasks.ruler import RulerConfig
from nested_learning.tasks.state_tracking import FormalLanguageConfig
from nested_learning.tasks.state_tracking import WordProblemConfig
from nested_learning.tasks.stories import StoryConfig
from nested_learning.tasks.stream import make_iterator
from nested_learning.tasks.stream import make_row
from nested_learning.tasks.stream import TaskDataConfig
from nested_learning.tasks.task import Row
from nested_learning.tasks.task import Task
from nested_learning.tasks.task import TextTask
