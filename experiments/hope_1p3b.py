"""Hope of 1.3 billion parameters on 100 billion tokens.

Command:
  python launch/run.py --config=experiments/hope_1p3b.py \
    --workdir=runs/hope_1p3b --set=data.source=TEXT \
    --set=data.tokenizer=TOKENIZER.model
  python launch/run.py --config=experiments/hope_1p3b.py --mode=describe
  python launch/run.py --config=experiments/hope_1p3b.py --mode=compile \
    --topology=v5e:16x16 --workdir=runs/hope_1p3b_compiled

Compiling takes three minutes of a core.
Hardware: meant for 256 devices, runs on any number that its rows divide over.
Result: not trained yet.
"""

from experiments import hope
from nested_learning import sharding
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """The experiment."""
  return hope.make_config(
    'hope_1p3b',
    learning_rate=7e-4,
    num_tokens=100e9,
    mesh=sharding.MeshConfig(data=-1, fsdp=8, model=2),
  )
