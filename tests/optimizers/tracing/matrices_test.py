"""Tests which parameters of a model are found to be matrices."""

import dataclasses
import math

from absl.testing import absltest
from absl.testing import parameterized
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import optax

from nested_learning import models
from nested_learning import optimizers
from tests import compiling

_DENSE = ((0,), (1,))
_STACKED = ((1,), (2,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Projections:
  key: jax.Array
  value: jax.Array


class Block(nn.Module):
  """A block of a transformer, to be scanned over layers."""

  @nn.compact
  def __call__(self, x, _):
    x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
    return x + nn.Dense(4)(x), None


class ScannedBlocks(nn.Module):
  @nn.compact
  def __call__(self, x):
    blocks = nn.scan(
      nn.remat(Block),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=3,
    )
    return nn.Dense(1)(blocks(name='blocks')(x, None)[0])


class TiedEmbedding(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(11, 4, name='embed')
    x = embed(tokens) + self.param('position', nn.initializers.ones, (5, 4))
    return embed.attend(nn.Dense(4, name='dense')(x))


class Convolutions(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 3), name='full')(x)
    x = nn.GroupNorm(2, name='norm')(x)
    x = nn.Conv(8, (3, 3), feature_group_count=8, name='depthwise')(x)
    x = nn.Conv(8, (3, 3), feature_group_count=2, name='groups')(x)
    x = nn.ConvTranspose(8, (2, 2), transpose_kernel=True, name='up')(x)
    return nn.Conv(4, (1, 1), name='pointwise')(x)


class Ensemble(nn.Module):
  """Networks side by side of the same inputs: vmapped over parameters."""

  @nn.compact
  def __call__(self, x):
    wrap = lambda module, axis: nn.vmap(
      module,
      in_axes=axis,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      axis_size=3,
    )
    x = wrap(nn.Conv, None)(6, (3,), name='first')(x)
    x = wrap(nn.Conv, 0)(6, (3,), name='second')(x)
    return wrap(nn.Dense, 0)(2, name='third')(x)


class Normalised(nn.Module):
  """A matrix that is used by iterations as well, transposed and stopped."""

  @nn.compact
  def __call__(self, x):
    x = nn.WeightNorm(nn.Dense(6, name='weight'), name='scales')(x)
    return nn.SpectralNorm(nn.Dense(4, name='spectral'), name='norm')(
      x, update_stats=True
    )


def attention_axes(prefix='', first=0):
  """Returns the axes of Flax's attention, after `first` axes of a stack."""
  shift = lambda *axes: tuple(axis + first for axis in axes)
  axes = {f'{prefix}out/bias': None}
  axes[f'{prefix}out/kernel'] = shift(0, 1), shift(2)
  for name in ('key', 'query', 'value'):
    axes[f'{prefix}{name}/bias'] = None
    axes[f'{prefix}{name}/kernel'] = shift(0), shift(1, 2)
  return axes


def dense_axes(name, axes=_DENSE):
  return {f'{name}/kernel': axes, f'{name}/bias': None}


# The module, the shape of its inputs, and the axes of all of its parameters:
# contracted with data, and of the outputs.
MODULES = {
  'attention': (
    nn.MultiHeadDotProductAttention(2, qkv_features=12),
    (2, 5, 8),
    attention_axes(),
  ),
  'scanned': (
    ScannedBlocks(),
    (2, 5, 4),
    {
      **dense_axes('Dense_0'),
      **dense_axes('blocks/Dense_0', _STACKED),
      **attention_axes('blocks/MultiHeadDotProductAttention_0/', 1),
      'blocks/LayerNorm_0/bias': None,
      'blocks/LayerNorm_0/scale': None,
    },
  ),
  'convolutions': (
    Convolutions(),
    (2, 6, 6, 3),
    {
      **dense_axes('full', ((0, 1, 2), (3,))),
      **dense_axes('depthwise', None),
      **dense_axes('groups', None),
      **dense_axes('up', ((0, 1, 3), (2,))),
      **dense_axes('pointwise', ((0, 1, 2), (3,))),
      'norm/bias': None,
      'norm/scale': None,
    },
  ),
  'ensemble': (
    Ensemble(),
    (2, 5, 4),
    {
      **dense_axes('first', ((1, 2), (3,))),
      **dense_axes('second', ((1, 2), (3,))),
      **dense_axes('third', _STACKED),
    },
  ),
  'normalised': (
    Normalised(),
    (2, 5),
    {
      **dense_axes('weight'),
      **dense_axes('spectral'),
      'scales/weight/kernel/scale': None,
    },
  ),
}


def read(tree, like):
  """Returns tuples of axes or None by the names in the path."""
  leaves = jax.tree.leaves(
    tree, is_leaf=lambda leaf: leaf is None or hasattr(leaf, 'output_axis')
  )
  names = jax.tree.leaves_with_path(like)
  return {
    '/'.join(key.key for key in path): leaf and tuple(leaf)
    for (path, _), leaf in zip(names, leaves, strict=True)
  }


def make_module(name):
  """Returns a loss, and shapes of its parameters and further arguments."""
  module, shape, _ = MODULES[name]
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  variables = jax.eval_shape(module.init, jax.random.key(0), x)
  rest = {k: v for k, v in variables.items() if k != 'params'}

  def loss_fn(params, rest, x):
    variables = {'params': params, **rest}
    return jnp.sum(module.apply(variables, x, mutable=list(rest))[0])

  return loss_fn, variables['params'], (rest, x)


def shapes(**by_name):
  return {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in by_name.items()}


def raveled(params, x):
  first, second = jnp.split(params['w'], 2)
  hidden = jnp.tanh(x @ first.reshape(8, 6))
  return jnp.sum(hidden @ second.reshape(6, 8))


def find(loss_fn, params, *args):
  return read(optimizers.dimension_numbers(loss_fn, params, *args), params)


def to_matrices(leaf, axes):
  """Returns [batch, inputs, outputs] of a parameter."""
  rows, columns = axes
  batch = [k for k in range(leaf.ndim) if k not in rows + columns]
  sizes = (
    math.prod(leaf.shape[k] for k in group) for group in (batch, rows, columns)
  )
  return jnp.transpose(leaf, (*batch, *rows, *columns)).reshape(*sizes)


class DimensionNumbersTest(parameterized.TestCase):
  @parameterized.parameters(*MODULES)
  def test_linen(self, name):
    loss_fn, params, args = make_module(name)
    self.assertEqual(find(loss_fn, params, *args), MODULES[name][2])

  @parameterized.parameters(nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell)
  def test_recurrent_cells(self, cell):
    model, x = nn.RNN(cell(4)), jnp.ones((2, 3, 5))
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    loss_fn = lambda params, x: jnp.sum(model.apply(params, x))
    found = find(loss_fn, params, x)
    for name, axes in found.items():
      self.assertEqual(axes, _DENSE if name.endswith('kernel') else None, name)

  def test_tables_are_no_matrices_even_if_tied(self):
    model, tokens = TiedEmbedding(), jnp.zeros((2, 5), int)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
    loss_fn = lambda p, x: jnp.sum(model.apply({'params': p}, x))
    expected = {**dense_axes('dense'), 'embed/embedding': None}
    self.assertEqual(
      find(loss_fn, params, tokens), {**expected, 'position': None}
    )

  @parameterized.parameters(*MODULES)
  def test_muon_orthogonalises_the_maps(self, name):
    loss_fn, params, args = make_module(name)
    found = find(loss_fn, params, *args)
    leaves = dict(zip(found, jax.tree.leaves(params), strict=True))
    # One of each, since compiling takes long.
    paths = {(leaf.shape, found[path]): path for path, leaf in leaves.items()}
    paths = [path for (_, axes), path in paths.items() if axes is not None]
    keys = jax.random.split(jax.random.key(0), len(paths))
    grads = {
      path: jax.random.normal(key, leaves[path].shape)
      for path, key in zip(paths, keys, strict=True)
    }
    numbers = {p: optax.contrib.MuonDimensionNumbers(*found[p]) for p in paths}
    tx = optax.contrib.scale_by_muon(weight_dimension_numbers=numbers)
    updates, _ = compiling.jit(lambda g: tx.update(g, tx.init(g)))(grads)
    for path in paths:
      matrices = to_matrices(updates[path], MODULES[name][2][path])
      values = jnp.linalg.svd(matrices, compute_uv=False)
      self.assertBetween(jnp.min(values), 0.65, 1.25, path)
      self.assertBetween(jnp.max(values), 0.65, 1.25, path)

  def test_nnx_module_trains_with_muon(self):
    model = nnx.MultiHeadAttention(2, 8, 12, decode=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
    found = optimizers.dimension_numbers(loss_fn, model, x)
    for name, axes in attention_axes().items():
      name, part = name.split('/')
      self.assertEqual(found[name][part], axes)

    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    numbers = optimizers.dimension_numbers(loss_fn, model, x)
    tx = optax.contrib.muon(1.0, muon_weight_dimension_numbers=numbers)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = model.kernel[...]
    optimizer.update(model, nnx.grad(loss_fn)(model, x))
    values = jnp.linalg.svd(model.kernel[...] - before, compute_uv=False)
    self.assertBetween(jnp.max(values), 0.65, 1.25)

  @parameterized.parameters('hope_tiny', 'atlas_tiny', 'transformer_tiny')
  def test_models_of_this_package(self, name):
    model = models.make_model(models.zoo.make_config(name))
    params = jax.eval_shape(model.init_params, jax.random.key(0))
    loss_fn = lambda params, x: jnp.sum(model.forward(params, None, x)[0])
    tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    report = optimizers.parameter_report(loss_fn, params, tokens)
    no_matrices = ('norm', 'bias', 'conv', 'powers', 'embedding')
    for info in report:
      is_matrix = not any(part in info.path for part in no_matrices)
      self.assertEqual(info.kind == 'matrix', is_matrix, info)
      if "['memory']" in info.path:  # [layer, head, ..., out, in]
        last = len(info.shape) - 1
        axes = {axis for group in info.dimension_numbers for axis in group}
        self.assertEqual(axes, {last, last - 1}, info)

  @parameterized.parameters(
    lambda params, x: jnp.sum(params['w'] * x),
    lambda params, x: jnp.sum(x),
    raveled,
  )
  def test_loss_without_maps_is_refused(self, loss_fn):
    size = 96 if loss_fn is raveled else 8
    with self.assertRaisesRegex(ValueError, 'no product of a parameter'):
      optimizers.dimension_numbers(loss_fn, shapes(w=(size,)), jnp.ones((5, 8)))


class ParameterReportTest(absltest.TestCase):
  def test_names_every_kind(self):
    def loss_fn(params, x):
      y = jnp.einsum('ti,eio->eto', x * params['scale'], params['kernel'])
      y = y + params['bias'] + params['table'][jnp.array([1, 2])][0]
      y = jnp.concatenate([y, jnp.broadcast_to(params['token'], y.shape)])
      return jnp.sum(y @ params['vector']) + jnp.sum(x[:, :0] @ params['empty'])

    params = shapes(
      scale=(8,),
      kernel=(2, 8, 4),
      bias=(2, 5, 4),
      table=(7, 4),
      token=(5, 4),
      vector=(4,),
      empty=(0, 4),
      forgotten=(3, 3),
    )
    report = optimizers.parameter_report(loss_fn, params, jnp.ones((5, 8)))
    self.assertEqual(
      {info.path[2:-2]: info.kind for info in report},
      {
        'scale': 'scale',
        'kernel': 'matrix',
        'bias': 'bias',
        'table': 'table',
        'token': 'concatenated with data',
        'vector': 'vector',
        'empty': 'empty',
        'forgotten': 'unused',
      },
    )
    (kernel,) = (info for info in report if info.dimension_numbers)
    self.assertEqual(kernel.matrix_shape, (2, 8, 4))
    header, _, *rows = str(report).splitlines()
    self.assertLen(rows, len(params))
    cells = lambda row: [cell.strip() for cell in row.strip('|').split('|')]
    self.assertEqual(
      dict(zip(cells(header), cells(rows[3]), strict=True)),
      {
        'parameter': "['kernel']",
        'shape': '[2, 8, 4]',
        'kind': 'matrix',
        'matrix': '[2, 8, 4]',
        'm3': 'matrix',
        'dgd': 'map',
      },
    )

  def test_names_fields_called_value(self):
    # As in a tree of dataclasses; a variable of NNX has such a field as well.
    loss_fn = lambda params, x: jnp.sum(x @ params.key @ params.value)
    params = Projections(jnp.ones((8, 8)), jnp.ones((8, 4)))
    report = optimizers.parameter_report(loss_fn, params, jnp.ones((5, 8)))
    self.assertEqual([info.path for info in report], ['.key', '.value'])
    module = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    report = optimizers.parameter_report(
      lambda module, x: jnp.sum(module(x)), module, jnp.ones((5, 8))
    )
    self.assertEqual([i.path for i in report], ["['bias']", "['kernel']"])

  def test_tells_groups_and_mixed_axes(self):
    loss_fn, params, args = make_module('convolutions')
    kinds = {
      info.path: info.kind
      for info in optimizers.parameter_report(loss_fn, params, *args)
    }
    self.assertEqual(kinds["['depthwise']['kernel']"], 'depthwise')
    self.assertEqual(kinds["['groups']['kernel']"], 'groups')
    (info,) = optimizers.parameter_report(
      raveled, shapes(w=(96,)), jnp.ones((5, 8))
    )
    self.assertEqual(info.kind, 'mixed axes')
