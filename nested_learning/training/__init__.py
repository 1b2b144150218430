"""Training: the config of an experiment, the trainer, the modes of a run."""

from nested_learning.training.config import ExperimentConfig
from nested_learning.training.config import TrainConfig
from nested_learning.training.description import describe
from nested_learning.training.inspection import inspect
from nested_learning.training.modes import run
from nested_learning.training.optimizer import decay_mask
from nested_learning.training.optimizer import make_optimizer
from nested_learning.training.optimizer import make_schedule
from nested_learning.training.sharded_step import abstract_state
from nested_learning.training.sharded_step import trace_step
from nested_learning.training.step import make_init
from nested_learning.training.step import make_step
from nested_learning.training.step import TrainState
from nested_learning.training.trainer import fit
from nested_learning.training.trainer import train
