"""Fine-tuning of all parameters on classes that come in tasks."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from experiments.continual import class_tasks
from experiments.continual import classifier
from nested_learning import models

METHODS = ('fine-tuning', 'fine-tuning in batch', 'ewc', 'replay', 'joint')


@dataclasses.dataclass(frozen=True)
class TuningConfig:
  """How fine-tuning learns a task."""

  epochs: int = 6
  batch_size: int = 32  # examples
  learning_rate: float = 2e-3  # of Adam
  replayed: int = 5  # examples kept of an earlier class
  ewc_strength: float = 1e3


class Tuning(NamedTuple):
  """Fine-tuning of all parameters, for several seeds at once.

  Attributes:
    init: `init(params) -> state` makes the state of the optimiser; all leaves
      are [seed, ...].
    step: `step(params, state, batch, anchor)` takes one step on examples
      [seed, b, EXAMPLE]. The anchor is (parameters, importances) or None.
    importances: `importances(params, batch)` returns the mean squared gradient
      of the log-likelihood: the diagonal of the Fisher matrix.
    answer: `answer(params, batch, allowed)` returns the likeliest class of each
      example among allowed [seed, v].
  """

  init: Any
  step: Any
  importances: Any
  answer: Any


def make_tuning(
  model: models.Model,
  words: classifier.Words,
  learning_rate: float,
  strength: float,
  *,
  in_batch: bool = False,
) -> Tuning:
  """Makes the functions that fine-tune a classifier on single examples.

  Args:
    model: A model from `classifier.make_classifier`.
    words: Its vocabulary.
    learning_rate: Learning rate of Adam.
    strength: Strength of the pull to an anchor; lambda of Kirkpatrick et al.
    in_batch: Whether only the classes of the batch are candidates, as for
      levels with the objective 'in_segment'.

  Returns:
    A `Tuning`.

  References:
    Kirkpatrick et al., arXiv:1612.00796, 2016, eq. 3.
  """
  optimizer = optax.adam(learning_rate)

  def classify(params, batch):
    logits, _ = model.forward(params, None, batch)
    return logits[:, -2]

  def loss_fn(params, batch, anchor):
    logits = classify(params, batch)[:, : words.num_classes]
    if in_batch:
      is_there = jnp.zeros(words.num_classes, bool).at[batch[:, -1]].set(True)
      # Half the minimum: subtracting the maximum must not give -inf.
      logits = jnp.where(is_there, logits, jnp.finfo(logits.dtype).min / 2)
    loss = jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, -1])
    )
    if anchor is None:
      return loss
    pulls = jax.tree.map(
      lambda p, at, weight: jnp.sum(weight * jnp.square(p - at)),
      params,
      *anchor,
    )
    return loss + 0.5 * strength * sum(jax.tree.leaves(pulls))

  def step_one(params, state, batch, anchor):
    gradients = jax.grad(loss_fn)(params, batch, anchor)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  def importances_one(params, batch):
    def add(total, example):
      gradient = jax.grad(loss_fn)(params, example[None], None)
      return jax.tree.map(lambda a, g: a + g * g, total, gradient), None

    # A scan, since gradients of all examples at once would not fit.
    zero = jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(add, zero, batch)
    return jax.tree.map(lambda x: x / batch.shape[0], total)

  def answer_one(params, batch, allowed):
    logits = jnp.where(allowed, classify(params, batch), -jnp.inf)
    return jnp.argmax(logits, axis=-1)

  step = functools.partial(jax.jit, donate_argnums=(0, 1))
  return Tuning(
    jax.jit(jax.vmap(optimizer.init)),
    step(jax.vmap(step_one, in_axes=(0, 0, 0, 0))),
    jax.jit(jax.vmap(importances_one)),
    jax.jit(jax.vmap(answer_one, in_axes=(0, None, 0))),
  )


def tune(
  config: TuningConfig,
  tasks: class_tasks.Tasks,
  model: models.Model,
  params: Any,
  method: str,
) -> np.ndarray:
  """Fine-tunes a classifier on task after task.

  Args:
    config: Settings of fine-tuning.
    tasks: The tasks.
    model: A model from `classifier.make_classifier`.
    params: Its parameters, the start of every seed.
    method: One of `METHODS`.

  Returns:
    Accuracy [seed, 1 + task, task] before and after each task; see
    `class_tasks.Tasks.score`.
  """
  tuning = make_tuning(
    model,
    tasks.words,
    config.learning_rate,
    config.ewc_strength,
    in_batch=method == 'fine-tuning in batch',
  )
  num_seeds, num_tasks = tasks.num_seeds, tasks.num_tasks
  # Copies: `step` donates its parameters.
  params = jax.tree.map(lambda x: np.stack([x] * num_seeds), params)
  state, anchor = tuning.init(params), None
  rngs = [np.random.default_rng((4, seed)) for seed in range(num_seeds)]
  kept = [np.zeros(0, np.int64) for _ in range(num_seeds)]

  def answer(allowed):
    batches = np.array_split(tasks.test, -(-len(tasks.test) // 256))
    found = [tuning.answer(params, batch, allowed) for batch in batches]
    return np.concatenate(found, axis=1)

  scores = [tasks.score(answer, -1)]
  for task in tqdm.trange(num_tasks, desc=method):
    new = [tasks.part(seed, task) for seed in range(num_seeds)]
    steps = max(config.epochs * max(map(len, new)) // config.batch_size, 1)
    for _ in range(steps):
      picks = [
        _draw_batch(rng, fresh, old, config.batch_size, method)
        for rng, fresh, old in zip(rngs, new, kept, strict=True)
      ]
      batch = tasks.train[np.stack(picks)]  # [seed, b, EXAMPLE]
      params, state = tuning.step(params, state, batch, anchor)
    if method == 'ewc':
      picks = [rng.choice(x, 64) for rng, x in zip(rngs, new, strict=True)]
      found = tuning.importances(params, tasks.train[np.stack(picks)])
      if anchor is not None:
        found = jax.tree.map(np.add, found, anchor[1])
      anchor = jax.tree.map(np.array, params), found  # params are donated
    per_class = config.replayed if method == 'replay' else None
    kept = [
      np.concatenate([old, _keep(tasks, rng, fresh, per_class)])
      for rng, old, fresh in zip(rngs, kept, new, strict=True)
    ]
    scores.append(tasks.score(answer, task))
  return np.stack(scores, axis=1)


def _draw_batch(rng, fresh, old, batch_size, method):
  """Draws the examples of a step, new ones and those kept of earlier tasks."""
  if method == 'joint':
    return rng.choice(np.concatenate([fresh, old]), batch_size)
  batch = rng.choice(fresh, batch_size)
  if method == 'replay' and len(old):
    half = batch_size // 2
    batch[:half] = rng.choice(old, half)
  return batch


def _keep(tasks, rng, places, per_class):
  """Draws examples of each class of a task to keep for replay."""
  labels = tasks.train[places, -1]
  picks = [
    rng.permutation(places[labels == label])[:per_class]
    for label in np.unique(labels)
  ]
  return np.concatenate(picks)
