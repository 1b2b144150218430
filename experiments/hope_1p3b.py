"""Hope of 1.3 billion parameters on 100 billion tokens.

Command:
  python launch/run.py --config=experiments/hope_1p3b.py \
    --workdir=runs/hope_1p3b --set=data.source=TEXT \
    --set=data.tokenizer=TOKENIZER.model
  python launch/run.py --config=experiments/hope_1p3b.py --mode=describe

Hardware: 256 devices; --set=mesh.data= for another number.
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
    mesh=sharding.MeshConfig(data=64, model=4),
  )
