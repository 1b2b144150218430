"""Layers: pure functions `(params, state, inputs) -> (outputs, state)`."""

from nested_learning.layers.attention import AttentionConfig
from nested_learning.layers.base import Layer
from nested_learning.layers.base import TokenInfo
from nested_learning.layers.convolved import ConvolvedAttentionConfig
from nested_learning.layers.hybrids import MemoryAsContextConfig
from nested_learning.layers.hybrids import MemoryAsGateConfig
from nested_learning.layers.hybrids import MemoryAsLayerConfig
from nested_learning.layers.memory_beside import MemoryBesideConfig
from nested_learning.layers.memory_mixer import MemoryMixerConfig
from nested_learning.layers.mlp import MlpConfig
from nested_learning.layers.norm import NormConfig
from nested_learning.layers.rotary import LinearScaling
from nested_learning.layers.rotary import Llama3Scaling
from nested_learning.layers.tnt import LocalConfig
from nested_learning.layers.tnt import TntConfig
