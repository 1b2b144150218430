"""Streams: pairs of digits, and files of Python sorted by topic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.optimizers import classification
from experiments.optimizers import rules
from experiments.optimizers import streams
from nested_learning import models
from nested_learning.data import sources
from nested_learning.layers import attention

_NUM_PAIRS, _BATCH = 5, 32  # images
_ROWS, _TOKENS = 4, 128  # of a step of text
_NUM_HELD_OUT = 32  # rows of each topic
_PRETRAINING_RATE = 4e-3


def make_digits(steps_per_task: int) -> streams.Stream:
  """Makes the stream of digits: which of two, for five pairs in sequence.

  Args:
    steps_per_task: Steps of each pair.
  """

  @functools.cache
  def make():
    train_data, validation = classification.load()
    model = classification.Mlp(num_classes=2)
    loss_fn = classification.make_loss(model)
    train_tasks, held_out = (
      [_select_pair(data, task) for task in range(_NUM_PAIRS)]
      for data in (train_data, validation)
    )

    def draw(task, seed):
      seed = _NUM_PAIRS * seed + task
      data = train_tasks[task]
      return classification.draw(data, steps_per_task, _BATCH, seed=seed)

    def evaluate(params):
      return jnp.stack([loss_fn(params, data) for data in held_out])

    init = classification.make_init(model)
    return streams.Tasks(loss_fn, init, draw, evaluate)

  return streams.Stream(
    name='digit_pairs',
    title='Pairs of digits in sequence',
    description=(
      'An MLP learns which of two digits an image shows: 0 or 1, 2 or 3, and '
      f'so on, with the same two outputs for all {_NUM_PAIRS} pairs; '
      f'{steps_per_task} steps of {_BATCH} images a pair.'
    ),
    num_tasks=_NUM_PAIRS,
    steps_per_task=steps_per_task,
    settings={'steps_per_task': steps_per_task, 'batch_size': _BATCH},
    make=make,
  )


def make_topics(
  steps_per_task: int, num_pretraining_steps: int, num_tasks: int = 4
) -> streams.Stream:
  """Makes the stream of text: packages of the standard library in sequence.

  Args:
    steps_per_task: Steps of each package.
    num_pretraining_steps: Steps on other files before the stream begins.
    num_tasks: Number of packages.
  """
  model = models.make_model(
    models.ModelConfig(
      vocab_size=256,
      num_layers=2,
      embed_dim=64,
      mixer=attention.AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=32),
      levels=(models.LevelConfig('mlp', mlp_dim=128),),
      max_length=_TOKENS,
    )
  )

  def loss_fn(params, rows):  # [b, t + 1]
    logits, _ = model.forward(params, None, rows[:, :-1])
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
    )

  @functools.cache
  def make():
    others, *topics = _read_topics(num_tasks)
    cuts = [int(0.9 * len(text)) for text in topics]
    train_texts = [text[:cut] for text, cut in zip(topics, cuts, strict=True)]
    held_out = jnp.stack(
      [
        _cut_rows(text[cut:], _NUM_HELD_OUT, seed=0)
        for text, cut in zip(topics, cuts, strict=True)
      ]
    )

    @functools.cache
    def init(seed):
      params = model.init_params(jax.random.key(seed))
      rows = _cut_batches(others, num_pretraining_steps, seed)
      train = jax.jit(rules.make_train('AdamW', loss_fn, params, rows))
      return train(_PRETRAINING_RATE, params, rows).params

    def draw(task, seed):
      return _cut_batches(train_texts[task], steps_per_task, seed)

    def evaluate(params):
      return jax.lax.map(lambda rows: loss_fn(params, rows), held_out)

    return streams.Tasks(loss_fn, init, draw, evaluate)

  return streams.Stream(
    name='topics',
    title='Text whose topic shifts',
    description=(
      'A small Transformer (two layers of width 64) has read files of the '
      f'standard library outside packages for {num_pretraining_steps:,} steps '
      f'(AdamW), and then reads the {num_tasks} largest packages (in Python '
      '3.11 idlelib, distutils, asyncio and email), '
      f'{steps_per_task} steps of {_ROWS} x {_TOKENS} bytes each. Losses are '
      'in nats per byte.'
    ),
    num_tasks=num_tasks,
    steps_per_task=steps_per_task,
    settings={
      'steps_per_task': steps_per_task,
      'num_pretraining_steps': num_pretraining_steps,
      'num_tasks': num_tasks,
    },
    make=make,
  )


def _select_pair(data, task):
  found = data.labels // 2 == task
  return classification.Images(data.images[found], data.labels[found] % 2)


def _find_packages(num_packages):
  """Returns files by package: those outside first, then the largest ones."""
  found = {'': []}
  for file in sources.find_files('stdlib'):
    package, slash, _ = file.name.partition('/')
    found.setdefault(package if slash else '', []).append(file)
  size = lambda name: -sum(file.size for file in found[name])
  names = sorted(filter(None, found), key=size)[:num_packages]
  return {name: found[name] for name in ['', *names]}


def _read_topics(num_tasks):
  """Returns the files outside packages and each package, as bytes."""
  texts = []
  for found in _find_packages(num_tasks).values():
    joined = '\n'.join(sources.read_text(file.path) for file in found)
    texts.append(np.frombuffer(joined.encode(), np.uint8))
  return texts


def _cut_batches(text, num_steps, seed):
  """Returns batches for training, int32 [step, b, t + 1]."""
  rows = _cut_rows(text, num_steps * _ROWS, seed=1 + seed)
  return rows.reshape(num_steps, _ROWS, -1)


def _cut_rows(text, num_rows, *, seed):
  """Returns rows from random places of a text, int32 [row, t + 1]."""
  rng = np.random.default_rng(seed)
  starts = rng.integers(len(text) - _TOKENS, size=num_rows)
  return jnp.array(text[starts[:, None] + np.arange(_TOKENS + 1)], jnp.int32)
