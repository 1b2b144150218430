"""Optimisers as associative memories, each an optax transformation.

See README.md in this folder.
"""

from nested_learning.newton_schulz import orthogonalize
from nested_learning.optimizers import configs
from nested_learning.optimizers.capture import find_maps
from nested_learning.optimizers.capture import value_and_delta_grad
from nested_learning.optimizers.configs import OptimizerConfig
from nested_learning.optimizers.delta_gradient_descent import apply_gradients
from nested_learning.optimizers.delta_gradient_descent import dgd
from nested_learning.optimizers.delta_gradient_descent import dgd_for_model
from nested_learning.optimizers.delta_gradient_descent import dgd_report
from nested_learning.optimizers.delta_gradient_descent import scale_by_dgd
from nested_learning.optimizers.matrices import dimension_numbers
from nested_learning.optimizers.matrices import parameter_report
from nested_learning.optimizers.momentum import delta_momentum
from nested_learning.optimizers.momentum import preconditioned_momentum
from nested_learning.optimizers.multi_scale_momentum import m3
from nested_learning.optimizers.multi_scale_momentum import scale_by_m3
from nested_learning.optimizers.network_momentum import deep_momentum
from nested_learning.optimizers.timescales import Level
from nested_learning.optimizers.timescales import multi_timescale
from nested_learning.optimizers.timescales import MultiTimescaleState
from nested_learning.optimizers.timescales import telemetry
