"""Hope without its parts, one at a time: Table 6 of the paper at a small size.

Command:
  python launch/sweep.py --config=experiments/ablations/components.py \
    --workdir=runs/abl --seeds=3 \
    --results=experiments/results/ablations/components

Hardware: two CPU cores, a minute or two for each of the 27 runs.
Results: experiments/results/ablations/README.md.

The paper (arXiv:2512.24695, Table 6) has perplexity / accuracy in per cent, one
run each; its first row is the mean of Table 2 at 1.3B parameters:

  Hope                 12.24 / 58.1
  without DGD          13.41 / 56.5
  without momentum     13.58 / 56.9
  without weight decay 13.71 / 57.2   (retention, in this package)
  without CMS          13.04 / 57.3
  static k             13.77 / 56.9
  static v             13.90 / 55.1
  static q             12.19 / 57.4

Two rows are reversed, because Hope in this package starts without two parts of
the paper's. `with_momentum` adds the momentum that the paper's row removes; no
equation of its section 8 has one, and here it is Titans' trace. `adaptive_q`
makes the query a memory, which Table 6 removes although section 8 calls q the
only projection without one. So `hope` is the paper's row without momentum and
with static q, which its table does not have. `no_dgd` descends on the L2
objective at rates where that is stable; `as_printed` has the mixer of the zoo's
`hope_printed`, equations 83-97.
"""

import dataclasses

from experiments.ablations import small
from launch import sweeps
from nested_learning import errors
from nested_learning import models
from nested_learning import training


def get_config(arg: str | None = None) -> training.ExperimentConfig:
  """Returns the experiment.

  Args:
    arg: 'no_cms' replaces the chain by one MLP, 'as_printed' the mixer by that
      of the zoo's `hope_printed`.
  """
  if arg not in (None, 'no_cms', 'as_printed'):
    raise errors.UserError(
      f"{arg!r} must be 'no_cms' or 'as_printed', or left out."
    )
  num_levels = 1 if arg == 'no_cms' else 2
  config = small.make_config('components', num_levels=num_levels)
  if arg != 'as_printed':
    return config
  mixer = config.model.mixer
  size = models.zoo.Size(
    num_layers=config.model.num_layers,
    embed_dim=mixer.num_heads * mixer.head_dim,
    num_heads=mixer.num_heads,
    mlp_dim=1,
  )
  printed = models.zoo.FAMILIES['hope_printed'].mixer(size)
  model = dataclasses.replace(config.model, mixer=printed)
  return dataclasses.replace(config, model=model)


def get_sweep() -> sweeps.Sweep:
  """Returns the rows of Table 6."""
  adaptive = 'model.mixer.adaptive'
  return sweeps.Sweep(
    rows=(
      sweeps.Row('hope', printed='12.24 / 58.1'),
      sweeps.Row(
        'no_dgd',
        (
          'model.mixer.learns=every_map',
          'model.mixer.erase=none',
          'model.mixer.objective=l2',
          'model.mixer.max_inner_lr=0.5',
        ),
        printed='13.41 / 56.5',
      ),
      sweeps.Row(
        'with_momentum',
        ('model.mixer.momentum=true',),
        printed='12.24 / 58.1; 13.58 / 56.9 without',
      ),
      sweeps.Row(
        'no_retention',
        (f'{adaptive}=k,v,inner_lr', 'model.mixer.retention=none'),
        printed='13.71 / 57.2',
      ),
      sweeps.Row('as_printed', arg='as_printed'),
      sweeps.Row('no_cms', arg='no_cms', printed='13.04 / 57.3'),
      sweeps.Row(
        'static_k',
        (f'{adaptive}=v,inner_lr,retention',),
        printed='13.77 / 56.9',
      ),
      sweeps.Row(
        'static_v',
        (f'{adaptive}=k,inner_lr,retention',),
        printed='13.90 / 55.1',
      ),
      sweeps.Row(
        'adaptive_q',
        (f'{adaptive}=k,v,q,inner_lr,retention',),
        printed='12.24 / 58.1; 12.19 / 57.4 static',
      ),
    ),
    metrics=small.METRICS,
    printed='the paper: perplexity / accuracy',
  )
