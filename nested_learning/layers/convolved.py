"""Attention whose input is convolved over a few tokens.

The memories of this package convolve their projections, so that a key may hold
the token before it. Plain attention needs a layer for that: an induction head.
With a convolution in front, one layer recalls what stood behind a token, as
memories do, and comparisons on recall are fair.

References:
  Arora et al., Zoology, arXiv:2312.04927, 2023, section 3 (attention beside
  short convolutions); So et al., Primer, arXiv:2109.08668, 2021 (convolved
  projections).
"""

import dataclasses
from typing import Any, NamedTuple

import jax

from nested_learning import errors
from nested_learning.layers import attention
from nested_learning.layers import base
from nested_learning.layers import convolution


@dataclasses.dataclass(frozen=True)
class ConvolvedAttentionConfig:
  """Attention to tokens that a convolution has mixed with those before them."""

  attention: attention.AttentionConfig
  width: int = 4  # tokens, as in the memories

  def __post_init__(self):
    errors.check_field(self, 'width', self.width >= 2, 'at least 2 tokens')

  @property
  def holds_any_length(self) -> bool:
    """Whether a stream may have any length; see `base.MixerConfig`."""
    return self.attention.holds_any_length

  @property
  def granularity(self) -> int:
    """1: attention has no chunks; see `base.MixerConfig`."""
    return self.attention.granularity

  def make(
    self, *, embed_dim: int, dtype: Any, max_length: int | None = None
  ) -> base.Layer:
    """Makes the layer; see `base.MixerConfig`."""
    attend = self.attention.make(
      embed_dim=embed_dim, dtype=dtype, max_length=max_length
    )
    return _make_convolved(attend, self.width, embed_dim, dtype)


class ConvolvedState(NamedTuple):
  """State of the layer.

  Attributes:
    conv: Last inputs of the convolution, [b, width - 1, e].
    attention: State of attention.
  """

  conv: jax.Array
  attention: Any


def _make_convolved(attend: base.Layer, width, embed_dim, dtype) -> base.Layer:
  table = {
    **attend.table,
    'conv': convolution.table(width, embed_dim, 'embed'),
  }

  def init_state(params, batch_size):
    return ConvolvedState(
      convolution.init_state(width, embed_dim, batch_size, dtype),
      attend.init_state(params, batch_size),
    )

  def apply(params, state, inputs, info):
    conv, start = (None, None) if state is None else state
    x, conv = convolution.apply(
      params['conv'], conv, inputs, reset=info.reset, mask=info.mask
    )
    outputs, after = attend.apply(params, start, x, info)
    return outputs, ConvolvedState(conv, after)

  return base.make_layer(table, init_state, apply)
