"""Configs from experiment files and from the `config.json` of a run."""

import dataclasses
from typing import Any, NamedTuple

from nested_learning import errors
from nested_learning.configs import files
from nested_learning.configs import serialization


class Experiment(NamedTuple):
  """A config and how to run it.

  Attributes:
    config: The config, a frozen dataclass.
    run: The file's own `run(config, workdir, mode)`, or None for the trainer.
    module: Name of the file's module where it has its own `run`, or None.
  """

  config: Any
  run: Any
  module: str | None


def load(spec: str) -> Any:
  """Reads a config; `load_experiment` returns its `run` as well.

  Args:
    spec: `path/to/experiment.py`, the same with `:arg` for `get_config(arg)`,
      or the `config.json` of a run.

  Returns:
    The config, a frozen dataclass.

  Raises:
    errors.UserError: If the file cannot be read or does not make a config.
  """
  return load_experiment(spec).config


def load_experiment(spec: str) -> Experiment:
  """Reads a config and the experiment's own `run`, if it has one.

  Args:
    spec: As for `load`.

  Returns:
    The config, its `run` function or None, and the module of that function.

  Raises:
    errors.UserError: If the file cannot be read or does not make a config.
  """
  if spec.endswith('.json'):
    try:
      with open(spec, encoding='utf-8') as file:
        text = file.read()
    except (OSError, UnicodeDecodeError) as error:
      raise errors.UserError(f'Cannot read {spec}: {error}.') from error
    try:
      data = serialization.decode(text)
      config = serialization.from_json(text)
    except errors.UserError as error:
      raise errors.UserError(f'{spec}: {error}') from error
    name = data.get(serialization.RUN_KEY)
    module = files.find(name) if name else None
  else:
    module, config = files.call_get_config(spec)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
      raise errors.UserError(
        f'{spec}: get_config returned {type(config).__name__} '
        f'{config!r}; return a frozen dataclass.'
      )
  run = getattr(module, 'run', None)
  return Experiment(config, run, module.__name__ if run else None)
