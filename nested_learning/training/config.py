"""The config of an experiment."""

import dataclasses
import math
from typing import Any

from nested_learning import data as data_lib
from nested_learning import errors
from nested_learning import evaluation as evaluation_lib
from nested_learning import inference
from nested_learning import levels
from nested_learning import models
from nested_learning import optimizers
from nested_learning import sharding
from nested_learning import tasks


def _check(config: Any, name: str, passed: bool, rule: str) -> None:
  if not passed:
    raise errors.UserError(
      f'train.{name}={getattr(config, name)} must be {rule}.'
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Length of training, optimiser and checkpoints."""

  num_steps: int = 1000  # optimiser steps, one global batch each
  # Parameters that are trained where the run has a base: 'all', or 'memory',
  # 'levels', 'lora' and patterns over paths (blocks/*/norm), joined by '+'.
  trainable: str = 'all'
  lora_rank: int = 8  # of changes of attention's matrices, with 'lora'
  # Of all parameters but those of levels that name another.
  optimizer: optimizers.OptimizerConfig = optimizers.configs.AdamW()
  learning_rate: float = 1e-3  # peak
  warmup_steps: int = 50  # steps of linear rise to the peak
  final_fraction: float = 0.1  # of the peak, where the cosine ends
  weight_decay: float = 0.1  # of matrices, times the learning rate, per update
  clip_norm: float = 1.0  # largest norm of the gradient of all parameters
  # Steps with a loss or gradient that is not finite are skipped, and so are
  # gradients longer than spike_factor times their running mean; None: of any
  # length.
  spike_factor: float | None = None
  max_skipped: int = 10  # steps skipped in a row; one more ends the run
  accumulate: int = 1  # micro-batches of a batch, one after the other
  log_every: int = 10  # steps between two lines of metrics
  evaluate_every: int = 200  # steps between two evaluations
  checkpoint_every: int = 200  # steps between two checkpoints
  keep_checkpoints: int = 2  # latest ones, in addition to the best one

  def __post_init__(self):
    fine = isinstance(self.optimizer, optimizers.OptimizerConfig)
    _check(self, 'optimizer', fine, 'a config of nested_learning.optimizers')
    for name in (
      'num_steps',
      'accumulate',
      'log_every',
      'evaluate_every',
      'checkpoint_every',
      'keep_checkpoints',
      'lora_rank',
    ):
      _check(self, name, getattr(self, name) >= 1, 'at least 1')
    for name in ('learning_rate', 'clip_norm'):
      value = getattr(self, name)
      _check(self, name, 0 < value < math.inf, 'above 0 and finite')
    finite = math.isfinite(self.weight_decay)
    _check(self, 'weight_decay', finite, 'at least 0 and finite')
    for name in ('warmup_steps', 'weight_decay', 'max_skipped'):
      _check(self, name, getattr(self, name) >= 0, 'at least 0')
    above_one = self.spike_factor is None or 1 < self.spike_factor < math.inf
    _check(self, 'spike_factor', above_one, 'above 1, or none')
    in_unit = 0 <= self.final_fraction <= 1
    _check(self, 'final_fraction', in_unit, 'between 0 and 1')


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """All settings of a run, except for the machine."""

  name: str
  model: models.ModelConfig
  data: data_lib.DataConfig | tasks.TaskDataConfig
  train: TrainConfig = TrainConfig()
  evaluation: evaluation_lib.EvaluationConfig = (
    evaluation_lib.EvaluationConfig()
  )
  generate: inference.GenerateConfig = inference.GenerateConfig()
  mesh: sharding.MeshConfig = sharding.MeshConfig()
  # How levels learn inside every row, in training and evaluation.
  inner: levels.InnerConfig = levels.InnerConfig()
  session: inference.SessionConfig = inference.SessionConfig()
  seed: int = 0  # of the initial parameters
  # Folder of pretrained weights that parameters begin with; see
  # launch/import.py. None begins with random ones.
  base: str | None = None

  def __post_init__(self):
    # Keys are made of 32 bits; JAX drops others in silence.
    errors.check_field(
      self, 'seed', 0 <= self.seed < 2**32, 'at least 0 and below 2^32'
    )
    _check_trainable(self)
    _check_rows(self)
    _check_levels(self)
    _check_context(self)
    _check_stream(self)

  @property
  def batch_tokens(self) -> int:
    """Tokens of one optimiser step, over all devices."""
    return self.data.batch_size * self.data.sequence_length

  @property
  def micro_batch_size(self) -> int:
    """Rows of one micro-batch, over all devices."""
    return self.data.batch_size // self.train.accumulate

  @property
  def rules(self) -> dict[str, optimizers.OptimizerConfig]:
    """Optimiser of every level, by name; 'base' is the rest of the model."""
    default = self.train.optimizer
    rules = {'base': default}
    for level in self.model.levels:
      rules[level.name] = level.optimizer or default
    return rules

  def rule_field(self, name: str) -> str:
    """Returns the path of the field with the optimiser of a level."""
    names = [level.name for level in self.model.levels]
    if name not in names:
      return 'train.optimizer'
    return f'model.levels.{names.index(name)}.optimizer'

  @property
  def head(self) -> models.Head:
    """Inputs and outputs of the model."""
    match getattr(self.data, 'task', None):
      case tasks.RegressionConfig(num_dims=num_dims):
        return models.RegressionHead(num_dims)
      case tasks.CompressionConfig():
        return models.CompressionHead()
    return models.LanguageHead()

  @property
  def stream_tokens(self) -> int:
    """Tokens of each stream of text that is evaluated; 0 if none is read."""
    # Tokens that lie on several devices cannot go on where others stopped.
    reads = self.has_validation and self.mesh.context == 1
    return self.evaluation.stream_tokens if reads else 0

  @property
  def stream_inner(self) -> levels.InnerConfig:
    """How levels learn on streams that are evaluated; off if none can."""
    for given in (self.evaluation.inner, self.inner):
      if given.is_on:
        return given
    default = self.default_inner
    fits = default.is_on and min(default.update_every) <= self.model.max_length
    return default if fits else levels.InnerConfig()

  @property
  def default_inner(self) -> levels.InnerConfig:
    """How levels learn in sessions and on streams where nothing says how."""
    if self.base is None:
      return inference.default_inner(self.model)
    # The default, SGD with a rate of 1, ruins a pretrained model in ten steps.
    return levels.make_inner(
      tuple(256 * 4**i for i in range(len(self.model.levels))),
      learning_rate=3e-4,
      optimizer=optimizers.configs.AdamW(),
    )

  @property
  def has_validation(self) -> bool:
    """Whether any data is held out to evaluate on."""
    return getattr(self.data, 'has_validation', True)

  @property
  def carries_state(self) -> bool:
    """Whether each row continues that row of the batch before."""
    return self.data.carries_state


def _check_trainable(config: ExperimentConfig) -> None:
  """Checks that frozen parameters come from somewhere."""
  trainable = config.train.trainable
  if trainable == 'all':
    return
  if config.base is None:
    raise errors.UserError(
      f'train.trainable={trainable!r} freezes the others, which are random '
      'where base=None; set base to a pretrained model, or train all.'
    )
  for name, rule in config.rules.items():
    if isinstance(rule, optimizers.configs.Dgd):
      raise errors.UserError(
        f'{config.rule_field(name)}=dgd needs the inputs of all matrices, and '
        f'train.trainable={trainable!r} freezes some; set it to adamw.'
      )


def _check_rows(config: ExperimentConfig) -> None:
  """Checks that rows fit the model and divide into micro-batches."""
  num_tokens, max_length = config.data.sequence_length, config.model.max_length
  if num_tokens > max_length:
    raise errors.UserError(
      f'data.sequence_length={num_tokens} is longer than model.max_length='
      f'{max_length}; lower the one or raise the other.'
    )
  if config.data.batch_size % config.train.accumulate:
    raise errors.UserError(
      f'data.batch_size={config.data.batch_size} is not a multiple of '
      f'train.accumulate={config.train.accumulate}; choose a divisor.'
    )


def _check_levels(config: ExperimentConfig) -> None:
  """Checks that the clocks of levels fit steps and rows."""
  for level in config.model.levels:
    every = level.train_every
    if every is not None and every % config.batch_tokens:
      above = -(-every // config.batch_tokens) * config.batch_tokens
      raise errors.UserError(
        f'level {level.name!r} has train_every={every}, which is '
        f'not a multiple of the {config.batch_tokens} tokens of a step '
        '(data.batch_size x data.sequence_length); set it to '
        f'{above}, or to None for an update at every step.'
      )
  names = [level.name for level in config.model.levels]
  if config.inner.is_on:
    size = levels.segment_size(levels.make_levels(config.inner, names))
    if config.data.sequence_length % size:
      raise errors.UserError(
        f'data.sequence_length={config.data.sequence_length} is not a multiple '
        f'of the {size} tokens of a segment of inner.levels with update_every='
        f'{config.inner.update_every}; change the one or the other.'
      )
  inner = config.evaluation.inner
  if inner.is_on:
    size = levels.segment_size(levels.make_levels(inner, names))
    if size > config.model.max_length:
      raise errors.UserError(
        f'a segment of {size} tokens (evaluation.inner.levels with '
        f'update_every={inner.update_every}) is longer than model.max_length='
        f'{config.model.max_length}; lower the one or raise the other.'
      )


def _check_stream(config: ExperimentConfig) -> None:
  """Checks that attention has room for a stream that never resets."""
  limit = models.max_stream_length(config.model)
  if config.carries_state and limit is not None:
    longest = config.data.stream_tokens
    if config.data.reset == 'never':
      longest = config.data.sequence_length * max(
        config.train.num_steps, config.evaluation.num_batches
      )
    if longest > limit:
      raise errors.UserError(
        f'data.reset={config.data.reset!r} makes a stream of {longest} tokens '
        f'per row, but attention holds model.max_length={limit}; use '
        "data.reset='document' or a mixer with a state of constant size."
      )


def _check_context(config: ExperimentConfig) -> None:
  """Checks that the tokens of a row can be shared among devices.

  Raises:
    errors.UserError: Tokens do not divide over the mesh axis 'context', or only
      in the middle of chunks; or a row cannot begin in its middle.
  """
  context, num_tokens = config.mesh.context, config.data.sequence_length
  if context == 1:
    return
  if config.inner.is_on:
    raise errors.UserError(
      f'levels that learn inside a row (inner.levels with update_every='
      f'{config.inner.update_every}) read it in one piece; set mesh.context='
      f'{context} to 1.'
    )
  if config.carries_state:
    raise errors.UserError(
      f'with data.reset={config.data.reset!r} a row begins where another '
      f'stopped, which mesh.context={context} cannot share among devices; set '
      "it to 1, or use data.reset='document'."
    )
  for mixer in config.model.pattern:
    together = mixer.granularity
    if num_tokens % (context * together):
      of_chunks = '' if together == 1 else f' chunks of {together} tokens on'
      raise errors.UserError(
        f'data.sequence_length={num_tokens} does not divide into{of_chunks} '
        f'mesh.context={context} devices; set it to a multiple of '
        f'{context * together}, or change mesh.context.'
      )
