"""Hope of 70 billion parameters on 1.4 trillion tokens.

No paper has this size. Width, depth and heads go on where those of 7B stop;
tokens are 20 per parameter.

Command:
  python launch/run.py --config=experiments/hope_70b.py \
    --workdir=runs/hope_70b --set=data.source=TEXT \
    --set=data.tokenizer=TOKENIZER.model
  python launch/run.py --config=experiments/hope_70b.py --mode=describe
  python launch/run.py --config=experiments/hope_70b.py --mode=compile \
    --topology=v5p:8x8x16 --workdir=runs/hope_70b_compiled

Hardware: meant for 1,024 devices, one row to eight of them; runs on any number
that its rows divide over.
Result: described, not compiled and not trained yet.
"""

from experiments import hope
from nested_learning import sharding
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """The experiment."""
  return hope.make_config(
    'hope_70b',
    learning_rate=1.5e-4,
    num_tokens=1.4e12,
    mesh=sharding.MeshConfig(data=-1, fsdp=128, model=8),
  )
