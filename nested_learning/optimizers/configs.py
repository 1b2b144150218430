"""Configs of optimisers: one class per rule, chosen by a plain name.

    config = configs.override(config, ['train.optimizer=m3'])

Fields are the arguments of the optax transformation, under its names. A rate, a
schedule and weight decay come from whoever calls `make`.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, ClassVar, Literal

import optax

from nested_learning import errors
from nested_learning.optimizers import delta_gradient_descent
from nested_learning.optimizers import momentum as momentum_lib
from nested_learning.optimizers import multi_scale_muon
from nested_learning.optimizers import network_momentum

# Adam divides by the root of the second moment, which has no derivative at a
# gradient of zero. This is too small to change the bits of an update.
_EPS_ROOT = 1e-37


def _check_decays(config: Any, *names: str) -> None:
  for name in names:
    fine = 0 <= getattr(config, name) < 1
    errors.check_field(config, name, fine, 'at least 0 and below 1')


def _check_not_negative(config: Any, *names: str) -> None:
  for name in names:
    fine = 0 <= getattr(config, name) < math.inf
    errors.check_field(config, name, fine, 'finite and at least 0')


def _check_counts(config: Any, *names: str) -> None:
  for name in names:
    errors.check_field(config, name, getattr(config, name) >= 1, 'at least 1')


def _check_rms(config: Any) -> None:
  rms = config.consistent_rms
  fine = rms is None or 0 < rms < math.inf
  errors.check_field(config, 'consistent_rms', fine, 'above 0, or None')


@dataclasses.dataclass(frozen=True)
class Sgd:
  """Gradient descent with momentum; see `optax.sgd`."""

  NAME: ClassVar[str] = 'sgd'

  momentum: float = 0.0  # fraction of the momentum kept per step

  def __post_init__(self):
    _check_decays(self, 'momentum')


@dataclasses.dataclass(frozen=True)
class AdamW:
  """Adam with decoupled weight decay; see `optax.adamw`."""

  NAME: ClassVar[str] = 'adamw'

  b1: float = 0.9
  # 0.95 rather than 0.999: the usual choice for language models, whose
  # gradients change in size faster than 0.999 forgets.
  b2: float = 0.95
  eps: float = 1e-8
  eps_root: float = _EPS_ROOT  # added before the root is taken

  def __post_init__(self):
    _check_decays(self, 'b1', 'b2')
    _check_not_negative(self, 'eps', 'eps_root')


@dataclasses.dataclass(frozen=True)
class AdEMAMix:
  """Adam with a second, slow momentum; see `optax.contrib.ademamix`.

  References:
    Pagliardini et al., arXiv:2409.03137, 2024.
  """

  NAME: ClassVar[str] = 'ademamix'

  b1: float = 0.9
  b2: float = 0.95  # the paper's is 0.999; 0.95 as for `AdamW`
  b3: float = 0.999  # of the slow momentum; the paper's 0.9999 is for long runs
  alpha: float = 5.0  # weight of the slow momentum
  eps: float = 1e-8
  eps_root: float = _EPS_ROOT

  def __post_init__(self):
    _check_decays(self, 'b1', 'b2', 'b3')
    _check_not_negative(self, 'alpha', 'eps', 'eps_root')


@dataclasses.dataclass(frozen=True)
class Muon:
  """Orthogonalised momentum; see `optax.contrib.muon`.

  Parameters that are no matrices get Adam.

  References:
    Jordan et al., 2024; Liu et al., arXiv:2502.16982, 2025 (consistent_rms).
  """

  NAME: ClassVar[str] = 'muon'

  beta: float = 0.95
  nesterov: bool = True  # of Adam's momentum, too
  ns_steps: int = 5  # of Newton-Schulz
  # RMS of an update at a learning rate of 1. With 0.2, rates of AdamW fit; None
  # scales by the root of fan_out / fan_in instead, if that is above 1.
  consistent_rms: float | None = 0.2
  mu_dtype: Literal['float32', 'bfloat16'] | None = None  # None: as parameters
  adam_b1: float = 0.9
  adam_b2: float = 0.95

  def __post_init__(self):
    errors.check_choices(self)
    _check_decays(self, 'beta', 'adam_b1', 'adam_b2')
    _check_counts(self, 'ns_steps')
    _check_rms(self)


@dataclasses.dataclass(frozen=True)
class M3:
  """Multi-scale Momentum Muon; see `optimizers.m3`."""

  NAME: ClassVar[str] = 'm3'

  beta: float = 0.95  # decay of the fast momentum
  slow_every: int | None = 16  # steps; None has no slow momentum
  slow_weight: float = 0.5
  slow_decay: float = 0.9  # of the slow momentum, per update of it
  second_decay: float | None = 0.95  # of the second moment; None: without it
  nesterov: bool = True  # of Adam's momentum, too
  ns_steps: int = 5  # of Newton-Schulz
  consistent_rms: float | None = 0.2  # as for `Muon`
  # None: float32, or the parameters' type if it is wider.
  mu_dtype: Literal['float32', 'bfloat16'] | None = None
  adam_b1: float = 0.9
  adam_b2: float = 0.95

  def __post_init__(self):
    errors.check_choices(self)
    _check_decays(self, 'beta', 'slow_decay', 'adam_b1', 'adam_b2')
    _check_counts(self, 'ns_steps')
    _check_not_negative(self, 'slow_weight')
    if self.second_decay is not None:
      _check_decays(self, 'second_decay')
    if self.slow_every is not None:
      _check_counts(self, 'slow_every')
    _check_rms(self)


@dataclasses.dataclass(frozen=True)
class Dgd:
  """Delta Gradient Descent; see `optimizers.dgd`.

  The gradients must come from `optimizers.value_and_delta_grad`. Parameters
  that multiply no data get `fallback`.
  """

  NAME: ClassVar[str] = 'dgd'

  # 'corrected' trains; 'printed' is the paper's, which erases outputs as well.
  target: Literal['corrected', 'printed'] = 'corrected'
  erase: float = 1.0  # weight of the erasing term of target 'printed'
  fallback: AdamW = AdamW()
  # Learning rate of the fallback over that of the maps. Lower it for learning
  # rates near 1, which suit maps: Adam's steps have the size of the rate.
  fallback_scale: float = 1.0

  def __post_init__(self):
    errors.check_choices(self)
    _check_not_negative(self, 'erase', 'fallback_scale')
    fine = self.target == 'printed' or self.erase == 1
    errors.check_field(self, 'erase', fine, "1 unless target='printed'")


@dataclasses.dataclass(frozen=True)
class DeltaMomentum:
  """Momentum that erases before it stores; see `optimizers.delta_momentum`."""

  NAME: ClassVar[str] = 'delta_momentum'

  form: Literal['stable', 'paper'] = 'stable'
  decay: float = 0.9
  erase: float = 0.2

  def __post_init__(self):
    errors.check_choices(self)
    _check_decays(self, 'decay')
    fine = 0 <= self.erase <= 1 + self.decay
    rule = f'at least 0, and at most 1 + decay = {1 + self.decay}'
    errors.check_field(self, 'erase', fine, rule)


@dataclasses.dataclass(frozen=True)
class PreconditionedMomentum:
  """Momentum of preconditioned gradients.

  See `optimizers.preconditioned_momentum`.
  """

  NAME: ClassVar[str] = 'preconditioned_momentum'

  form: Literal['stable', 'paper'] = 'stable'
  decay: float = 0.9
  preconditioner_decay: float = 0.99

  def __post_init__(self):
    errors.check_choices(self)
    _check_decays(self, 'decay', 'preconditioner_decay')


@dataclasses.dataclass(frozen=True)
class DeepMomentum:
  """Momentum in a small network; see `optimizers.deep_momentum`.

  Parameters that are no matrices get `fallback`.
  """

  NAME: ClassVar[str] = 'deep_momentum'

  form: Literal['stable', 'paper'] = 'stable'
  decay: float = 0.9
  state_ratio: float | None = None  # size of state over parameters; None: 1/2
  inner_steps: int = 1
  fallback: AdamW = AdamW()

  def __post_init__(self):
    errors.check_choices(self)
    _check_decays(self, 'decay')
    if self.state_ratio is not None:
      _check_not_negative(self, 'state_ratio')
    _check_counts(self, 'inner_steps')


OptimizerConfig = (
  Sgd
  | AdamW
  | AdEMAMix
  | Muon
  | M3
  | Dgd
  | DeltaMomentum
  | PreconditionedMomentum
  | DeepMomentum
)


def make(
  config: OptimizerConfig,
  learning_rate: optax.ScalarOrSchedule,
  *,
  weight_decay: float = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  dimension_numbers: Any | Callable[[Any], Any] | None = None,
  maps: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Makes the optax transformation of a config.

  Args:
    config: The rule and its settings.
    learning_rate: Step size, a scalar or an optax schedule (per step).
    weight_decay: Share of a parameter that a step subtracts, times the learning
      rate; decoupled from the gradient for every rule.
    mask: Tree of bools that marks the parameters that decay, or a function from
      the parameters to one. None: all.
    dimension_numbers: Tree of `optax.contrib.MuonDimensionNumbers`, None where
      a parameter is no map, or a function from the parameters to one; see
      `optimizers.dimension_numbers`. For `M3`, `Muon`, `DeltaMomentum` and
      `DeepMomentum`.
    maps: For `Dgd`: tree of bools that marks the parameters with captured
      inputs, or a function from the parameters to one; see `optimizers.dgd`.

  Returns:
    An optax gradient transformation. That of `Dgd` takes the extra arguments
    of `optimizers.value_and_delta_grad`.

  Raises:
    TypeError: If config is none of these classes.
  """
  if isinstance(config, AdamW):
    return _make_adamw(config, learning_rate, weight_decay, mask)
  rule = _make_rule(config, learning_rate, dimension_numbers, maps)
  if not weight_decay:
    return optax.with_extra_args_support(rule)

  def decay(count):
    rate = learning_rate(count) if callable(learning_rate) else learning_rate
    return -rate * weight_decay

  # After the rule, since some rules apply the rate themselves.
  return optax.chain(rule, optax.add_decayed_weights(decay, mask))


def _make_rule(config, learning_rate, dimension_numbers, maps):
  """Makes a rule without weight decay."""
  match config:
    case Sgd():
      return optax.sgd(learning_rate, momentum=config.momentum or None)
    case AdEMAMix():
      return optax.contrib.ademamix(learning_rate, **dataclasses.asdict(config))
    case Muon():
      return optax.contrib.muon(
        learning_rate,
        adam_eps_root=_EPS_ROOT,
        muon_weight_dimension_numbers=dimension_numbers,
        **dataclasses.asdict(config),
      )
    case M3():
      return multi_scale_muon.m3(
        learning_rate,
        adam_eps_root=_EPS_ROOT,
        dimension_numbers=dimension_numbers,
        **dataclasses.asdict(config),
      )
    case Dgd():
      return delta_gradient_descent.dgd(
        learning_rate,
        target=config.target,
        erase=config.erase,
        maps=maps,
        fallback=_make_adamw(
          config.fallback,
          _scale(learning_rate, config.fallback_scale),
          0.0,
          None,
        ),
      )
    case DeltaMomentum():
      return momentum_lib.delta_momentum(
        learning_rate,
        dimension_numbers=dimension_numbers,
        **dataclasses.asdict(config),
      )
    case PreconditionedMomentum():
      return momentum_lib.preconditioned_momentum(
        learning_rate, **dataclasses.asdict(config)
      )
    case DeepMomentum():
      settings = dataclasses.asdict(config)
      settings['fallback'] = _make_adamw(
        config.fallback, learning_rate, 0.0, None
      )
      return network_momentum.deep_momentum(
        learning_rate, dimension_numbers=dimension_numbers, **settings
      )
  raise TypeError(
    f'{config!r} is no config of an optimiser; use one of '
    f'{", ".join(sorted(kind.__name__ for kind in OptimizerConfig.__args__))}.'
  )


def _scale(learning_rate, factor: float):
  if callable(learning_rate):
    return lambda count: factor * learning_rate(count)
  return factor * learning_rate


def _make_adamw(config: AdamW, learning_rate, weight_decay, mask):
  return optax.adamw(
    learning_rate,
    **dataclasses.asdict(config),
    weight_decay=weight_decay,
    mask=mask,
  )
