"""Tests counting the FLOPs of jaxprs."""

from absl.testing import absltest
import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from nested_learning import compilation

_A = jax.ShapeDtypeStruct((3, 4), jnp.float32)
_B = jax.ShapeDtypeStruct((4, 5), jnp.float32)
_PRODUCT = 2 * 3 * 4 * 5


class FlopsTest(absltest.TestCase):
  def test_counts_a_product_and_its_gradients(self):
    def loss(a, b):
      return jnp.sum(jnp.square(a @ b))

    self.assertEqual(compilation.matmul_flops(loss, _A, _B), _PRODUCT)
    both = jax.grad(loss, argnums=(0, 1))
    self.assertEqual(compilation.matmul_flops(both, _A, _B), 3 * _PRODUCT)

  def test_counts_batches(self):
    a = jax.ShapeDtypeStruct((7, 3, 4), jnp.float32)
    b = jax.ShapeDtypeStruct((7, 4, 5), jnp.float32)
    self.assertEqual(compilation.matmul_flops(jnp.matmul, a, b), 7 * _PRODUCT)

  def test_counts_a_scan_as_often_as_it_runs(self):
    def scanned(a, b):
      body = lambda carry, _: (carry + jnp.sum(jax.jit(jnp.matmul)(a, b)), None)
      return jax.lax.scan(body, 0.0, length=6)[0]

    self.assertEqual(compilation.matmul_flops(scanned, _A, _B), 6 * _PRODUCT)

  def test_counts_the_work_of_every_device(self):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ('rows',), axis_types=auto)
    rows = jax.sharding.PartitionSpec('rows')
    whole = jax.sharding.PartitionSpec()
    product = jax.shard_map(
      jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows
    )
    a = jax.ShapeDtypeStruct((12, 4), jnp.float32)
    self.assertEqual(compilation.matmul_flops(product, a, _B), 4 * _PRODUCT)

  def test_counts_a_kernel_once_per_program_of_its_grid(self):
    def kernel(a, b, out):
      out[...] = a[...] @ b[...]

    def tiled(a, b):
      return pl.pallas_call(
        kernel,
        grid=(4, 2),
        in_specs=[
          pl.BlockSpec((3, 4), lambda i, j: (i, 0)),
          pl.BlockSpec((4, 5), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((3, 5), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((12, 10), jnp.float32),
        interpret=True,
      )(a, b)

    a = jax.ShapeDtypeStruct((12, 4), jnp.float32)
    b = jax.ShapeDtypeStruct((4, 10), jnp.float32)
    self.assertEqual(compilation.matmul_flops(tiled, a, b), 4 * 2 * _PRODUCT)

  def test_counts_the_most_expensive_branch(self):
    def either(a, b):
      return jax.lax.cond(
        jnp.sum(a) > 0, lambda: jnp.sum(a @ b), lambda: jnp.sum(a)
      )

    self.assertEqual(compilation.matmul_flops(either, _A, _B), _PRODUCT)

  def test_counts_recomputation(self):
    def loss(a, b):
      return jnp.sum(jax.checkpoint(lambda a, b: jnp.sin(a @ b))(a, b))

    gradient = jax.grad(loss, argnums=(0, 1))
    self.assertEqual(compilation.matmul_flops(gradient, _A, _B), 4 * _PRODUCT)
