"""Trains a model, from the first batch to the last checkpoint."""

from collections.abc import Callable, Iterable, Mapping
import math
import pathlib
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
import optax
import tqdm

from nested_learning import data as data_lib
from nested_learning import errors
from nested_learning import evaluation
from nested_learning import models
from nested_learning import sharding
from nested_learning.training import checkpoint_restore
from nested_learning.training import checkpoints
from nested_learning.training import config as config_lib
from nested_learning.training import goodput
from nested_learning.training import guard as guard_lib
from nested_learning.training import interrupts
from nested_learning.training import make_workload
from nested_learning.training import metrics as metrics_lib
from nested_learning.training import optimizer as optimizer_lib
from nested_learning.training import pretrained_runs
from nested_learning.training import profiling
from nested_learning.training import sharded_step
from nested_learning.training import step as step_lib
from nested_learning.training import trainable
from nested_learning.training import workload as workload_lib


class Outcome(NamedTuple):
  """The result of training.

  Attributes:
    params: The trained parameters.
    evaluation: Evaluation after the last step, with memory writes on; None
      without validation data.
    seconds: Wall time by part, of all processes that worked on the run, see
      `goodput.PARTS`.
    compile_seconds: Time to trace and compile the step, of this process.
    chips: The chips that were used.
  """

  params: Any
  evaluation: workload_lib.EvaluationResult | None
  seconds: dict[str, float]
  compile_seconds: float
  chips: goodput.Chips

  @property
  def train_seconds(self) -> float:
    """Time in steps that count, with the waiting for their batches."""
    return self.seconds['steps'] + self.seconds['input']


def train(
  config: config_lib.ExperimentConfig,
  workdir: pathlib.Path,
  workload: workload_lib.Workload | None = None,
  *,
  profile: profiling.Steps | None = None,
) -> Outcome:
  """Trains from the latest checkpoint in `workdir`, or from the start.

  A run that is interrupted and resumed equals the uninterrupted run bit for
  bit, on the same devices. A checkpoint is written every checkpoint_every
  steps, before every evaluation, at the end, and when a signal arrives.

  Args:
    config: The experiment.
    workdir: Folder for checkpoints and metrics.
    workload: The experiment's, if it is there already.
    profile: Steps to profile, into the folder 'profile' of the workdir.

  Returns:
    The trained parameters, their evaluation and times.

  Raises:
    errors.UserError: More steps in a row than train.max_skipped had a loss or a
      gradient that is not finite or a spike; the state or the validation loss
      is not finite; the checkpoint is of another model, tokenizer or text, or
      all are damaged; or the disk is full. The last good checkpoint stays.
    SystemExit: After a signal, with 128 plus its number, once all is saved.
  """
  ledger = goodput.Ledger()
  if profile is not None:
    profiling.check(profile, config.train.num_steps)
  workload = workload or make_workload.make_workload(config)
  mesh = make_mesh(config)
  optimizer = optimizer_lib.make_optimizer(config, workload.model.table)
  batches = workload_lib.make_batches(workload, 'train', mesh)
  evaluate = _make_evaluate(config, workload, mesh)
  with (
    interrupts.deferred() as stop,
    jax.set_mesh(mesh),
    checkpoints.open_manager(
      workdir, keep=config.train.keep_checkpoints
    ) as manager,
    checkpoints.explain_divergence(manager),
  ):
    abstract = sharded_step.abstract_state(
      config, workload.model, optimizer, mesh
    )
    start, state, train_seconds = _restore_or_init(
      config, workload, optimizer, mesh, abstract, manager, batches
    )
    base_fingerprint = trainable.fingerprint(state.frozen)
    lines = metrics_lib.read_metrics(workdir / 'metrics.jsonl')
    ledger.resume(lines, start=start, train_seconds=train_seconds)
    take_step, compile_seconds = _compile(
      config, workload, optimizer, mesh, ledger
    )
    chips = goodput.find_chips(config, workload, mesh)
    with (
      metrics_lib.RunLog(
        workdir, config, start=start, ledger=ledger, chips=chips
      ) as log,
      profiling.Profiler(profile, workdir, log, start=start) as profiler,
    ):
      _say_start(log, config, workdir, start, mesh)
      run = _Run(
        config,
        workdir,
        workload,
        mesh,
        batches,
        evaluate,
        manager,
        log,
        profiler,
        stop,
        base_fingerprint,
      )
      state, evaluated = _take_steps(run, take_step, state, start)
    if evaluated is None and evaluate is not None:  # no step was left to take
      with interrupts.ending(trained_message(config, workdir)):
        evaluated = evaluate(state.all_params, config.train.num_steps, None)
  if stop.requested():
    interrupts.end(stop.signal, trained_message(config, workdir))
  return Outcome(
    state.all_params, evaluated, ledger.seconds, compile_seconds, chips
  )


class _Run(NamedTuple):
  """The open parts of a run."""

  config: config_lib.ExperimentConfig
  workdir: pathlib.Path
  workload: workload_lib.Workload
  mesh: jax.sharding.Mesh
  batches: data_lib.Batches
  evaluate: Callable[..., workload_lib.EvaluationResult] | None
  manager: checkpoints.Manager
  log: metrics_lib.RunLog
  profiler: profiling.Profiler
  stop: interrupts.Stop
  base_fingerprint: str


def _take_steps(run: _Run, take_step, state, start: int):
  """Takes all steps from `start` on, with logs, saves and evaluations.

  Returns:
    The last state and its evaluation; None if it was evaluated before.
  """
  train, log = run.config.train, run.log
  evaluated = None
  if _evaluates(train, start) and start not in run.manager.scores:
    # The evaluation was interrupted, after the checkpoint had been written.
    evaluated = _evaluate(run, start, state)
    log.ledger.enter('steps')
  for step in range(start + 1, train.num_steps + 1):
    batch = log.await_batch(
      lambda: workload_lib.put(next(run.batches), run.mesh)
    )
    with run.profiler.step(step):
      state, metrics = take_step(state, batch)
    log.defer(step, metrics)
    run.profiler.finish(step, metrics)
    evaluated = None
    stopping = run.stop.requested()
    if not (stopping or _saves(train, step)):
      continue
    log.flush()
    log.ledger.enter('checkpoints')
    checkpoints.save(
      run.manager,
      step,
      _items(state),
      data=run.batches.get_state(),
      config=run.config,
      tokenizer_fingerprint=run.workload.fingerprint,
      base_fingerprint=run.base_fingerprint,
      train_seconds=log.ledger.train_seconds,
    )
    log.write_ledger()
    if stopping:
      _end(run, step)
    if _evaluates(train, step):
      evaluated = _evaluate(run, step, state)
    log.ledger.enter('steps')
  return state, evaluated


def _evaluate(run: _Run, step: int, state) -> Any:
  """Evaluates a state that is saved; ends the run if a signal arrives."""
  if run.evaluate is None:
    return None
  run.log.ledger.enter('evaluation')
  try:
    evaluated = run.evaluate(state.all_params, step, run.stop)
  except interrupts.Interrupted:
    _end(run, step)
  run.log.write_evaluation(step, evaluated)
  checkpoints.record_score(run.manager, step, evaluated.score)
  return evaluated


def _end(run: _Run, step: int) -> NoReturn:
  """Ends the process after a signal, once the checkpoint is written."""
  checkpoints.wait(run.manager)
  run.log.say(
    f'{run.stop.signal.name}: saved step {step} in {run.workdir}; run the same '
    'command again to go on from there.'
  )
  raise SystemExit(128 + run.stop.signal)


def fit(
  model: models.Model,
  optimizer: optax.GradientTransformation,
  batches: Iterable[Mapping[str, np.ndarray]],
  num_steps: int,
  *,
  token_loss: Callable[..., jax.Array] = evaluation.cross_entropy,
  seed: int = 0,
  name: str = 'training',
) -> tuple[Any, np.ndarray]:
  """Trains a small model in memory, with the trainer's step but without files.

  Args:
    model: The model.
    optimizer: Its optimiser.
    batches: Batches as of `step.make_update`.
    num_steps: Number of steps.
    token_loss: `token_loss(outputs, targets)` is the loss [b, t].
    seed: Seed of the initial parameters.
    name: Label of the progress bar.

  Returns:
    The parameters, and the loss of every step [step].
  """
  take = step_lib.make_update(model, optimizer, token_loss)
  take = jax.jit(take, donate_argnums=0)

  def init(key):
    params = model.init_params(key)
    opt_state = optimizer.init(params)
    return step_lib.TrainState(params, opt_state, None, guard_lib.init_guard())

  state = jax.jit(init)(jax.random.key(seed))
  losses = []
  bar = tqdm.trange(num_steps, desc=name)
  for _, batch in zip(bar, batches, strict=False):
    state, metrics = take(state, dict(batch))
    losses.append(float(metrics['loss']))
    bar.set_postfix(loss=f'{np.mean(losses[-20:]):.3f}', refresh=False)
  return state.params, np.array(losses)


def _evaluates(train: config_lib.TrainConfig, step: int) -> bool:
  if step == 0:
    return False
  return step == train.num_steps or step % train.evaluate_every == 0


def _saves(train: config_lib.TrainConfig, step: int) -> bool:
  return _evaluates(train, step) or step % train.checkpoint_every == 0


def _make_evaluate(config, workload, mesh) -> Callable[..., Any] | None:
  """Makes `evaluate(params, step, stop)`; None without validation data.

  The first batch is made here, so that a fault of the data is found before the
  first step.
  """
  if not config.has_validation:
    return None
  next(iter(workload_lib.make_batches(workload, 'validation', mesh)))

  def evaluate(params, step, stop):
    batches = workload_lib.validation_batches(
      workload, config.evaluation.num_batches, mesh
    )
    if stop is not None:
      batches = interrupts.until(stop, batches)
    evaluated = workload.evaluate(params, batches)
    for name in (workload.watched[0], 'loss'):
      value = evaluated.numbers.get(name, 0.0)
      if not math.isfinite(value):
        raise FloatingPointError(f'validation/{name} is {value} at step {step}')
    return evaluated

  return evaluate


def _restore_or_init(
  config, workload, optimizer, mesh, abstract, manager, batches
):
  """Returns the steps done, the state and the seconds of training so far."""
  if manager.latest_step() is None:
    init = step_lib.make_init(config, workload.model, optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    # Under jit every part is made where it will stay.
    init = jax.jit(init, out_shardings=shardings, donate_argnums=1)
    base = pretrained_runs.load_base(config, workload.model.table, mesh)
    return 0, init(jax.random.key(config.seed), base), 0.0
  frozen = pretrained_runs.load_frozen(config, workload.model, mesh)
  restored = checkpoint_restore.restore(
    manager,
    _items(abstract),
    config=config,
    tokenizer_fingerprint=workload.fingerprint,
    base_fingerprint=trainable.fingerprint(frozen),
  )
  if restored.step > config.train.num_steps:
    raise errors.UserError(
      f'{manager.directory} holds a checkpoint of step {restored.step}, past '
      f'train.num_steps={config.train.num_steps}; raise it or use another '
      '--workdir.'
    )
  batches.set_state(restored.data)
  state = {'stream': None, 'frozen': frozen, **restored.state}
  state = step_lib.TrainState(**state)
  return restored.step, state, restored.manifest['train_seconds']


def _compile(
  config, workload, optimizer, mesh, ledger: goodput.Ledger
) -> tuple[Any, float]:
  """Compiles the step; returns an executable, which cannot recompile."""
  ledger.enter('compile')
  begin = ledger.clock()
  traced = sharded_step.trace_step(config, workload, optimizer, mesh)
  return traced.lower().compile(), ledger.clock() - begin


def _say_start(log, config, workdir, start, mesh) -> None:
  if start:
    log.say(f'Going on from step {start} in {workdir}.')
  if not config.has_validation:
    log.say('No validation data (data.validation_fraction=0): no evaluations.')
  if mesh.size < jax.device_count():
    log.say(
      f'Using {mesh.size} of {jax.device_count()} devices: '
      f'{config.micro_batch_size} rows (data.batch_size over '
      'train.accumulate) divide over no more.'
    )


def trained_message(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> str:
  """Returns the message of a run that is ended after its last step."""
  return (
    f'the last step, {config.train.num_steps}, is saved in {workdir}; run the '
    'same command again for the evaluation and the report.'
  )


def make_mesh(config: config_lib.ExperimentConfig) -> jax.sharding.Mesh:
  """Makes the mesh of an experiment on the devices that there are."""
  return sharding.make_mesh(config.mesh, num_rows=config.micro_batch_size)


def _items(state: step_lib.TrainState) -> dict[str, Any]:
  """Returns the parts of a state that a checkpoint keeps, by name."""
  parts = state._asdict().items()
  return {k: v for k, v in parts if v is not None and k != 'frozen'}
