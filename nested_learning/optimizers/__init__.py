"""Optimisers as associative memories, each an optax transformation."""

from nested_learning.optimizers.capture import find_maps
from nested_learning.optimizers.capture import value_and_delta_grad
from nested_learning.optimizers.dgd import dgd
from nested_learning.optimizers.dgd import dgd_for_model
from nested_learning.optimizers.dgd import dgd_report
