"""Hope without its parts, one at a time: the paper's Table 6 at a small size.

Command:
  python launch/sweep.py --config=experiments/ablations/components.py \
    --workdir=runs/abl --seeds=3 \
    --results=experiments/results/ablations/components

Hardware: two CPU cores, a minute or two for each of the 27 runs.
Result: experiments/results/ablations/components/README.md. Bits per byte, three
seeds: hope 2.817 (spread 0.016), no_dgd 3.328, no_retention 2.868, as_printed
2.859, static_v 2.827, static_k 2.821, with_momentum 2.816, adaptive_q 2.817,
no_cms 2.781. DGD and retention are worth more than the spread, in the paper's
direction. Which of k, v and q is a memory, and momentum, are not, at this size.
no_cms turns the paper's order round; most of that, by one seed of `levels.py`,
is the slow level's clock, by which it takes 100 steps where the others take
200.

The paper (arXiv:2512.24695, Table 6) prints perplexity / accuracy in per cent,
of one run each; its first row is the mean of Table 2's at 1.3B parameters:

  Hope                 12.24 / 58.1
  without DGD          13.41 / 56.5
  without momentum     13.58 / 56.9
  without weight decay 13.71 / 57.2   (retention, in this code's words)
  without CMS          13.04 / 57.3
  static k             13.77 / 56.9
  static v             13.90 / 55.1
  static q             12.19 / 57.4

Two rows are turned round, because the Hope of this package starts without two
parts of the paper's: `with_momentum` adds what the paper's row takes away (no
equation of its section 8 has one; here it is Titans' trace), and `adaptive_q`
makes the query a memory (its section 8 calls q the only projection that is
none, its Table 6 takes that memory away). So `hope` is the paper's row without
momentum and with static q, and without an equal in its table. `no_dgd` descends
on the L2 objective, as the memories without it do, at rates where that is
stable; `as_printed` is equation 93: L2 and the delta rule on every map.
"""

from experiments.ablations import small
from launch import sweeps
from nested_learning import errors
from nested_learning import training


def get_config(arg: str | None = None) -> training.ExperimentConfig:
  """The experiment; `arg` 'no_cms' puts one ordinary MLP for the chain."""
  if arg not in (None, 'no_cms'):
    raise errors.UserError(f"{arg!r} must be 'no_cms' or left out.")
  return small.make_config('components', num_levels=1 if arg else 2)


def get_sweep() -> sweeps.Sweep:
  """The rows of Table 6."""
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
      sweeps.Row(
        'as_printed',
        (
          'model.mixer.learns=every_map',
          'model.mixer.erase=every_map',
          'model.mixer.objective=l2',
          'model.mixer.max_inner_lr=0.5',
        ),
      ),
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
