"""Meshes of the eight test devices, and shardings from a table."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning import parameters
from nested_learning import sharding

_TABLE = {
  'w': parameters.Param(
    (6, 8), ('embed', 'heads'), parameters.constant(0.0), decay=False
  ),
  'scale': parameters.Param(
    (6,), ('embed',), parameters.constant(0.0), decay=False
  ),
}


class ShardingTest(parameterized.TestCase):
  @parameterized.parameters(
    # data, model, fsdp, context -> data, fsdp, context, model
    ((-1, 1, 1), (8, 1, 1, 1)),
    ((-1, 4, 1), (2, 1, 1, 4)),
    ((1, 8, 1), (1, 1, 1, 8)),
    ((-1, 2, 2), (2, 2, 1, 2)),
    ((1, 1, 8), (1, 8, 1, 1)),
    ((-1, 1, 1, 4), (2, 1, 4, 1)),
    ((-1, 2, 2, 2), (1, 2, 2, 2)),
  )
  def test_mesh_takes_all_devices(self, config, shape):
    mesh = sharding.make_mesh(sharding.MeshConfig(*config))
    self.assertEqual(tuple(mesh.shape[axis] for axis in sharding.AXES), shape)

  def test_mesh_of_one_device(self):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    self.assertEqual(dict(mesh.shape), dict.fromkeys(sharding.AXES, 1))

  @parameterized.parameters((3, 1, 1), (-1, 3, 1), (-1, 16, 1), (2, 2, 4))
  def test_mesh_that_does_not_fit(self, data, model, fsdp):
    config = sharding.MeshConfig(data=data, model=model, fsdp=fsdp)
    message = f'fsdp={fsdp} x model={model} .* 8 devices'
    with self.assertRaisesRegex(errors.UserError, message):
      sharding.make_mesh(config)

  def test_mesh_with_a_context_that_does_not_fit(self):
    message = 'data=2 x fsdp=1 x context=3 x model=1 .* 8 devices'
    with self.assertRaisesRegex(errors.UserError, message):
      sharding.make_mesh(sharding.MeshConfig(context=3))

  def test_devices_along_context_share_their_rows(self):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, context=4))
    self.assertEqual(sharding.num_row_groups(mesh), 2)
    self.assertEqual(sharding.batch_sharding(mesh).shard_shape((4, 8)), (2, 8))
    with jax.set_mesh(mesh):
      kept = jax.jit(sharding.keep_rows)(jnp.zeros((4, 8, 3)))
      one = jax.jit(sharding.keep_rows)(jnp.zeros((4, 1, 3)))
    self.assertEqual(kept.sharding.shard_shape(kept.shape), (2, 2, 3))
    self.assertEqual(one.sharding.shard_shape(one.shape), (2, 1, 3))

  def test_pinned_heads_lie_where_parameters_have_them(self):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, model=2))
    tree = {
      'whole': jnp.zeros((8, 4, 3)),
      'one head': jnp.zeros((8, 1, 4)),
      'few rows': jnp.zeros((2, 4)),
      'not there': None,
    }
    tree = jax.device_put(tree, sharding.replicated(mesh))
    with jax.set_mesh(mesh):
      pinned = jax.jit(sharding.pin_heads)(tree)
    shapes = jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), pinned)
    self.assertEqual(shapes['whole'], (2, 2, 3))
    self.assertEqual(shapes['one head'][:2], (2, 1))
    self.assertEqual(shapes['few rows'][1], 2)
    alone = sharding.pin_heads({'of rows': np.ones(3)})
    self.assertEqual(alone['of rows'].tolist(), [1, 1, 1])

  @parameterized.parameters(
    # rows, mesh.model, mesh.fsdp, devices, processes -> devices along data
    (4, 1, 1, 8, 1, 4),
    (6, 1, 1, 8, 1, 6),
    (7, 1, 1, 8, 1, 7),
    (9, 1, 1, 8, 1, 3),
    (6, 2, 1, 8, 1, 3),
    (64, 1, 1, 8, 1, 8),
    (4, 1, 1, 8, 4, 4),  # one of the two devices of each process
    (8, 1, 1, 8, 4, 8),
    (12, 1, 1, 8, 2, 6),
    (2, 4, 1, 8, 4, 2),  # a group spans two processes
    (6, 1, 2, 8, 1, 3),
    (12, 1, 4, 8, 1, 1),
    (12, 2, 2, 16, 2, 3),
  )
  def test_rows_decide_how_many_devices_work(
    self, num_rows, model, fsdp, num_devices, num_processes, data
  ):
    shape = sharding.mesh_shape(
      sharding.MeshConfig(model=model, fsdp=fsdp),
      num_devices=num_devices,
      num_processes=num_processes,
      num_rows=num_rows,
    )
    self.assertEqual(shape, (data, fsdp, 1, model))

  @parameterized.parameters(
    (6, (-1, 1), 4, '6 rows .* the 4 processes; .* multiple of 4 times'),
    (
      6,
      (4, 2),
      1,
      '6 rows .* 4 devices on the mesh axes data and .* mesh.data',
    ),
    (3, (-1, 4), 4, '3 rows .* the 2 devices'),
    (6, (-1, 1, 4), 1, '6 rows .* multiple of 4 times'),
  )
  def test_rows_that_do_not_divide(self, num_rows, config, processes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      sharding.mesh_shape(
        sharding.MeshConfig(*config),
        num_devices=8,
        num_processes=processes,
        num_rows=num_rows,
      )

  def test_idle_devices_are_left_out(self):
    mesh = sharding.make_mesh(num_rows=6)
    self.assertEqual(mesh.size, 6)
    rows = jax.device_put(jnp.arange(6), sharding.batch_sharding(mesh))
    self.assertLen(rows.sharding.device_set, 6)
    self.assertEqual(sharding.process_slice(mesh), (0, 1))

  @parameterized.parameters(
    ('data', 0), ('data', -2), ('model', 0), ('fsdp', 0), ('context', -1)
  )
  def test_mesh_sizes_are_positive(self, name, size):
    message = f'^{name}={size} must be at least 1'
    with self.assertRaisesRegex(errors.UserError, message):
      sharding.MeshConfig(**{name: size})

  def test_shardings_follow_the_rules(self):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, model=4))
    shardings = sharding.param_shardings(_TABLE, mesh)
    self.assertEqual(shardings['w'].shard_shape((6, 8)), (6, 2))
    self.assertEqual(shardings['scale'].shard_shape((6,)), (6,))
    self.assertEqual(sharding.batch_sharding(mesh).shard_shape((4, 3)), (2, 3))
    self.assertTrue(sharding.replicated(mesh).is_fully_replicated)
    shapes = parameters.abstract(_TABLE, jnp.float32)
    self.assertEqual(
      sharding.bytes_per_device(shapes, shardings), 4 * (6 * 2 + 6)
    )

  def test_axis_that_does_not_divide(self):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, model=4))
    table = {
      'w': parameters.Param(
        (6,), ('heads',), parameters.constant(0.0), decay=False
      )
    }
    with self.assertRaisesRegex(ValueError, "'heads' of size 6 .* size 4"):
      sharding.param_shardings(table, mesh)
