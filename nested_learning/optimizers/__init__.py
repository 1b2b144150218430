"""Optimisers as associative memories, each an optax transformation."""

from nested_learning.optimizers.capture import find_maps
from nested_learning.optimizers.capture import value_and_delta_grad
from nested_learning.optimizers.deep_momentum import deep_momentum
from nested_learning.optimizers.dgd import dgd
from nested_learning.optimizers.m3 import m3
from nested_learning.optimizers.m3 import scale_by_m3
from nested_learning.optimizers.momentum import delta_momentum
from nested_learning.optimizers.momentum import preconditioned_momentum
from nested_learning.optimizers.newton_schulz import orthogonalize
from nested_learning.optimizers.timescales import Level
from nested_learning.optimizers.timescales import multi_timescale
from nested_learning.optimizers.timescales import MultiTimescaleState
from nested_learning.optimizers.timescales import telemetry
