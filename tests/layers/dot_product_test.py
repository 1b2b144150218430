"""The choice of cuDNN for attention, and the program that it makes."""

import functools
import re
from unittest import mock

from absl.testing import parameterized
import jax
from jax._src.cudnn import fused_attention_stablehlo
import jax.numpy as jnp
import numpy as np

from nested_learning.layers import dot_product

_CALL = '__cudnn$fmhaScaleBiasSoftmax'
# What a call in half precision has on a GPU of Hopper's generation.
_FINE = {'widest': 256, 'is_causal': True, 'scoring': dot_product.Scoring()}


def attend(query, key, value, reset, **options):
  """Attends to the tokens of each document [b, t, h, d] that came before."""
  place = jnp.broadcast_to(jnp.arange(query.shape[1]), reset.shape)
  document = jnp.cumsum(reset, axis=1)

  def sees(places, num_keys):
    at, of = (x[:, :, None] for x in places)
    before = place[:, None, :num_keys] <= at
    return before & (document[:, None, :num_keys] == of)

  return dot_product.attend_in_blocks(
    query,
    key,
    value,
    (place, document),
    sees,
    is_causal=True,
    scoring=options.pop('scoring', dot_product.Scoring()),
    **options,
  )


def make_arrays(dtype=jnp.bfloat16, num_tokens=32, head_dim=16):
  """Returns queries, keys and values of 4 and 2 heads, and borders."""
  rng = np.random.default_rng(0)
  draw = lambda heads: jnp.asarray(
    rng.normal(size=(2, num_tokens, heads, head_dim)), dtype
  )
  reset = jnp.asarray(rng.uniform(size=(2, num_tokens)) < 0.1)
  return draw(4), draw(2), draw(2), reset


class DotProductTest(parameterized.TestCase):
  @parameterized.parameters(
    ({}, {}, None),
    ({'widest': 0}, {}, 'there is no NVIDIA GPU from Ampere on'),
    ({}, {'dtype': jnp.float32}, 'the dtype is float32, not bfloat16'),
    (
      {'widest': 128},
      {'head_dim': 136},
      'head_dim=136 is above 128 or no multiple of 8',
    ),
    ({}, {'head_dim': 12}, 'head_dim=12 is above 256 or no multiple of 8'),
    ({'scoring': dot_product.Scoring(cap=5.0)}, {}, 'scores are bounded'),
    ({'is_causal': False}, {}, 'queries see keys of an earlier call'),
    ({}, {'num_tokens': 33}, '33 tokens are odd'),
    (
      {},
      {'num_tokens': 2**15},
      'its mask would take 4,294,967,296 bytes',
    ),
  )
  def test_names_why_cudnn_does_not_compute_it(self, options, arrays, reason):
    query, key, *_ = jax.eval_shape(functools.partial(make_arrays, **arrays))
    found = dot_product.why_not_cudnn(query, key, **{**_FINE, **options})
    self.assertEqual(found, reason)

  def test_a_cpu_has_no_cudnn(self):
    self.assertEqual(dot_product._widest_cudnn_head(), 0)

  @parameterized.parameters(
    ('9.0', 256), ('10.3', 256), ('8.6', 128), ('7.5', 0), ('gfx942', 0)
  )
  def test_the_widest_head_is_that_of_the_gpu(self, capability, widest):
    device = mock.Mock(compute_capability=capability)
    with (
      mock.patch.object(jax, 'default_backend', lambda: 'gpu'),
      mock.patch.object(jax, 'devices', lambda: [device]),
    ):
      self.assertEqual(dot_product._widest_cudnn_head(), widest)

  def test_the_platform_of_the_program_decides(self):
    """A machine with a GPU computes on its CPU without cuDNN."""
    loss = lambda *x: jnp.sum(attend(*x).astype(jnp.float32))
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    calls = {
      platform: re.findall(
        r'__cudnn\$\w+', self.lower(gradient, platform, make_arrays())
      )
      for platform in ('cuda', 'cpu')
    }
    self.assertEqual(calls['cpu'], [])
    self.assertEqual(set(calls['cuda']), {_CALL, f'{_CALL}Backward'})

  def lower(self, function, platform, arrays) -> str:
    """Lowers for a machine with a Hopper GPU."""
    cudnn = fused_attention_stablehlo
    yes, no = lambda _: True, lambda _: False
    names = f'{_CALL}', f'{_CALL}Backward'
    with (
      mock.patch.object(dot_product, '_widest_cudnn_head', lambda: 256),
      mock.patch.object(cudnn, 'check_cudnn_version', lambda: 91_000),
      mock.patch.object(cudnn, 'check_compute_capability', yes),
      mock.patch.object(cudnn, 'is_cuda_compute_capability_equal', no),
    ):
      exported = jax.export.export(
        function,
        platforms=[platform],
        disabled_checks=[
          jax.export.DisabledSafetyCheck.custom_call(name) for name in names
        ],
      )(*arrays)
    return exported.mlir_module()

  @parameterized.parameters(None, 0.3)
  def test_what_cudnn_is_asked_for_equals_the_blocks(self, scale):
    """XLA computes the same request, with values and gradients in float32."""
    arrays = make_arrays(jnp.float32, num_tokens=300)
    scoring = dot_product.Scoring(scale)
    weights = np.random.default_rng(1).normal(size=arrays[0].shape)
    loss = lambda *x: jnp.sum(attend(*x, scoring=scoring) * weights)
    compute = jax.value_and_grad(loss, argnums=(0, 1, 2))
    expected = compute(*arrays)
    request = jax.nn.dot_product_attention
    asked = []

    def in_xla(*args, implementation, **options):
      asked.append(implementation)
      return request(*args, **options)

    with (
      mock.patch.object(jax.nn, 'dot_product_attention', in_xla),
      mock.patch.object(
        dot_product,
        '_attend_in_blocks',
        lambda *x, persistent, **y: dot_product._attend_in_cudnn(*x, **y),
      ),
    ):
      found = compute(*arrays)
    self.assertIn('cudnn', asked)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    for a, b in zip(found[1], expected[1], strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
