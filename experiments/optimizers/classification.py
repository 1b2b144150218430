"""Handwritten digits: an MLP and a small vision transformer."""

from collections.abc import Callable
import functools
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.optimizers import rules
from experiments.optimizers import trainings
from nested_learning import errors

_NUM_TRAIN, _NUM_VALIDATION = 1297, 500  # images
_NUM_PIXELS = 64
_PER_ENTRY = 10  # steps
_ROUNDS = 4  # of two trainings in turn, to time their steps


class Images(NamedTuple):
  """Images [n, 64] with pixels from 0 to 1, and labels [n]."""

  images: Any
  labels: Any


class Mlp(nn.Module):
  """Three dense layers with layer norm."""

  num_classes: int = 10

  @nn.compact
  def __call__(self, images):
    """Returns logits [..., class] of images [..., 64]."""
    x = images
    for _ in range(2):
      x = nn.relu(nn.LayerNorm()(nn.Dense(128)(x)))
    return nn.Dense(self.num_classes)(x)


class Vit(nn.Module):
  """A vision transformer on patches of 2 x 2 pixels."""

  num_layers: int = 2
  embed_dim: int = 64
  num_heads: int = 4

  @nn.compact
  def __call__(self, images):
    """Returns logits [..., class] of images [..., 64]."""
    patches = images.reshape(*images.shape[:-1], 4, 2, 4, 2)
    patches = jnp.swapaxes(patches, -3, -2)
    patches = patches.reshape(*images.shape[:-1], 16, 4)
    place = self.param(
      'position', nn.initializers.normal(0.02), (16, self.embed_dim)
    )
    x = nn.Dense(self.embed_dim)(patches) + place
    for _ in range(self.num_layers):
      y = nn.LayerNorm()(x)
      x = x + nn.MultiHeadDotProductAttention(self.num_heads)(y)
      y = nn.gelu(nn.Dense(2 * self.embed_dim)(nn.LayerNorm()(x)))
      x = x + nn.Dense(self.embed_dim)(y)
    return nn.Dense(10)(jnp.mean(nn.LayerNorm()(x), axis=-2))


def make_mlp(num_steps: int, batch_size: int) -> trainings.Training:
  """Makes the task of the MLP; see `_make`."""
  return _make('digits', 'an MLP', Mlp(), num_steps, batch_size)


def make_vit(num_steps: int, batch_size: int) -> trainings.Training:
  """Makes the task of the vision transformer; see `_make`."""
  return _make('vit', 'a vision transformer', Vit(), num_steps, batch_size)


@functools.cache
def load() -> tuple[Images, Images]:
  """Returns the images for training and those for validation.

  Raises:
    errors.UserError: scikit-learn, which has the images, is not installed.
  """
  try:
    from sklearn import datasets
  except ImportError as error:
    raise errors.UserError(
      "The digits need scikit-learn: pip install '.[experiments]', or leave "
      'them out with --config=experiments/optimizers/compare.py:language.'
    ) from error
  images, labels = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(labels))
  images, labels = images[order].astype(np.float32) / 16, labels[order]
  parts = slice(_NUM_TRAIN), slice(_NUM_TRAIN, _NUM_TRAIN + _NUM_VALIDATION)
  train_data, validation = (Images(images[p], labels[p]) for p in parts)
  return train_data, validation


def make_loss(model: nn.Module) -> Callable[[Any, Images], jax.Array]:
  """Makes the mean cross-entropy of a classifier: a function of (params, data).

  Args:
    model: A Linen module from images to logits.
  """

  def loss_fn(params, data):
    logits = model.apply(params, data.images)
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, data.labels)
    )

  return loss_fn


def make_init(model: nn.Module) -> Callable[[int], Any]:
  """Makes a function of a seed that returns the parameters of a classifier.

  Args:
    model: A Linen module from images to logits.
  """
  images = jnp.zeros((1, _NUM_PIXELS))
  return jax.jit(lambda seed: model.init(jax.random.key(seed), images))


def draw(data: Images, num_steps: int, batch_size: int, *, seed: int) -> Images:
  """Returns batches [step, batch, ...]; every epoch is in another order."""
  rng = np.random.default_rng(1 + seed)
  size = num_steps * batch_size
  num_epochs = 1 + size // len(data.labels)
  orders = [rng.permutation(len(data.labels)) for _ in range(num_epochs)]
  picks = np.concatenate(orders)[:size].reshape(num_steps, batch_size)
  return jax.tree.map(lambda leaf: jnp.array(leaf[picks]), data)


def _make(name, shown, model, num_steps, batch_size):
  """Makes a task.

  Args:
    name: Its name.
    shown: The model in words.
    model: A Linen module from images to logits.
    num_steps: Steps of a training.
    batch_size: Images per step.

  Returns:
    A `trainings.Training`.
  """
  loss_fn = make_loss(model)
  init = make_init(model)

  def evaluate(params):
    _, validation = load()
    logits = model.apply(params, validation.images)
    return {
      'validation_loss': loss_fn(params, validation),
      'accuracy': jnp.mean(jnp.argmax(logits, -1) == validation.labels),
    }

  @functools.cache
  def start(seed):
    return init(seed), draw(load()[0], num_steps, batch_size, seed=seed)

  @functools.lru_cache(maxsize=2)  # of AdamW, for times, and one more
  def compile_for(optimizer):
    train = rules.make_train(optimizer, loss_fn, *start(0))

    def run(rate, params, batches):
      trained = train(rate, params, batches)
      return trained.losses, evaluate(trained.params)

    return jax.jit(run).lower(0.1, *start(0)).compile()

  def train(optimizer, rate, seed):
    program = compile_for(optimizer)
    begin = time.perf_counter()
    losses, numbers = jax.device_get(program(rate, *start(seed)))
    entries = losses.reshape(-1, min(_PER_ENTRY, num_steps))
    seconds = time.perf_counter() - begin
    return numbers | {'seconds': seconds, 'losses': entries.mean(axis=1)}

  def time_steps(optimizer):
    adamw, other = compile_for('AdamW'), compile_for(optimizer)
    numbers = trainings.time_in_turn(
      lambda: adamw(1e-3, *start(0)),
      lambda: other(1e-3, *start(0)),
      num_steps=num_steps,
      num_rounds=_ROUNDS,
    )
    params, batches = start(0)
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    tx = rules.set_up(optimizer, loss_fn, params, first).make(1e-3)
    state = jax.eval_shape(tx.init, params)
    return numbers | {'state_bytes': rules.bytes_per_parameter(state, params)}

  return trainings.Training(
    name=name,
    title=f'Digits, {shown}',
    description=(
      f'{_NUM_TRAIN:,} images of handwritten digits (8 x 8 pixels, from '
      f'scikit-learn), {num_steps} steps of {batch_size} with rates that fall '
      f'linearly to zero, no weight decay. The score is the loss on '
      f'{_NUM_VALIDATION} other images.'
    ),
    score='validation_loss',
    columns={'accuracy': 'accuracy'},
    num_steps=num_steps,
    per_entry=min(_PER_ENTRY, num_steps),
    settings=lambda optimizer: {
      'optimizer': rules.settings(optimizer),
      'num_steps': num_steps,
      'batch_size': batch_size,
    },
    train=train,
    time=time_steps,
  )
