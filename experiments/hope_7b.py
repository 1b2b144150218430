"""Hope of 7 billion parameters on 140 billion tokens.

No paper has this size. Width, depth and heads go on where those of 1.3B stop;
tokens are 20 per parameter.

Command:
  python launch/run.py --config=experiments/hope_7b.py \
    --workdir=runs/hope_7b --set=data.source=TEXT \
    --set=data.tokenizer=TOKENIZER.model
  python launch/run.py --config=experiments/hope_7b.py --mode=compile \
    --topology=v5p:4x4x8 --workdir=runs/hope_7b_compiled

Hardware: meant for 128 devices, runs on any number that its rows divide over.
Result: not trained yet.
"""

from experiments import hope
from nested_learning import sharding
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """The experiment."""
  return hope.make_config(
    'hope_7b',
    learning_rate=3e-4,
    num_tokens=140e9,
    mesh=sharding.MeshConfig(data=-1, fsdp=32),
  )
