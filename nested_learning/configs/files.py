"""Experiment files: Python files with `get_config`, loaded by path."""

import importlib.util
import pathlib
import sys
import traceback
import types
from typing import Any

from nested_learning import errors


def call_get_config(spec: str) -> tuple[types.ModuleType, Any]:
  """Loads an experiment file and calls its `get_config`.

  Args:
    spec: `path/to/experiment.py`, or that and `:arg`; the argument is a string
      and what it means is said in the file.

  Returns:
    The file's module and what `get_config` returned.

  Raises:
    errors.UserError: If there is no such file, it does not define
      `get_config`, or it raises.
  """
  path, colon, arg = spec.partition('.py:')
  path = pathlib.Path(path + '.py' if colon else path)
  if path.suffix != '.py':
    raise errors.UserError(
      f'{spec} is neither a Python file nor JSON; name a file such as '
      'experiments/quickstart.py, or the config.json of a run.'
    )
  module = _load(path)
  if not callable(getattr(module, 'get_config', None)):
    raise errors.UserError(
      f'{path} does not define get_config(arg=None), which returns the config.'
    )
  try:
    if colon:
      return module, module.get_config(arg)
    return module, module.get_config()
  except Exception as error:
    _refuse(error, path)
    raise


def find(name: str) -> types.ModuleType:
  """Returns the experiment file that a `config.json` names.

  Args:
    name: Module name, such as `experiments.quickstart`.

  Returns:
    Its module.

  Raises:
    errors.UserError: If it is not loaded yet and there is no such file below
      the working directory or beside the package.
  """
  parts = name.split('.')
  if parts[0] == 'experiments' and all(part.isidentifier() for part in parts):
    if name in sys.modules:
      return sys.modules[name]
    file = pathlib.Path(*parts).with_suffix('.py')
    for root in (pathlib.Path.cwd(), pathlib.Path(__file__).parents[1]):
      if (root / file).is_file():
        return _load(root / file)
  raise errors.UserError(
    f'the config was made by {name}, and there is no such file under '
    f'experiments/ in {pathlib.Path.cwd()}.'
  )


def _load(path: pathlib.Path) -> types.ModuleType:
  """Imports a file by its path, once."""
  resolved = path.resolve()
  name = _module_name(resolved)
  loaded = sys.modules.get(name)
  if getattr(loaded, '__file__', None) == str(resolved):
    return loaded
  if not resolved.is_file():
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
  return module


def _module_name(path: pathlib.Path) -> str:
  """Returns `experiments.a.b` for `.../experiments/a/b.py`."""
  folders = [p for p in path.parents if p.name == 'experiments']
  if folders:
    parts = path.with_suffix('').relative_to(folders[-1].parent).parts
    return '.'.join(parts)
  return f'experiment_file_{path.stem}'


def _missing(path: pathlib.Path) -> str:
  """Says that there is no such file, and which files are there."""
  folder = path.parent
  there = sorted(p.name for p in folder.glob('*.py')) if folder.is_dir() else []
  if not there:
    return f'There is no file {path}, and no Python file in {folder}.'
  return f'There is no file {path}; {folder} has: {", ".join(there)}.'


def _refuse(error: Exception, path: pathlib.Path) -> None:
  """Says in one line where in the file an exception came from.

  Only returns where a module that the file calls raised something that is no
  refusal of a value: a bug, which keeps its traceback.
  """
  resolved = str(path.resolve())
  frames = [
    frame
    for frame in traceback.extract_tb(error.__traceback__)
    if not frame.filename.startswith('<frozen')  # those of importlib
  ]
  lines = [frame.lineno for frame in frames if frame.filename == resolved]
  if isinstance(error, SyntaxError) and error.filename == resolved:
    lines.append(error.lineno)
  elif not isinstance(error, ValueError):
    if frames[-1].filename not in (resolved, __file__):
      return
  where = f'{path}, line {lines[-1]}' if lines else str(path)
  kind = '' if isinstance(error, errors.UserError) else type(error).__name__
  text = ': '.join(filter(None, [kind, str(error).strip().split('\n')[0]]))
  raise errors.UserError(f'{where}: {text}') from error
