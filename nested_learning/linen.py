"""A bridge that makes any layer or model of the package a Linen module.

    module = linen.Bridge(layer)             # or linen.Bridge(model)
    variables = module.init(key, inputs)     # {'params': ...}
    outputs = module.apply(variables, inputs)

Parameters live in 'params'. The collection 'memory' carries a stream:
`apply(..., mutable=['memory'])` returns the state after the tokens, and a call
with that state continues the stream. A call without the collection starts a
stream. Flax's `nnx.bridge.ToNNX` makes an NNX module of it.
"""

from typing import Any

from flax import core
from flax import linen as nn
import jax

from nested_learning import models
from nested_learning import parameters
from nested_learning.layers import base

_COLLECTION = 'memory'


class Bridge(nn.Module):
  """A layer or a model as a Linen module.

  Attributes:
    source: A `layers.Layer`, applied to [b, t, e], or a `models.Model`, applied
      to tokens [b, t].
    partitioned: Whether to box parameters with the names of their logical axes;
      see `flax.linen.with_logical_partitioning`.
  """

  source: base.Layer | models.Model
  partitioned: bool = False

  @nn.compact
  def __call__(
    self,
    inputs: jax.Array,
    *,
    reset: jax.Array | None = None,
    mask: jax.Array | None = None,
    write: bool = True,
  ) -> jax.Array:
    """Applies the source; continues the stream in 'memory' if there is one.

    Args:
      inputs: [b, t, e] for a layer, int [b, t] for a model.
      reset: bool [b, t], True at a document's first token.
      mask: bool [b, t], False for padding.
      write: Whether memories are written; False only reads them.

    Returns:
      [b, t, e], or logits [b, t, v].
    """
    # Flax freezes dicts in attributes, and the package's functions take dicts.
    params = core.unfreeze(
      {
        name: self.param(name, self._init, entry)
        for name, entry in core.unfreeze(self.source.table).items()
      }
    )
    state = None
    if not self.is_initializing() and self.has_variable(_COLLECTION, 'state'):
      state = self.get_variable(_COLLECTION, 'state')
    if isinstance(self.source, models.Model):
      outputs, state = self.source.forward(
        params, state, inputs, reset=reset, mask=mask, write=write
      )
    else:
      info = base.TokenInfo(reset, mask, write)
      outputs, state = self.source.apply(params, state, inputs, info)
    if not self.is_initializing() and self.is_mutable_collection(_COLLECTION):
      self.put_variable(_COLLECTION, 'state', state)
    return outputs

  def _init(self, key: jax.Array, entry: Any) -> Any:
    """Draws the initial values of one entry of the table."""
    values = parameters.init(key, entry)
    if not self.partitioned:
      return values
    box = lambda param, value: nn.LogicallyPartitioned(value, param.axes)
    return jax.tree.map(
      box, entry, values, is_leaf=lambda x: isinstance(x, parameters.Param)
    )
