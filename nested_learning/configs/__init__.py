"""Configs: trees of frozen dataclasses, read from files, changed by field.

A config class lives beside the code that reads it; this package knows none of
them and goes by their fields' annotations alone: bool, int, float, str, None,
Literal, tuple, dataclasses, and unions of these.
"""

from nested_learning.configs.experiments import Experiment as Experiment
from nested_learning.configs.experiments import load as load
from nested_learning.configs.experiments import (
  load_experiment as load_experiment,
)
from nested_learning.configs.overrides import override as override
from nested_learning.configs.serialization import differences as differences
from nested_learning.configs.serialization import from_json as from_json
from nested_learning.configs.serialization import to_json as to_json
