"""Configs from experiment files and from the `config.json` of a run."""

import dataclasses
import pathlib
import types
from typing import Any, NamedTuple

from nested_learning import errors
from nested_learning.configs import files
from nested_learning.configs import serialization


class Experiment(NamedTuple):
  """A config and how to run it.

  Attributes:
    config: The config, a frozen dataclass.
    run: The file's own `run(config, workdir, mode)`; None for the trainer.
    module: Name of the file's module if it has its own `run`, otherwise None.
  """

  config: Any
  run: Any
  module: str | None


def load(spec: str) -> Any:
  """Reads a config; `load_experiment` returns its `run` as well.

  Args:
    spec: `path/to/experiment.py`, the same with `:arg` for `get_config(arg)`,
      or the `config.json` of a run. If a file outside of this checkout's
      experiments made it, `path/to/experiment.py@path/to/config.json`.

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
  if not spec.endswith('.json'):
    module, config = files.call_get_config(spec)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
      raise errors.UserError(
        f'{spec}: get_config returned {type(config).__name__} '
        f'{config!r}; return a frozen dataclass.'
      )
  else:
    file, at, path = spec.rpartition('.py@')
    if at:  # a file of the user defines the classes of the config
      files.load(pathlib.Path(file + '.py'))
    module, config = _read_json(path)
  run = getattr(module, 'run', None)
  return Experiment(config, run, module.__name__ if run else None)


def _read_json(path: str) -> tuple[types.ModuleType | None, Any]:
  """Reads the config.json of a run, and the module with its `run`."""
  try:
    with open(path, encoding='utf-8') as file:
      text = file.read()
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise errors.UserError(f'Cannot read {path}: {reason}.') from error
  try:
    config = serialization.from_json(text)
    name = serialization.decode(text).get(serialization.RUN_KEY)
    return files.find(name) if name else None, config
  except errors.UserError as error:
    raise errors.UserError(f'{path}: {error}') from error
