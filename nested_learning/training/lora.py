r"""Low-rank changes of attention's matrices, for models that are frozen.

.. math:: W = W_0 + A B, \quad A \in R^{in \times r}, \; B \in R^{r \times out}

A is drawn and B starts at zero, so that training begins with the frozen model.
The sum is made once per step, and not at all in generation, which reads the
merged matrices. There is no factor alpha / r beside the learning rate.

References:
  Hu et al., LoRA, arXiv:2106.09685, 2021.
"""

import dataclasses
import math
import re
from typing import Any

from nested_learning import parameters
from nested_learning import subtrees
from nested_learning.levels import low_rank

# Matrices of attention in a block, perhaps beside a memory.
_MATRICES = re.compile(
  r'blocks/(\d+/)?mixer/(attention/)?(query|key|value|out)'
)


def table(of_model: parameters.Table, rank: int) -> parameters.Table:
  """Returns the parameters 'a' and 'b' of every matrix, at the matrix's path.

  Args:
    of_model: The parameters of the model.
    rank: Columns r of A.
  """
  matrices = subtrees.select(of_model, _MATRICES.fullmatch)
  return parameters.map_params(lambda param: _pair(param, rank), matrices)


def merge(params: Any, changes: Any) -> Any:
  """Returns parameters with changes of `table` added to their matrices."""
  if set(changes) == {'a', 'b'}:
    return low_rank.add(params, changes['a'], changes['b'])
  return {
    **params,
    **{name: merge(params[name], below) for name, below in changes.items()},
  }


def _pair(param: parameters.Param, rank: int) -> parameters.Table:
  """Returns A and B of a stacked matrix [l, in, out], either of several axes.

  The axis 'embed' is one side, and all others the other.
  """
  cut = 2 if param.axes[1] == 'embed' else len(param.axes) - 1
  (layers, *ins), outs = param.shape[:cut], param.shape[cut:]
  (layer_axis, *in_axes), out_axes = param.axes[:cut], param.axes[cut:]
  a = dataclasses.replace(
    param,
    shape=(layers, *ins, rank),
    axes=(layer_axis, *in_axes, None),
    init=parameters.fan_in(math.prod(ins)),
  )
  b = dataclasses.replace(
    param,
    shape=(layers, rank, *outs),
    axes=(layer_axis, None, *out_axes),
    init=parameters.constant(0.0),
  )
  return {'a': a, 'b': b}
