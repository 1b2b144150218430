"""The MLP of a level: gated or plain, with a norm of its own."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nested_learning import errors
from nested_learning import parameters
from nested_learning.layers import base
from nested_learning.layers import norm as norm_lib

_ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class MlpConfig:
  """The function of a level, f(x) = down(act(gate(n)) * up(n)), n = norm(x)."""

  kind: Literal['gated', 'plain'] = 'gated'  # 'plain' is down(act(up(n)))
  activation: Literal['silu', 'gelu', 'gelu_tanh'] = 'silu'
  bias: Literal['none', 'all'] = 'none'
  norm: norm_lib.NormConfig = norm_lib.NormConfig()

  def __post_init__(self):
    errors.check_choices(self)

  def table(self, *, embed_dim: int, mlp_dim: int) -> parameters.Table:
    """Returns its parameters."""
    wide = parameters.Param(
      (embed_dim, mlp_dim),
      ('embed', 'mlp'),
      parameters.fan_in(embed_dim),
      decay=True,
    )
    narrow = parameters.Param(
      (mlp_dim, embed_dim),
      ('mlp', 'embed'),
      parameters.fan_in(mlp_dim),
      decay=True,
    )
    matrices = {'gate': wide, 'up': wide, 'down': narrow}
    if self.kind == 'plain':
      del matrices['gate']
    biases = {
      f'{name}_bias': parameters.Param(
        param.shape[1:], param.axes[1:], parameters.constant(0.0), decay=False
      )
      for name, param in matrices.items()
    }
    return {
      **self.norm.table(embed_dim),
      **matrices,
      **(biases if self.bias == 'all' else {}),
    }

  def apply(self, params: Any, x: jax.Array) -> jax.Array:
    """Computes f(x) [b, t, e]; the arithmetic has the dtype of x."""
    normed = self.norm.apply(params['norm'], x)

    def project(name):
      out = jnp.einsum('bte,ef->btf', normed, params[name].astype(x.dtype))
      return _add_bias(params, name, out)

    hidden = (project('up'),)
    if self.kind == 'gated':
      hidden = (project('gate'), *hidden)
    out = _projection(self.activation)(*hidden, params['down'].astype(x.dtype))
    return self.norm.apply_after(params, _add_bias(params, 'down', out))


def _add_bias(params, name, out):
  bias = params.get(f'{name}_bias')
  return out if bias is None else out + bias.astype(out.dtype)


# The product [b, t, f] is recomputed: gate and up are kept anyway.
@functools.cache
def _projection(activation: str) -> Callable[..., jax.Array]:
  """Makes (activation(first) * others) @ down."""
  act = _ACTIVATIONS[activation]

  def apply(first, *rest):
    *others, down = rest
    hidden = act(first) * others[0] if others else act(first)
    return jnp.einsum('btf,fe->bte', hidden, down)

  return base.recomputed(apply)
