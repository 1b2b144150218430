"""Configs: trees of frozen dataclasses, read from files, changed by field.

A config class lives beside the code that reads it. This package knows none of
them and reads only the annotations of their fields: bool, int, float, str,
None, Literal, tuple, dataclasses, and unions of these.

`ml_collections.config_flags` was considered instead. It checks the type of one
leaf at a time, while these configs are validated as a whole after all changes,
and it lacks a choice between config classes (`model.mixer=MemoryMixerConfig`),
entries of tuples by index, and JSON that is read back into the same classes.
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
from nested_learning.configs.serialization import TYPE_KEY as TYPE_KEY
