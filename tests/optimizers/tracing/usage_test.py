"""Tests that every use of a parameter in a loss is understood."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import optax

from nested_learning import optimizers
from tests import compiling

_DENSE = ((0,), (1,))
_STACKED = ((1,), (2,))


def shapes(**by_name):
  return {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in by_name.items()}


def experts(params, x):
  hidden = jnp.tanh(jnp.einsum('ti,eif->tef', x, params['up']))
  outputs = jnp.einsum('tef,efo->teo', hidden, params['down'])
  gates = jax.nn.softmax(x @ params['router'])
  return jnp.sum(outputs * gates[..., None])


def dispatched_experts(params, x):
  gates = jax.nn.one_hot(jnp.argmax(x @ params['router'], -1), 3)
  x = jnp.einsum('te,ti->eti', gates, x)
  hidden = jnp.tanh(jnp.einsum('eti,eif->etf', x, params['up']))
  return jnp.sum(jnp.einsum('etf,efo->eto', hidden, params['down']))


def ragged_experts(params, x):
  sizes = jnp.array([2, 2, 1])
  hidden = jnp.tanh(jax.lax.ragged_dot(x, params['up'], sizes))
  return jnp.sum(jax.lax.ragged_dot(hidden, params['down'], sizes))


def looked_up_experts(params, x):
  chosen = jnp.argmax(x @ params['router'], -1)
  hidden = jnp.tanh(jnp.einsum('ti,tif->tf', x, params['up'][chosen]))
  return jnp.sum(jnp.einsum('tf,tfo->to', hidden, params['down'][chosen]))


def summed_experts(params, x):
  gates = jax.nn.softmax(x @ params['router'])
  hidden = jnp.einsum('ti,eif->tef', x, params['up']) * gates[..., None]
  return jnp.sum(jnp.einsum('tef,efo->to', hidden, params['down']))


EXPERTS = shapes(up=(3, 8, 16), down=(3, 16, 8), router=(8, 3))
EXPERT_AXES = {'up': _STACKED, 'down': _STACKED, 'router': _DENSE}
UNROUTED = {**EXPERT_AXES, 'router': None}

LORA = shapes(w=(8, 2, 3), a=(8, 2), b=(2, 2, 3))
LORA_AXES = {'w': ((0,), (1, 2)), 'a': _DENSE, 'b': ((0,), (1, 2))}


def merged_lora(params, x):
  product = jnp.einsum('ir,rhd->ihd', params['a'], params['b'])
  merged = params['w'] + 0.5 * product
  return jnp.sum(jnp.einsum('ti,ihd->thd', x, merged))


def factored_lora(params, x):
  y = jnp.einsum('ti,ihd->thd', x, params['w'])
  return jnp.sum(y + jnp.einsum('tr,rhd->thd', x @ params['a'], params['b']))


def in_a_loop(params, x):
  step = lambda i, x: jnp.tanh(x @ params['w'][i])
  return jnp.sum(jax.lax.fori_loop(0, 3, step, x))


def in_an_open_loop(params, x):
  step = lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ params['w'][0]))
  unfinished = lambda carry: jnp.sum(carry[1]) > carry[0]
  return jnp.sum(jax.lax.while_loop(unfinished, step, (0, x))[1])


def chosen_in_a_branch(params, x):
  choose = lambda w: jax.lax.cond(x[0, 0] > 0, lambda: w, lambda: 2 * w)
  return jnp.sum(x @ choose(params['w']))


@jax.custom_vjp
def custom_product(w, x):
  return x @ w


custom_product.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: r)


def in_a_shard_map(params, x):
  mesh = jax.make_mesh((2,), ('i',), axis_types=(jax.sharding.AxisType.Auto,))
  product = jax.shard_map(
    lambda w, x: jax.lax.psum(x @ w, 'i'),
    mesh=mesh,
    in_specs=(jax.P('i', None), jax.P(None, 'i')),
    out_specs=jax.P(),
  )
  return jnp.sum(product(params['w'], x))


def in_a_shard_map_of_samples(params, x):
  # Copies of parameters, made to vary by device, or gathered from their shards.
  mesh = jax.make_mesh((2,), ('i',), axis_types=(jax.sharding.AxisType.Auto,))

  def apply(copied, sharded, x):
    gathered = jax.lax.all_gather(sharded, 'i', axis=0, tiled=True)
    return jax.lax.pmean(jnp.sum(jnp.tanh(x @ copied) @ gathered), 'i')

  product = jax.shard_map(
    apply,
    mesh=mesh,
    in_specs=(jax.P(), jax.P('i', None), jax.P('i', None)),
    out_specs=jax.P(),
  )
  return product(params['w'], params['sharded'], x[:4])


def initial_memory(params, x):
  # Written by a delta rule in every row, from a starting value that is learned.
  def step(memory, x):
    error = jnp.einsum('bi,bio->bo', x, memory) - x
    return memory - jnp.einsum('bi,bo->bio', x, error), error

  memory = jnp.broadcast_to(params['w'], (5, 8, 8))
  return jnp.sum(jax.lax.scan(step, memory, jnp.stack([x, x]))[1])


def with_inner_step(params, x):
  inner_loss = lambda w: jnp.sum(jnp.tanh(x @ w) ** 2)
  stepped = params['w'] - 0.1 * jax.grad(inner_loss)(params['w'])
  return jnp.sum(x @ stepped)


def with_penalty(params, x):
  gram = jnp.einsum('ihd,ihe->hde', params['w'], params['w'])
  return jnp.sum(jnp.einsum('ti,ihd->thd', x, params['w'])) + jnp.sum(gram)


def standardised(params, x):
  w = params['w'] - jnp.mean(params['w'], axis=0)
  return jnp.sum(x @ (w / jnp.std(w, axis=0)))


def positions(params, x):
  x = jax.vmap(lambda x: x + params['position'])(jnp.stack([x, x]))
  return jnp.sum(jnp.tanh(x) @ params['w'])


W = shapes(w=(8, 8))
LAYERS = shapes(w=(3, 8, 8))
IS_MATRIX, IS_STACK = {'w': _DENSE}, {'w': _STACKED}

# The loss of (params, x [5, 8]), its parameters and their axes.
FUNCTIONS = [
  (experts, EXPERTS, EXPERT_AXES),
  (dispatched_experts, EXPERTS, EXPERT_AXES),
  (looked_up_experts, EXPERTS, EXPERT_AXES),
  (ragged_experts, EXPERTS, UNROUTED),
  # One map, as the output projection of attention.
  (summed_experts, EXPERTS, {**EXPERT_AXES, 'down': ((0, 1), (2,))}),
  (merged_lora, LORA, LORA_AXES),
  (factored_lora, LORA, LORA_AXES),
  (in_a_loop, LAYERS, IS_STACK),
  (in_an_open_loop, LAYERS, IS_STACK),
  (lambda p, x: jnp.sum(custom_product(p['w'], x)), W, IS_MATRIX),
  (chosen_in_a_branch, W, IS_MATRIX),
  (in_a_shard_map, W, IS_MATRIX),
  (
    in_a_shard_map_of_samples,
    {**W, **shapes(sharded=(8, 4))},
    {**IS_MATRIX, 'sharded': _DENSE},
  ),
  # A function of entries is not entered.
  (
    lambda p, x: jnp.sum(
      x @ jax.lax.reduce(p['w'], 0.0, lambda a, b: a + 2 * b, (0,))
    ),
    shapes(w=(2, 8, 8)),
    None,
  ),
  (initial_memory, W, IS_MATRIX),
  (with_inner_step, W, IS_MATRIX),
  (with_penalty, shapes(w=(8, 2, 3)), {'w': ((0,), (1, 2))}),
  (standardised, W, IS_MATRIX),
  (
    lambda p, x: jnp.sum(x @ jnp.where(x[0] > 0, p['w'], 0)),
    W,
    IS_MATRIX,
  ),
  (
    lambda p, x: jnp.sum((x * p['gate']) @ p['w']),
    {**W, **shapes(gate=(5, 8))},
    {**IS_MATRIX, 'gate': None},
  ),
  (
    positions,
    {**W, **shapes(position=(5, 8))},
    {**IS_MATRIX, 'position': None},
  ),
  (
    lambda p, x: jnp.sum(jnp.einsum('ti,oi', x, p['w'])),
    W,
    {'w': ((1,), (0,))},
  ),
  # Parts of a fused kernel, as slices and by index.
  (
    lambda p, x: sum(jnp.sum(x @ part) for part in jnp.split(p['w'], 2, 1)),
    W,
    IS_MATRIX,
  ),
  (
    lambda p, x: sum(
      jnp.sum(x @ p['w'].reshape(8, 2, 4)[:, i]) for i in (0, 1)
    ),
    W,
    IS_MATRIX,
  ),
  (
    lambda p, x: sum(jnp.sum(x @ p['w'][:, i]) for i in (0, 1)),
    shapes(w=(8, 2, 4)),
    {'w': ((0,), (2,))},
  ),
]


class UsageTest(parameterized.TestCase):
  @parameterized.parameters(*FUNCTIONS)
  def test_functions(self, loss_fn, params, expected):
    x = jax.ShapeDtypeStruct((5, 8), jnp.float32)
    if expected is None:
      with self.assertRaisesRegex(ValueError, 'no product of a parameter'):
        optimizers.dimension_numbers(loss_fn, params, x)
    else:
      self.assertEqual(
        optimizers.dimension_numbers(loss_fn, params, x), expected
      )

  @parameterized.parameters(
    (experts, {'up': EXPERTS['up'], 'down': EXPERTS['down']}, lambda x: x),
    (merged_lora, {'w': LORA['w'], 'b': LORA['b']}, lambda x: x.reshape(-1, 6)),
  )
  def test_muon_orthogonalises_the_maps(self, loss_fn, leaves, to_matrices):
    params = EXPERTS if loss_fn is experts else LORA
    found = optimizers.dimension_numbers(loss_fn, params, jnp.ones((5, 8)))
    tx = optax.contrib.scale_by_muon(
      weight_dimension_numbers={name: found[name] for name in leaves}
    )
    grads = {
      name: jax.random.normal(jax.random.key(i), leaf.shape)
      for i, (name, leaf) in enumerate(leaves.items())
    }
    updates, _ = compiling.jit(lambda g: tx.update(g, tx.init(g)))(grads)
    for name, update in updates.items():
      values = jnp.linalg.svd(to_matrices(update), compute_uv=False)
      self.assertBetween(jnp.min(values), 0.65, 1.25, name)
      self.assertBetween(jnp.max(values), 0.65, 1.25, name)

  def test_two_different_maps_are_refused(self):
    def loss_fn(params, x):
      y = jnp.einsum('ba,aef->bef', x, params['w'])
      return jnp.sum(jnp.einsum('bae,aef->bf', y, params['w']))

    with self.assertRaisesRegex(
      ValueError, r"\['w'\].*\[0\] -> \[1, 2\] and axes \[0, 1\] -> \[2\]"
    ):
      optimizers.dimension_numbers(
        loss_fn, shapes(w=(4, 4, 4)), jnp.ones((3, 4))
      )
    (info,) = optimizers.parameter_report(
      loss_fn, shapes(w=(4, 4, 4)), jnp.ones((3, 4))
    )
    self.assertStartsWith(info.kind, 'two maps')

  def test_tied_directions_are_one_map(self):
    loss_fn = lambda p, x: jnp.sum(jnp.tanh(x @ p['w']) @ p['w'].T)
    self.assertEqual(
      optimizers.dimension_numbers(loss_fn, shapes(w=(8, 6)), jnp.ones((5, 8))),
      IS_MATRIX,
    )
