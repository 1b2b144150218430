"""The quickstart's language model, trained by the trainer's own step."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import itertools
import math
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments import quickstart
from experiments.optimizers import rules
from experiments.optimizers import trainings
from nested_learning import data as data_lib
from nested_learning import parameters
from nested_learning import training as training_lib
from nested_learning.training import make_workload

_PER_ENTRY = 10  # steps
_ARRAYS = ('tokens', 'targets', 'mask', 'reset')
# Whole periods of the slow momentum of M3, and of the slow level.
_TIMED_STEPS, _ROUNDS = 16, 3
_TIMED_RATE = 4e-3


def make_config(
  optimizer: str,
  rate: float,
  seed: int,
  *,
  mixer: str = 'hope',
  num_steps: int | None = None,
  num_tokens: int | None = None,
) -> training_lib.ExperimentConfig:
  """Returns the quickstart with another optimiser.

  Args:
    optimizer: One of `rules.NAMES`.
    rate: Peak of the learning rate.
    seed: Seed of the parameters and of the order of rows.
    mixer: 'hope' or 'transformer', as the quickstart's argument.
    num_steps: Steps; None for the quickstart's.
    num_tokens: Tokens of a row, for tests; None for the quickstart's.
  """
  config = quickstart.get_config(mixer)
  train = dataclasses.replace(
    config.train,
    learning_rate=rate,
    optimizer=rules.OPTIMIZERS[optimizer],
    num_steps=num_steps or config.train.num_steps,
  )
  data = dataclasses.replace(
    config.data,
    seed=seed,
    sequence_length=num_tokens or config.data.sequence_length,
  )
  return dataclasses.replace(config, data=data, train=train, seed=seed)


def make_training(**sizes) -> trainings.Training:
  """Makes the task: every cell is a run of the quickstart.

  Data, batches, schedule, weight decay and clipping are the quickstart's.
  Nothing is saved but the cell.

  Args:
    **sizes: See `make_config`.
  """
  configure = functools.partial(make_config, **sizes)
  base = configure('AdamW', _TIMED_RATE, 0)
  make = functools.cache(lambda: make_workload.make_workload(base))
  num_steps = base.train.num_steps
  per_entry = min(_PER_ENTRY, num_steps)

  @functools.lru_cache(maxsize=2)  # of AdamW, for times, and one more
  def compile_at(optimizer, rate):
    return _compile(configure(optimizer, rate, 0), make())

  def compile_for(optimizer, rate):
    # Updates are proportional to the rate, which is an argument of the program,
    # but for those of DGD.
    return compile_at(optimizer, rate if rules.is_dgd(optimizer) else 1.0)

  def train(optimizer, rate, seed):
    program = compile_for(optimizer, rate)
    begin = time.perf_counter()
    params, losses = _take_steps(
      program, configure(optimizer, rate, seed), rate / program.rate
    )
    seconds = time.perf_counter() - begin
    batches = itertools.islice(
      _batches(base, 'validation'), base.evaluation.num_batches
    )
    evaluated = make().evaluate(params, batches)
    return {
      'bits_per_byte': evaluated.bits_per_byte,
      'validation_loss': evaluated.loss,
      'losses': losses.reshape(-1, per_entry).mean(axis=1),
      'seconds': seconds,
    }

  def time_steps(optimizer):
    batches = list(itertools.islice(_batches(base, 'train'), _TIMED_STEPS))
    adamw = compile_for('AdamW', _TIMED_RATE)
    other = compile_for(optimizer, _TIMED_RATE)
    state = jax.eval_shape(other.init, jax.random.key(0))
    return trainings.time_in_turn(
      _repeat(adamw, batches),
      _repeat(other, batches),
      num_steps=_TIMED_STEPS,
      num_rounds=_ROUNDS,
    ) | {
      'state_bytes': rules.bytes_per_parameter(state.optimizer, state.params)
    }

  return trainings.Training(
    name='language',
    title='Language model of the quickstart',
    description=(
      f'`experiments/quickstart.py` ({base.data.batch_size} rows of '
      f"{base.data.sequence_length} bytes of Python's standard library a step, "
      f'{num_steps} steps) with its data, warm-up and cosine, weight decay and '
      'clipping. A cell is the run `--config=experiments/quickstart.py '
      '--set=train.optimizer=KIND --set=train.learning_rate=RATE '
      '--set=seed=SEED --set=data.seed=SEED` of `launch/run.py`, without '
      'checkpoints. The score is bits per byte of held-out files.'
    ),
    score='bits_per_byte',
    columns={'validation_loss': 'validation loss'},
    num_steps=num_steps,
    per_entry=per_entry,
    settings=lambda optimizer: {
      'optimizer': rules.settings(optimizer),
      'config': 'experiments/quickstart.py',
      'num_steps': num_steps,
      'batch_tokens': base.batch_tokens,
      'num_params': parameters.count(make().model.table),
      'weight_decay': base.train.weight_decay,
      'clip_norm': base.train.clip_norm,
      'warmup_steps': base.train.warmup_steps,
    },
    train=train,
    time=time_steps,
  )


class _Program(NamedTuple):
  """A compiled training.

  Attributes:
    init: Function of a key that returns the state.
    take_step: Function of (state, batch, factor of the rate) that returns
      (state, metrics).
    rate: The rate that the factor multiplies.
  """

  init: Callable[..., Any]
  take_step: Callable[..., Any]
  rate: float


def _compile(config, workload) -> _Program:
  """Compiles the trainer's step."""
  model = workload.model
  inner = training_lib.make_optimizer(config, model.table)
  init = jax.jit(training_lib.make_init(config, model, inner))

  def take_step(state, batch, factor):
    def update(updates, state, params=None, **extra):
      updates, state = inner.update(updates, state, params, **extra)
      return jax.tree.map(lambda x: factor * x, updates), state

    scaled = optax.GradientTransformationExtraArgs(inner.init, update)
    step = training_lib.make_step(config, model, scaled, workload.token_loss)
    return step(state, batch)

  state = jax.eval_shape(init, jax.random.key(0))
  batch = {
    name: jax.ShapeDtypeStruct((config.data.batch_size, *shape), dtype)
    for name, (shape, dtype) in workload.row.items()
  }
  compiled = (
    jax.jit(take_step, donate_argnums=0).lower(state, batch, 1.0).compile()
  )
  return _Program(init, compiled, config.train.learning_rate)


def _take_steps(program, config, factor) -> tuple[Any, np.ndarray]:
  """Trains; returns the parameters, and the losses, NaN after a divergence."""
  state = program.init(jax.random.key(config.seed))
  losses = np.full(config.train.num_steps, math.nan)
  batches = itertools.islice(_batches(config, 'train'), len(losses))
  for i, batch in enumerate(batches):
    state, metrics = program.take_step(state, batch, factor)
    losses[i] = metrics['loss']
    # The trainer ends such a run.
    if metrics['skipped_in_a_row'] > config.train.max_skipped:
      nan = jax.tree.map(lambda leaf: leaf * math.nan, state.params)
      losses[i:] = math.nan
      return nan, losses
  return state.params, losses


def _repeat(program, batches) -> Callable[[], Any]:
  """Returns a function that goes on training on the same batches."""
  state = program.init(jax.random.key(0))

  def take_steps():
    nonlocal state
    for batch in batches:
      state, metrics = program.take_step(state, batch, 1e-3)
    return metrics

  return take_steps


def _batches(config, split) -> Iterator[Mapping[str, np.ndarray]]:
  for batch in data_lib.make_iterator(config.data, split=split):
    yield {name: batch[name] for name in _ARRAYS}
