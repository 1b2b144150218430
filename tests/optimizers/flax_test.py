"""Tests that optimisers drop into Flax's own training states."""

from absl.testing import parameterized
from flax import nnx
import flax.linen as nn
from flax.training import train_state
import jax
import jax.numpy as jnp
import optax

from tests import compiling
from tests.optimizers import contract


class Classifier(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


class NnxClassifier(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(4, 8, rngs=rngs)
    self.second = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    return self.second(nnx.relu(self.first(x)))


class FlaxTest(parameterized.TestCase):
  """Tests drop-in use with Flax; `dgd` has tests of its own."""

  @parameterized.parameters(*(name for name in contract.NAMES if name != 'dgd'))
  def test_linen_train_state_and_nnx_optimizer(self, name):
    x = jax.random.normal(jax.random.key(0), (16, 4))
    y = jnp.arange(16) % 3
    loss_of = lambda logits: jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, y)
    )
    rate = 3.0 if name == 'delta_momentum' else 0.03

    model = Classifier()
    state = train_state.TrainState.create(
      apply_fn=model.apply,
      params=model.init(jax.random.key(1), x)['params'],
      tx=contract.make(name, rate),
    )
    loss_fn = lambda params: loss_of(model.apply({'params': params}, x))
    step = compiling.jit(
      lambda state: state.apply_gradients(grads=jax.grad(loss_fn)(state.params))
    )
    before = loss_fn(state.params)
    for _ in range(15):
      state = step(state)
    self.assertLess(loss_fn(state.params), 0.9 * before)

    module = NnxClassifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, contract.make(name, rate), wrt=nnx.Param)

    @nnx.jit
    def nnx_step(module, optimizer):
      loss, grads = nnx.value_and_grad(lambda m: loss_of(m(x)))(module)
      optimizer.update(module, grads)
      return loss

    losses = [float(nnx_step(module, optimizer)) for _ in range(15)]
    self.assertLess(losses[-1], 0.9 * losses[0])
