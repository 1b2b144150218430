"""The trainer, from the first batch to the last checkpoint."""

import pathlib
import time
from typing import Any, NamedTuple

import jax

from nested_learning import errors
from nested_learning import sharding
from nested_learning.training import checkpoints
from nested_learning.training import config as config_lib
from nested_learning.training import feeding
from nested_learning.training import interrupts
from nested_learning.training import metrics as metrics_lib
from nested_learning.training import optimizer as optimizer_lib
from nested_learning.training import step as step_lib
from nested_learning.training import subject as subject_lib
from nested_learning.training import subjects


class Outcome(NamedTuple):
  """What training leaves behind.

  Attributes:
    params: The trained parameters.
    evaluation: Of the last step, with memory writes on.
    train_seconds: In steps, over all processes that worked on the run.
    compile_seconds: Tracing and compiling the step.
  """

  params: Any
  evaluation: subject_lib.Evaluated
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
    errors.UserError: More steps in a row than train.max_skipped had a loss or a
      gradient that is not finite or a spike; the state is not finite; or the
      checkpoint is of another model, tokenizer or text, or all are damaged. The
      last good one stays.
    SystemExit: After SIGTERM (code 143) or Ctrl-C (130), once all is saved.
  """
  num_steps = config.train.num_steps
  num_batches = config.evaluation.num_batches
  subject = subjects.make_subject(config)
  model = subject.model
  optimizer = optimizer_lib.make_optimizer(config, model.table)
  mesh = make_mesh(config)
  batches = feeding.make_batches(subject, 'train', mesh)
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
        tokenizer_fingerprint=subject.fingerprint,
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
    train_step = (  # an executable, which no later call can recompile
      step_lib.trace_step(
        config,
        model,
        optimizer,
        mesh,
        row=subject.row,
        token_loss=subject.token_loss,
      )
      .lower()
      .compile()
    )
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
        state, metrics = train_step(state, feeding.put(next(batches), mesh))
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
            looks = feeding.validation_batches(subject, num_batches, mesh)
            evaluated = subject.evaluate(
              state.params, interrupts.until(stop, looks)
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
          tokenizer_fingerprint=subject.fingerprint,
          train_seconds=log.train_seconds,
          score=evaluated.score if evaluated else None,
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
        looks = feeding.validation_batches(subject, num_batches, mesh)
        evaluated = subject.evaluate(state.params, looks)
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


def _init(config, model, optimizer, abstract):
  """The state at step 0, every part made where it will stay."""
  init = step_lib.make_init(config, model, optimizer)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed))


def _items(state: step_lib.TrainState) -> dict[str, Any]:
  """The parts of a state that a checkpoint keeps under their own names."""
  return {k: v for k, v in state._asdict().items() if v is not None}
