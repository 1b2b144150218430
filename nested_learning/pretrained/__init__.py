"""Import and export of pretrained transformers."""

from nested_learning.pretrained.source import load
from nested_learning.pretrained.source import open_source
from nested_learning.pretrained.source import Pretrained
from nested_learning.pretrained.source import Source
from nested_learning.pretrained.translation import to_hf_config
from nested_learning.pretrained.translation import to_model_config
