"""Small models that several tests of optimisers train."""

from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp


def make_mlp():
  keys = jax.random.split(jax.random.key(0), 4)
  params = {
    'first': {
      'kernel': jax.random.normal(keys[0], (3, 5)),
      'bias': jnp.ones(5),
    },
    'second': {'kernel': jax.random.normal(keys[1], (5, 2))},
  }
  x, y = jax.random.normal(keys[2], (7, 3)), jax.random.normal(keys[3], (7, 2))
  return params, (x, y)


def mlp(params, x):
  hidden = jnp.tanh(x @ params['first']['kernel'] + params['first']['bias'])
  return hidden @ params['second']['kernel']


def mlp_loss(params, batch):
  return jnp.mean(jnp.sum((mlp(params, batch[0]) - batch[1]) ** 2, -1))


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return x + nn.Dense(4)(nn.gelu(nn.Dense(6)(x))), None


class Stack(nn.Module):
  """Layers stacked by scan, under remat, after a norm."""

  scanned: bool = True

  @nn.compact
  def __call__(self, x):
    x = nn.LayerNorm()(x)
    if self.scanned:
      layers = nn.scan(
        nn.remat(Block),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=3,
      )
      x, _ = layers(name='layers')(x, None)
    else:
      for i in range(3):
        x, _ = Block(name=f'layer_{i}')(x, None)
    return nn.Dense(2, name='head')(x)


class Net(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(3, 5, rngs=rngs)
    self.norm = nnx.BatchNorm(5, rngs=rngs)
    self.second = nnx.Linear(5, 2, use_bias=False, rngs=rngs)

  def __call__(self, x):
    return self.second(nnx.relu(self.norm(self.first(x))))
