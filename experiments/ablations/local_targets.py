"""Errors of an MLP memory: from its output, or each map's own.

Command:
  python launch/sweep.py --config=experiments/ablations/local_targets.py \
    --workdir=runs/local_targets --seeds=3

Hardware: two CPU cores, a few minutes for each of the 9 runs.
Result: not run to its end yet.

DeltaTTT prints, for 0.54B parameters, a loss of 1.950 where DeltaNet has 1.955.
"""

import dataclasses

from experiments.ablations import small
from launch import sweeps
from nested_learning import models
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """Returns the experiment."""
  config = small.make_config('local_targets')
  size = models.zoo.Size(
    num_layers=config.model.num_layers,
    embed_dim=config.model.embed_dim,
    num_heads=config.model.mixer.num_heads,
    mlp_dim=1,  # the chain stays as it is
  )
  mixer = models.zoo.FAMILIES['deltattt'].mixer(size)
  model = dataclasses.replace(config.model, mixer=mixer)
  return dataclasses.replace(config, model=model)


def get_sweep() -> sweeps.Sweep:
  """Returns local errors, errors of the output, and a single map."""
  propagated = 'model.mixer.extension=none'
  return sweeps.Sweep(
    rows=(
      sweeps.Row('local', printed='1.950'),
      sweeps.Row('propagated', (propagated,)),
      sweeps.Row(
        'matrix',
        (propagated, 'model.mixer.kind=matrix'),
        printed='1.955',
      ),
    ),
    metrics=small.METRICS,
    printed='the paper: loss',
  )
