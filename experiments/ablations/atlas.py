"""Atlas without its parts: window, polynomials, orthogonal steps, MLP.

Command:
  python launch/sweep.py --config=experiments/ablations/atlas.py \
    --workdir=runs/atlas --seeds=3

Hardware: two CPU cores, a few minutes for each of the 18 runs.
Result: not run to its end yet.

The paper (arXiv:2505.23735) prints perplexity / accuracy in per cent of models
of 760M parameters:

  Atlas               19.97 / 52.77
  without Muon        19.65 / 52.56
  window of one token 21.98 / 49.26
  without polynomials 22.14 / 50.57
  linear memory       21.03
"""

import dataclasses

from experiments.ablations import small
from launch import sweeps
from nested_learning import models
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """Returns the experiment."""
  config = small.make_config('atlas')
  size = models.zoo.Size(
    num_layers=config.model.num_layers,
    embed_dim=config.model.embed_dim,
    num_heads=config.model.mixer.num_heads,
    mlp_dim=1,  # the chain stays as it is
  )
  mixer = models.zoo.FAMILIES['atlas'].mixer(size)
  model = dataclasses.replace(config.model, mixer=mixer)
  return dataclasses.replace(config, model=model)


def get_sweep() -> sweeps.Sweep:
  """Returns Atlas without each part, and OmegaNet, which has no trace."""
  mixer = 'model.mixer'
  # Plain steps of a window need the bounds that `models.zoo` gives OmegaNet.
  omega = models.zoo.FAMILIES['omeganet'].mixer(models.zoo.SIZES['tiny'])
  gradient = (
    f'{mixer}.extension.step=gradient',
    f'{mixer}.max_inner_lr={omega.max_inner_lr}',
    f'{mixer}.max_norm={omega.max_norm}',
  )
  return sweeps.Sweep(
    rows=(
      sweeps.Row('atlas', printed='19.97 / 52.77'),
      sweeps.Row('no_muon', gradient, printed='19.65 / 52.56'),
      sweeps.Row(
        'window_1', (f'{mixer}.extension.window=1',), printed='21.98 / 49.26'
      ),
      sweeps.Row(
        'no_polynomial', (f'{mixer}.features=l2',), printed='22.14 / 50.57'
      ),
      sweeps.Row('matrix', (f'{mixer}.kind=matrix',), printed='21.03'),
      sweeps.Row('omeganet', (*gradient, f'{mixer}.momentum=false')),
    ),
    metrics=small.METRICS,
    printed='the paper: perplexity / accuracy',
  )
