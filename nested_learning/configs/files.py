"""Experiment files: Python files with `get_config`, loaded by path."""

import importlib.util
import inspect
import os
import pathlib
import sys
import traceback
import types
from typing import Any

from nested_learning import errors
from nested_learning import files
from nested_learning.configs import fields

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parent  # or another folder, if installed from a wheel
_LOOSE = 'experiment_file_'  # before the name of a file outside experiments/
_loaded: set[str] = set()  # names of the modules of files that a user named


def call_get_config(spec: str) -> tuple[types.ModuleType, Any]:
  """Loads an experiment file and calls its `get_config`.

  Args:
    spec: `path/to/experiment.py`, or that and `:arg`. The argument is a string
      for `get_config`; the file's docstring explains it.

  Returns:
    The file's module and what `get_config` returned.

  Raises:
    errors.UserError: If there is no such file, it does not define
      `get_config`, this takes no argument, or it raises.
  """
  path, colon, arg = spec.partition('.py:')
  path = pathlib.Path(path + '.py' if colon else path)
  if path.suffix != '.py':
    raise errors.UserError(
      f'{spec} is neither a Python file nor JSON; name a file such as '
      'experiments/quickstart.py, or the config.json of a run.'
    )
  module = load(path)
  if not callable(getattr(module, 'get_config', None)):
    raise errors.UserError(
      f'{path} does not define get_config(arg=None), which returns the config.'
    )
  if colon and not inspect.signature(module.get_config).parameters:
    raise errors.UserError(f'{path} takes no argument; leave out :{arg}.')
  try:
    if colon:
      return module, module.get_config(arg)
    return module, module.get_config()
  except Exception as error:
    _refuse(error, path)
    raise


def is_experiment(name: str) -> bool:
  """Returns whether a module name is that of an experiment file."""
  return name in _loaded or name.startswith(('experiments.', _LOOSE))


def find(name: str) -> types.ModuleType:
  """Returns the module of the experiment file that a config.json names.

  A config.json is data, perhaps of somebody else, so no file runs because one
  names it, except for the experiments of this checkout. The current folder is
  not searched.

  Args:
    name: Module name, such as `experiments.quickstart`.

  Returns:
    The module of a file that was loaded with `call_get_config` or imported
    before, or of a file in the `experiments` folder beside the package.

  Raises:
    errors.UserError: If it is neither.
  """
  parts = name.split('.')
  is_named = name in _loaded
  if is_named or (parts[0] == 'experiments' and name in sys.modules):
    return sys.modules[name]
  file = _CHECKOUT.joinpath(*parts).with_suffix('.py')
  if (
    parts[0] == 'experiments'
    and all(part.isidentifier() for part in parts)
    and (_CHECKOUT / 'launch' / 'run.py').is_file()
    and os.path.isfile(file)  # False for a name that is too long
  ):
    return load(file)
  raise errors.UserError(
    f'the config was made by {name}, which is not an experiment in '
    f'{_CHECKOUT / "experiments"}. Name its file too, as in '
    f'--config=PATH/{parts[-1].removeprefix(_LOOSE)}.py@runs/a/config.json.'
  )


def load(path: pathlib.Path) -> types.ModuleType:
  """Imports an experiment file by its path, once.

  Args:
    path: The file, which the user named or which is in this checkout.

  Returns:
    Its module.

  Raises:
    errors.UserError: If there is no such file, or it raises.
  """
  resolved = pathlib.Path(os.path.realpath(path))
  name = _module_name(resolved)
  loaded = sys.modules.get(name)
  if getattr(loaded, '__file__', None) == str(resolved):
    return loaded
  if not os.path.isfile(resolved):
    raise errors.UserError(_missing(path))
  spec = importlib.util.spec_from_file_location(name, resolved)
  module = importlib.util.module_from_spec(spec)
  # Dataclasses look up their annotations in the module of this name.
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    del sys.modules[name]
    _refuse(error, path)
    raise
  _loaded.add(name)
  return module


def _module_name(path: pathlib.Path) -> str:
  """Returns `experiments.a.b` for `.../experiments/a/b.py`."""
  folders = [p for p in path.parents if p.name == 'experiments']
  if folders:
    parts = path.with_suffix('').relative_to(folders[-1].parent).parts
    return '.'.join(parts)
  return f'{_LOOSE}{path.stem}'


def _missing(path: pathlib.Path) -> str:
  """Returns the error for a missing file, with the files that exist."""
  folder, shown = path.parent, files.shown
  there = []
  if os.path.isdir(folder):
    there = sorted(p.name for p in folder.glob('*.py'))
  if not there:
    return (
      f'There is no file {shown(path)}, and no Python file in {shown(folder)}.'
    )
  names = ', '.join(there)
  return f'There is no file {shown(path)}; {shown(folder)} has: {names}.'


def _refuse(error: Exception, path: pathlib.Path) -> None:
  """Raises `errors.UserError` that says where in the file a mistake is.

  Returns only if the exception is a bug: of the package, or of another module
  that raised something other than ValueError. A bug keeps its traceback.
  """
  resolved = os.path.realpath(path)
  frames = [
    frame
    for frame in traceback.extract_tb(error.__traceback__)
    if not frame.filename.startswith('<frozen')  # those of importlib
  ]
  lines = [frame.lineno for frame in frames if frame.filename == resolved]
  is_users = isinstance(error, ValueError) or (
    frames[-1].filename in (resolved, __file__)
  )
  if isinstance(error, SyntaxError) and error.filename == resolved:
    lines.append(error.lineno)
  elif misfit := fields.find_misfit(error):
    raise errors.UserError(
      f'{files.shown(path)}{_line(lines)}: {misfit}'
    ) from error
  elif errors.is_bug(error) or not is_users:
    return
  where = f'{files.shown(path)}{_line(lines)}'
  kind = '' if isinstance(error, errors.UserError) else type(error).__name__
  text = ': '.join(filter(None, [kind, errors.first_line(error)]))
  raise errors.UserError(f'{where}: {text}') from error


def _line(lines: list[int]) -> str:
  return f', line {lines[-1]}' if lines else ''
