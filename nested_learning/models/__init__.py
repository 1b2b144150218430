"""Models, and the zoo of named sizes."""

from nested_learning.layers.cms import ChainConfig
from nested_learning.layers.cms import LevelConfig
from nested_learning.models import zoo
from nested_learning.models.embedding import EmbeddingConfig
from nested_learning.models.heads import Head
from nested_learning.models.heads import LanguageHead
from nested_learning.models.model import level_labels
from nested_learning.models.model import make_model
from nested_learning.models.model import Model
from nested_learning.models.placement import Block
from nested_learning.models.placement import PlacementConfig
from nested_learning.models.streams import follow
from nested_learning.models.streams import read_by_segments
from nested_learning.models.streams import restart
from nested_learning.models.task_heads import CompressionHead
from nested_learning.models.task_heads import RegressionHead
from nested_learning.models.trunk import make_trunk
from nested_learning.models.trunk import max_stream_length
from nested_learning.models.trunk import ModelConfig
from nested_learning.models.warm_start import add_level
from nested_learning.models.warm_start import add_memory
from nested_learning.models.warm_start import complete
from nested_learning.models.warm_start import stack_levels
