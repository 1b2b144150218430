"""Hope of 340 million parameters on 15 billion tokens.

Command:
  python launch/run.py --config=experiments/hope_340m.py \
    --workdir=runs/hope_340m --set=data.source=TEXT \
    --set=data.tokenizer=TOKENIZER.model
  python launch/run.py --config=experiments/hope_340m.py --mode=describe

Hardware: meant for 64 devices, runs on any number that its rows divide over.
Result: not trained yet.
"""

from experiments import hope
from nested_learning import sharding
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """The experiment."""
  return hope.make_config(
    'hope_340m',
    learning_rate=1.5e-3,
    num_tokens=15e9,
    mesh=sharding.MeshConfig(data=-1, fsdp=8),
  )
