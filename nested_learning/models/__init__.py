"""Models, and the zoo of named sizes."""

from nested_learning.levels.cms import ChainConfig
from nested_learning.levels.cms import LevelConfig
from nested_learning.models import zoo
from nested_learning.models.in_context import learn_in_context
from nested_learning.models.in_context import make_reader
from nested_learning.models.language_model import level_labels
from nested_learning.models.language_model import make_model
from nested_learning.models.language_model import make_trunk
from nested_learning.models.language_model import max_stream_length
from nested_learning.models.language_model import Model
from nested_learning.models.language_model import ModelConfig
from nested_learning.models.warm_start import add_level
