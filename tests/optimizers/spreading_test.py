"""Tests how matrices of sharded parameters move between devices."""

import re

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import compilation
from nested_learning import optimizers
from nested_learning.optimizers import axes as axes_lib
from nested_learning.optimizers import spreading
from tests import compiling

_AUTO, _EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
_numbers = optax.contrib.MuonDimensionNumbers
_SHAPES = {
  'layers_0': {'query': (16, 8, 8), 'up': (16, 32)},
  'layers_1': {'query': (16, 8, 8), 'up': (16, 32)},
  'stack': (8, 16, 24),
  'odd': (3, 16, 24),
  'alone': (24, 16),
}
_LAYER = {'query': _numbers((0,), (1, 2)), 'up': _numbers(0, 1)}
_NUMBERS = {
  'layers_0': _LAYER,
  'layers_1': _LAYER,
  'stack': _numbers(-2, -1),
  'odd': _numbers(-2, -1),
  'alone': _numbers(0, 1),
}


def _make(seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.array(rng.normal(size=shape), jnp.float32),
    _SHAPES,
    is_leaf=lambda node: isinstance(node, tuple),
  )


def _specs(side):
  """Returns partitions of all parameters along one side of their matrices."""

  def spec(numbers, leaf):
    axes = axes_lib.find(numbers, leaf)
    axis = (axes.reduction if side == 'rows' else axes.output)[0]
    return jax.P(*['x' if i == axis else None for i in range(leaf.ndim)])

  is_numbers = lambda node: isinstance(node, _numbers)
  return jax.tree.map(spec, _NUMBERS, _make(), is_leaf=is_numbers)


def _put(tree, specs, mesh):
  return jax.tree.map(
    lambda leaf, spec: jax.device_put(leaf, jax.NamedSharding(mesh, spec)),
    tree,
    specs,
  )


def _compile(tx, gradients, params):
  """Compiles an update; returns it with its collectives, but for scalars."""
  state = tx.init(params)
  update = compiling.jit(tx.update).lower(gradients, state, params).compile()
  program = compilation.hlo.parse(update.as_text())
  mesh_shape = dict(jax.sharding.get_abstract_mesh().shape)
  found = compilation.collectives.find(program, mesh_shape)
  # Sums over a sharded matrix are one number per matrix; matrices are larger.
  moves = [move for move in found if move.num_bytes > 512]
  return update, state, moves


def _assert_alike(actual, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), actual, expected
  )


class SpreadingTest(parameterized.TestCase):
  def assert_placed(self, tree, like):
    for leaf, other in zip(
      jax.tree.leaves(tree), jax.tree.leaves(like), strict=True
    ):
      self.assertTrue(
        leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim), leaf.sharding
      )

  @parameterized.product(side=('rows', 'columns'), axis_type=(_AUTO, _EXPLICIT))
  def test_every_matrix_moves_there_and_back(self, side, axis_type):
    tx = optimizers.scale_by_m3(
      slow_every=1, ns_steps=2, dimension_numbers=_NUMBERS
    )
    plain, state = compiling.jit(tx.update), tx.init(_make())
    _, state = plain(_make(1), state)
    expected, _ = plain(_make(2), state)
    mesh = jax.make_mesh((8,), ('x',), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
      params, *gradients = (
        _put(_make(seed), _specs(side), mesh) for seed in range(3)
      )
      update, state, moves = _compile(tx, gradients[0], params)
      for each in gradients:
        updates, state = update(each, state, params)
    _assert_alike(updates, expected)
    self.assert_placed(updates, params)
    for momentum in (state.momentum, *state.slow[0], state.second_moment):
      self.assert_placed(momentum, params)
    # The two layers make stacks, so that there are five kinds of matrices. Four
    # move there and back, the one that is alone is gathered.
    slow = [move for move in moves if 'cond' in move.op_name]
    self.assertLen(slow, 9)
    self.assertLen(moves, 18)
    self.assertEqual({move.loops for move in moves}, {()})  # none in a loop
    self.assertEqual(
      {move.kind for move in moves}, {'all-to-all', 'all-gather'}
    )

  def test_moves_less_than_muon(self):
    names, num_bytes = ('stack', 'alone'), {}
    numbers = {name: _NUMBERS[name] for name in names}
    mesh = jax.make_mesh((8,), ('x',), axis_types=(_AUTO,))
    with jax.set_mesh(mesh):
      params = _put(_make(), _specs('columns'), mesh)
      params = {name: params[name] for name in names}
      for name, tx in {
        'm3': optimizers.scale_by_m3(dimension_numbers=numbers),
        'muon': optax.contrib.scale_by_muon(weight_dimension_numbers=numbers),
      }.items():
        _, _, moves = _compile(tx, params, params)
        num_bytes[name] = sum(move.num_bytes for move in moves)
    self.assertLess(2 * num_bytes['m3'], num_bytes['muon'])

  @parameterized.product(
    spec=(
      jax.P(None, None, 'y'),
      jax.P(None, 'x', 'y'),
      jax.P(None, ('x', 'y')),
      jax.P('y', 'x'),
    ),
    axis_type=(_AUTO, _EXPLICIT),
  )
  def test_two_axes_of_a_mesh(self, spec, axis_type):
    x = jax.random.normal(jax.random.key(0), (6, 8, 16))
    tx = optimizers.scale_by_m3(slow_every=None, second_decay=None, ns_steps=2)
    expected, _ = tx.update(x, tx.init(x))
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
      params = jax.device_put(x, jax.NamedSharding(mesh, spec))
      update, state, moves = _compile(tx, params, params)
      updates, _ = update(params, state, params)
    _assert_alike(updates, expected)
    self.assert_placed(updates, params)
    # One move per axis of the mesh, there and back; one more where the stack is
    # sharded itself, but the axes of the mesh do not say so.
    is_unknown = axis_type == _AUTO and spec[0] is not None
    self.assertLessEqual(len(moves), 5 if is_unknown else 4)

  @parameterized.product(
    spec=(jax.P(), jax.P('x'), jax.P(None, 'x'), jax.P(None, None, 'x')),
    axis_type=(_AUTO, _EXPLICIT),
  )
  def test_no_device_computes_the_whole_stack(self, spec, axis_type):
    tx = optimizers.scale_by_m3(ns_steps=2)
    mesh = jax.make_mesh((8,), ('x',), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
      sharding = jax.NamedSharding(mesh, spec)
      params = jax.device_put(jnp.ones((16, 8, 24)), sharding)
      update, _, _ = _compile(tx, params, params)
    # One device multiplies two matrices of the sixteen, never more.
    shapes = re.findall(r'f32\[([\d,]+)\]\S* dot\(', update.as_text())
    self.assertNotEmpty(shapes)
    self.assertEqual({shape.split(',')[0] for shape in shapes}, {'2'})

  def test_mesh_can_be_given(self):
    mesh = jax.make_mesh((8,), ('x',), axis_types=(_AUTO,))
    x = jax.device_put(jnp.ones((8, 4, 6)), jax.NamedSharding(mesh, jax.P()))
    axes = axes_lib.find(None, x)

    def flops(mesh):
      mapped = compiling.jit(
        lambda x: spreading.map_matrices(
          optimizers.orthogonalize, x, axes, like=x, mesh=mesh
        )
      )
      return mapped.lower(x).compile().cost_analysis()['flops']

    self.assertLess(flops(mesh), flops(None) / 4)
