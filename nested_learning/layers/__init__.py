"""Layers: pure functions `(params, state, inputs) -> (outputs, state)`."""

from nested_learning.layers.attention import AttentionConfig
from nested_learning.layers.layer import Layer
from nested_learning.layers.layer import Marks
from nested_learning.layers.titans import SelfModifyingTitansConfig
