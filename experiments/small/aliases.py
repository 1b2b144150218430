"""Does training find what self-modification can do? Names behind aliases.

`experiments/aliases.py` sets one layer by hand: a memory that writes towards
its own output, and memories that make keys, values and queries, follow aliases
where a delta rule does not. Here one layer is trained on such rows: names get
values, then aliases, and the values of the aliases are asked for. Evaluation is
of the aliases, and of the last ones in chains of three, which training does not
have ("2x").

Command:
  python launch/sweep.py --config=experiments/small/aliases.py --seeds=3 \
    --workdir=runs/aliases_trained \
    --results=experiments/results/aliases_trained

Hardware: one CPU core, two to six minutes for each run.
Results: experiments/results/aliases_trained/README.md.

All rows have the same rows of data, steps and optimiser, and the same number of
parameters within 3 per cent. The rates of the grid are tried as in
`experiments/ablations/hope.py`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from experiments import tasks as experiment
from experiments.ablations import hope as ablation
from launch import sweeps
from nested_learning import errors
from nested_learning import training

_NUM_PARAMS = 66_400
_OWN = {'target': 'own'}
_ROLES = {
  'own_targets': (),
  'own_targets_k': ('k',),
  'own_targets_q': ('q',),
  'own_targets_k_v_q': ('k', 'v', 'q'),
}
# Family and changes of its memory, by row.
_ROWS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
  'hope': ('hope', {}),
  **{
    name: ('hope', {**_OWN, 'adaptive': roles})
    for name, roles in _ROLES.items()
  },
  'gated_deltanet': ('gated_deltanet', {}),
  'convolved_transformer': ('convolved_transformer', {}),
}


def get_config(arg: str | None = None) -> training.ExperimentConfig:
  """Returns the experiment of one row; Hope is the default."""
  name = arg or 'hope'
  if name not in _ROWS:
    raise errors.UserError(f'{name!r} is no row; there are {", ".join(_ROWS)}.')
  family, changes = _ROWS[name]
  config = experiment.get_config(f'{family},aliases_small')
  mixer = dataclasses.replace(config.model.mixer, **changes)
  model = dataclasses.replace(config.model, num_layers=1, mixer=mixer)
  levels = tuple(level.name for level in model.levels)
  return dataclasses.replace(
    config,
    name='aliases',
    model=ablation.fit(model, levels, _NUM_PARAMS),
    data=dataclasses.replace(config.data, longer=(2,)),
    train=dataclasses.replace(
      config.train, num_steps=2000, evaluate_every=500, checkpoint_every=500
    ),
  )


def get_sweep() -> sweeps.Sweep:
  """Returns the rows."""
  return sweeps.Sweep(
    rows=tuple(sweeps.Row(name, arg=name) for name in _ROWS),
    metrics=('accuracy:max', 'accuracy_2x', 'train_seconds'),
    tune='train.learning_rate=2e-3,4e-3,8e-3',
    descends=True,
  )
