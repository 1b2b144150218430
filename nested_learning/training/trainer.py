"""The trainer, from the first batch to the last checkpoint."""

from collections.abc import Iterator
import itertools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from nested_learning import data as data_lib
from nested_learning import errors
from nested_learning import evaluation
from nested_learning import models
from nested_learning import sharding
from nested_learning.training import checkpoints
from nested_learning.training import config as config_lib
from nested_learning.training import interrupts
from nested_learning.training import metrics as metrics_lib
from nested_learning.training import optimizer as optimizer_lib
from nested_learning.training import step as step_lib

_BATCH_TYPES = {
  'tokens': np.int32,
  'targets': np.int32,
  'mask': np.bool_,
  'reset': np.bool_,
}


class Outcome(NamedTuple):
  """What training leaves behind.

  Attributes:
    params: The trained parameters.
    evaluation: Of the last step, with memory writes on.
    train_seconds: In steps, over all processes that worked on the run.
    compile_seconds: Tracing and compiling the step.
  """

  params: Any
  evaluation: evaluation.Evaluation
  train_seconds: float
  compile_seconds: float


def train(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> Outcome:
  """Trains from the latest checkpoint in `workdir`, or from the start.

  The run that was interrupted and resumed is the run that was not, bit for bit,
  on the same devices. A checkpoint is written every checkpoint_every steps, at
  every evaluation, at the end, and on SIGTERM and Ctrl-C.

  Args:
    config: The experiment.
    workdir: Where checkpoints and metrics go.

  Returns:
    The trained parameters and how it went.

  Raises:
    errors.UserError: Loss or state is not finite, or the checkpoint is damaged
      or of another model, tokenizer or text. The last good one stays.
    SystemExit: After SIGTERM (code 143) or Ctrl-C (130), once all is saved.
  """
  num_steps = config.train.num_steps
  tokenizer = make_tokenizer(config)
  model = models.make_model(config.model)
  optimizer = optimizer_lib.make_optimizer(config, model.table)
  evaluate = evaluation.make_evaluate(
    model, byte_lengths(config, tokenizer), carry=config.carries_state
  )
  mesh = make_mesh(config)
  batches = make_batches(config, 'train', mesh)
  with (
    interrupts.deferred() as stop,
    jax.set_mesh(mesh),
    checkpoints.open_manager(
      workdir, keep=config.train.keep_checkpoints
    ) as manager,
  ):
    abstract = step_lib.abstract_state(config, model, optimizer, mesh)
    if manager.latest_step() is None:
      start, train_seconds = 0, 0.0
      state = _init(config, model, optimizer, abstract)
    else:
      restored = checkpoints.restore(
        manager,
        _items(abstract),
        config=config,
        tokenizer_fingerprint=tokenizer.fingerprint,
      )
      start, train_seconds = restored.step, restored.manifest['train_seconds']
      state = step_lib.TrainState(**{'stream': None, **restored.state})
      batches.set_state(restored.data)
    if start > num_steps:
      raise errors.UserError(
        f'{workdir} holds a checkpoint of step {start}, past train.num_steps='
        f'{num_steps}; raise it or use another --workdir.'
      )
    compile_start = time.perf_counter()
    train_step = _compile(config, model, optimizer, abstract, mesh)
    compile_seconds = time.perf_counter() - compile_start

    evaluated = None  # the evaluation of the state as it stands
    with (
      checkpoints.explain_divergence(manager),
      metrics_lib.RunLog(
        workdir, config, start=start, train_seconds=train_seconds
      ) as log,
    ):
      if start:
        log.say(f'Going on from step {start} in {workdir}.')
      if mesh.size < jax.device_count():
        log.say(
          f'Using {mesh.size} of {jax.device_count()} devices: '
          f'{config.micro_batch_size} rows (data.batch_size over '
          'train.accumulate) divide over no more.'
        )
      for step in range(start + 1, num_steps + 1):
        state, metrics = train_step(state, put(next(batches), mesh))
        log.defer(step, metrics)
        evaluated = None
        stopping = stop.requested()
        evaluating = (
          step == num_steps or step % config.train.evaluate_every == 0
        )
        saving = evaluating or step % config.train.checkpoint_every == 0
        if not (stopping or saving):
          continue

        log.flush()
        if evaluating and not stopping:
          try:
            evaluated = evaluate(
              state.params,
              interrupts.until(stop, validation_batches(config, mesh)),
            )
            log.write_evaluation(step, evaluated)
          except interrupts.Interrupted:
            stopping = True
        checkpoints.save(
          manager,
          step,
          _items(state),
          data=batches.get_state(),
          config=config,
          tokenizer_fingerprint=tokenizer.fingerprint,
          train_seconds=log.train_seconds,
          bits_per_byte=evaluated.bits_per_byte if evaluated else None,
        )
        if stopping:
          manager.wait_until_finished()
          log.say(
            f'{stop.signal.name}: saved step {step} in {workdir}; run the same '
            'command again to go on from there.'
          )
          raise SystemExit(128 + stop.signal)
        log.resume_clock()
    if evaluated is None:  # there was no step left to take
      with interrupts.ending(trained_message(config, workdir)):
        evaluated = evaluate(state.params, validation_batches(config, mesh))
  if stop.requested():
    interrupts.end(stop.signal, trained_message(config, workdir))
  return Outcome(state.params, evaluated, log.train_seconds, compile_seconds)


def trained_message(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> str:
  """What a run says that is ended after its last step."""
  return (
    f'the last step, {config.train.num_steps}, is saved in {workdir}; run the '
    'same command again for the evaluation and the report.'
  )


def make_mesh(config: config_lib.ExperimentConfig) -> Any:
  """The mesh of an experiment on the devices there are."""
  return sharding.make_mesh(config.mesh, num_rows=config.micro_batch_size)


def make_tokenizer(config: config_lib.ExperimentConfig) -> data_lib.Tokenizer:
  """The tokenizer of an experiment, if the model has room for its tokens."""
  tokenizer = data_lib.make_tokenizer(config.data.tokenizer)
  if tokenizer.vocab_size > config.model.vocab_size:
    raise errors.UserError(
      f'data.tokenizer={config.data.tokenizer!r} has {tokenizer.vocab_size} '
      f'tokens, more than model.vocab_size={config.model.vocab_size}; set '
      f'model.vocab_size to at least {tokenizer.vocab_size}.'
    )
  return tokenizer


def byte_lengths(
  config: config_lib.ExperimentConfig, tokenizer: data_lib.Tokenizer
) -> np.ndarray:
  """Bytes of each token of the model, int32 [v]; 0 for unused ones."""
  unused = config.model.vocab_size - tokenizer.vocab_size
  return np.pad(tokenizer.byte_lengths, (0, unused))


def make_batches(
  config: config_lib.ExperimentConfig, split: str, mesh: Any
) -> data_lib.Batches:
  """This process's rows of every batch of a split."""
  index, count = sharding.process_slice(mesh)
  return data_lib.make_iterator(
    config.data, split=split, process_index=index, process_count=count
  )


def validation_batches(
  config: config_lib.ExperimentConfig, mesh: Any
) -> Iterator[dict[str, jax.Array]]:
  """The first batches of the validation split, always the same, on the mesh."""
  batches = make_batches(config, 'validation', mesh)
  for batch in itertools.islice(batches, config.evaluation.num_batches):
    yield put(batch, mesh)


def put(batch: dict[str, np.ndarray], mesh: Any) -> dict[str, jax.Array]:
  """Puts a process's rows of a batch on the devices that work on them."""
  rows = sharding.batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(rows, batch[name])
    for name in _BATCH_TYPES
  }


def _init(config, model, optimizer, abstract):
  """The state at step 0, every part made where it will stay."""
  init = step_lib.make_init(config, model, optimizer)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed))


def _compile(config, model, optimizer, abstract, mesh):
  """The step as an executable, which no later call can recompile."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  rows = sharding.batch_sharding(mesh)
  step = jax.jit(
    step_lib.make_step(config, model, optimizer),
    in_shardings=(shardings, rows),
    out_shardings=(shardings, sharding.replicated(mesh)),
    donate_argnums=0,
  )
  shape = (config.data.batch_size, config.data.sequence_length)
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
    for name, dtype in _BATCH_TYPES.items()
  }
  return step.lower(abstract, batch).compile()


def _items(state: step_lib.TrainState) -> dict[str, Any]:
  """The parts of a state that a checkpoint keeps under their own names."""
  return {k: v for k, v in state._asdict().items() if v is not None}
