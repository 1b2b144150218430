r"""The chunked gated delta rule alone, to measure the engine against.

.. math:: S_t = retention_t \, S_{t-1} (I - inner\_lr_t k_t k_t^T)
                + inner\_lr_t v_t k_t^T

Its triangular systems are inverted in blocks by matmuls, as published kernels
do. Batched triangular solves of jaxlib 0.10.2 on CPUs can deadlock when two of
them share two cores.

References:
  Yang et al., arXiv:2406.06484, 2024 (chunks by the WY form);
  Yang et al., arXiv:2412.06464, 2024, eq. 10 (with decay).
"""

import jax
import jax.numpy as jnp

from nested_learning.memory import chunked


def read_tokens(
  k: jax.Array,
  v: jax.Array,
  q: jax.Array,
  inner_lr: jax.Array,
  retention: jax.Array,
  *,
  chunk_size: int,
) -> jax.Array:
  """Reads S_t q_t for every token.

  Args:
    k: [b, h, t, d] of norm one.
    v: [b, h, t, d].
    q: [b, h, t, d].
    inner_lr: [b, h, t, 1].
    retention: [b, h, t, 1].
    chunk_size: Tokens of a chunk; divides t.

  Returns:
    [b, h, t, d].
  """
  shape = (*k.shape[:2], -1, chunk_size)
  cut = lambda x: x.reshape(*shape, x.shape[-1])
  k, v, q, inner_lr, retention = map(cut, (k, v, q, inner_lr, retention))
  total = jnp.cumsum(jnp.log(retention), axis=-2)
  lower = jnp.tril(jnp.ones((chunk_size, chunk_size), bool))
  ratio = total - jnp.swapaxes(total, -1, -2)
  decay = jnp.exp(jnp.where(lower, ratio, -jnp.inf))
  gram = jnp.einsum('...td,...sd->...ts', k, k)
  inverse = chunked.unit_lower_inverse(inner_lr * decay * gram)
  values = inverse @ (inner_lr * v)
  keys = inverse @ (inner_lr * jnp.exp(total) * k)
  scores = decay * jnp.einsum('...td,...sd->...ts', q, k)
  from_start = jnp.exp(total) * q
  to_end = jnp.exp(total[..., -1:, :] - total) * k

  def body(state, chunk):
    values, keys, scores, from_start, to_end, kept = chunk
    written = values - keys @ state
    read = from_start @ state + scores @ written
    state = kept * state + jnp.swapaxes(to_end, -1, -2) @ written
    return state, read

  chunks = values, keys, scores, from_start, to_end
  chunks = *chunks, jnp.exp(total[..., -1:, :])
  first = lambda x: jnp.moveaxis(x, 2, 0)
  dim = k.shape[-1]
  start = jnp.zeros((*k.shape[:2], dim, dim), k.dtype)
  _, reads = jax.lax.scan(body, start, jax.tree.map(first, chunks))
  return jnp.moveaxis(reads, 0, 2).reshape(*k.shape[:2], -1, dim)
