"""Measures what each part of Hope gives on text, beside other models.

Command:
  python launch/sweep.py --config=experiments/ablations/hope.py --seeds=3 \
    --workdir=runs/hope --results=experiments/results/ablations/hope

Hardware: two CPU cores, three to six minutes of one of them for each run.
Results: experiments/results/ablations/hope/README.md.

Every row is a model of two layers and width 128, trained as in
`experiments/quickstart.py`: the same bytes, batches, steps and optimiser. The
width of the MLPs gives every model the same number of parameters within 3 per
cent. Bits per byte are those of 262,144 held-out tokens, 27 files: on the
quickstart's 16,384, which are of two, seeds differ three to seven times as
much. Rates of the grid are tried with seed 0, from the largest down until the
best one has no neighbour that was not tried; the best one gets all seeds.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from experiments import quickstart
from launch import sweeps
from nested_learning import errors
from nested_learning import evaluation
from nested_learning import models
from nested_learning import parameters
from nested_learning import training
from nested_learning.layers import memory_mixer

METRICS = (
  'bits_per_byte',
  'bits_per_byte_writes_off',
  'late_gain_bits_per_token',
  'tokens_per_second',
)
_NUM_PARAMS = 562_000
_NUM_BATCHES = 128  # of evaluation, 2,048 tokens each
_HEADS, _HEAD_DIM = 4, 32
_SIZE = models.zoo.Size(2, 128, _HEADS, mlp_dim=384, vocab_size=257)

# Hope's memory at this size; a row changes some of these.
_HOPE = {'hidden_dim': 64, 'adaptive': (), 'target': 'value'}
# Memories that make keys, values or rates share the target with the main one.
_OWN = {'target': 'own'}
_ALL = ('k', 'v', 'inner_lr', 'retention')

# Changes of the memory by row; the first is Hope.
_MEMORIES: Mapping[str, Mapping[str, Any]] = {
  'hope': {},
  'adaptive': {**_OWN, 'adaptive': _ALL},
  'adaptive_k': {**_OWN, 'adaptive': ('k',)},
  'adaptive_v': {**_OWN, 'adaptive': ('v',)},
  'adaptive_k_q': {**_OWN, 'adaptive': ('k', 'q')},
  'adaptive_inner_lr': {**_OWN, 'adaptive': ('inner_lr',)},
  'adaptive_retention': {**_OWN, 'adaptive': ('retention',)},
  'adaptive_slow': {**_OWN, 'adaptive': _ALL, 'chunk_size_others': 512},
  'matrix': {'kind': 'matrix'},
  'hidden_32': {'hidden_dim': 32},
  'hidden_128': {'hidden_dim': 128},
  'target_own': _OWN,
  'output_map': {'output': 'map'},
  'every_map': {'learns': 'every_map', 'erase': 'every_map'},
  'writes_every_map': {'learns': 'every_map'},
  'retain_to_zero': {'retain_to': 'zero'},
  'no_erase': {'erase': 'none', 'max_inner_lr': 0.5},
  'l2': {'objective': 'l2'},
  'momentum': {'momentum': True},
  'read_chunk': {'read': 'chunk', 'chunk_size': 16},
  'chunk_16': {'chunk_size': 16},
  'chunk_256': {'chunk_size': 256},
  'heads_2': {'num_heads': 2, 'head_dim': 64, 'hidden_dim': 128},
  'heads_8': {'num_heads': 8, 'head_dim': 16, 'hidden_dim': 32},
}
_CHAIN = ('fast', 'middle', 'slow')
_OTHERS = (
  'gated_deltanet',
  'titans',
  'transformer',
  'convolved_transformer',
)


def get_config(arg: str | None = None) -> training.ExperimentConfig:
  """Returns the experiment of one row; Hope is the default."""
  name = arg or 'hope'
  levels = ('mlp',)
  if name in _OTHERS:
    mixer = models.zoo.make_sized(name, _SIZE).mixer
  elif name == 'gated_deltanet_levels_3':
    levels = _CHAIN
    mixer = models.zoo.make_sized('gated_deltanet', _SIZE).mixer
  elif name == 'printed':
    levels, mixer = _CHAIN, models.zoo.make_sized('hope_printed', _SIZE).mixer
  elif name == 'levels_3':
    levels, mixer = _CHAIN, _memory({})
  elif name in _MEMORIES:
    mixer = _memory(_MEMORIES[name])
  else:
    raise errors.UserError(
      f'{name!r} is no row; there are {", ".join(_names())}.'
    )
  config = quickstart.get_config()
  model = dataclasses.replace(config.model, mixer=mixer)
  train = dataclasses.replace(
    config.train, evaluate_every=config.train.num_steps
  )
  return dataclasses.replace(
    config,
    name='hope',
    model=fit(model, levels, _NUM_PARAMS),
    train=train,
    evaluation=evaluation.EvaluationConfig(num_batches=_NUM_BATCHES),
  )


def get_sweep() -> sweeps.Sweep:
  """Returns the rows."""
  return sweeps.Sweep(
    rows=tuple(sweeps.Row(name, arg=name) for name in _names()),
    metrics=METRICS,
    tune='train.learning_rate=1e-3,2e-3,4e-3,8e-3',
    descends=True,
  )


def fit(
  model: models.ModelConfig, levels: tuple[str, ...], num_params: int
) -> models.ModelConfig:
  """Gives a model levels of a width at which it has so many parameters.

  Args:
    model: A model; its levels are replaced.
    levels: Names of the new levels, which share the width.
    num_params: Number of parameters, which may be missed by half a unit of the
      width of each level.

  Returns:
    The config.
  """

  def make(width):
    chain = tuple(models.LevelConfig(name, width) for name in levels)
    return dataclasses.replace(model, levels=chain)

  count = lambda width: parameters.count(models.make_model(make(width)).table)
  unit = count(2) - count(1)
  return make(max(1, 1 + round((num_params - count(1)) / unit)))


def _names() -> tuple[str, ...]:
  chains = 'levels_3', 'printed', 'gated_deltanet_levels_3'
  return (*_MEMORIES, *chains, *_OTHERS)


def _memory(changes: Mapping[str, Any]) -> memory_mixer.MemoryMixerConfig:
  sizes = {'num_heads': _HEADS, 'head_dim': _HEAD_DIM}
  return memory_mixer.MemoryMixerConfig(**{**sizes, **_HOPE, **changes})
