"""Runs an experiment.

    python launch/run.py --config=experiments/quickstart.py --workdir=runs/q
    python launch/run.py --workdir=runs/q --mode=generate --prompt='def main('
    python launch/run.py --config=runs/q/config.json --workdir=runs/again

The same command again resumes an interrupted run. Exits with 0 when the run is
done, with 2 and one line on stderr when a flag, a config or a file is wrong.
"""

import os
import pathlib
import sys
import tempfile
import traceback

from absl import app
from absl import flags
from absl import logging

_ROOT = pathlib.Path(__file__).resolve().parents[1]
if str(_ROOT) not in sys.path:
  sys.path.insert(0, str(_ROOT))  # A checkout runs without being installed.

# JAX is imported with the config: --help and a wrong flag are answered at once.
from nested_learning import configs  # noqa: E402
from nested_learning import errors  # noqa: E402

_CONFIG = flags.DEFINE_string(
  'config',
  None,
  'Experiment file, optionally with an argument (experiments/x.py:arg), or the '
  'config.json of a run. May be left out where --workdir holds a run.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder that the run writes to, and resumes from.'
)
_SET = flags.DEFINE_multi_string(
  'set', [], 'A field to change, as in --set=train.num_steps=50. Repeatable.'
)
_MODE = flags.DEFINE_enum(
  'mode',
  'train',
  ['train', 'eval', 'generate', 'describe'],
  'train; eval or generate from the last checkpoint in --workdir; or describe '
  'the model and what it costs, without training.',
)
_PROMPT = flags.DEFINE_string(
  'prompt', None, 'Short for --set=generate.prompt=...'
)


def main() -> None:
  """Parses the flags and runs."""
  app.run(_main, flags_parser=_parse_flags)


def _main(argv: list[str]) -> None:
  try:
    if len(argv) > 1:
      raise errors.UserError(
        f'Unexpected argument {argv[1]!r}; flags begin with --, as in '
        '--config=experiments/quickstart.py.'
      )
    sys.exit(_run())
  except KeyboardInterrupt:
    # A training step catches this itself, saves and says how to resume.
    _print_error('interrupted.')
    sys.exit(130)
  except ValueError as error:
    if not _is_ours(error):
      raise
    _print_error(error)
    if logging.level_debug():
      traceback.print_exception(error)
    sys.exit(2)


def _run() -> int | None:
  """Loads the config, checks the workdir and hands over to the run."""
  workdir = pathlib.Path(_WORKDIR.value) if _WORKDIR.value else None
  mode = _MODE.value
  if workdir is None and mode != 'describe':
    raise errors.UserError(
      f'--mode={mode} needs a folder for the run: --workdir=runs/NAME.'
    )
  experiment = _load(workdir)
  config, run = experiment.config, experiment.run
  if workdir is not None and _holds_run(workdir):
    # Without --config, what --set changes is meant to differ from the run.
    if mode == 'train' or _CONFIG.value is not None:
      _check_same_run(config, workdir, mode)
    if mode == 'train' and (workdir / 'summary.json').is_file():
      print(  # The summary is what a run writes last of all.
        f'{workdir} holds this run, finished: see {workdir}/report.md. To run '
        'it again, use another --workdir.'
      )
      return 0
  elif mode == 'train':
    _write_config(config, experiment.module, workdir / 'config.json')
  if run is None:
    from nested_learning import training

    run = training.run
  return run(config, workdir and str(workdir), mode)


def _load(workdir: pathlib.Path | None) -> configs.Experiment:
  """Loads the config that the flags name, with the changes of --set."""
  spec = _CONFIG.value
  if spec is None:
    if workdir is None or not (workdir / 'config.json').is_file():
      place = f' ({workdir} holds no run)' if workdir else ''
      raise errors.UserError(
        f'No config{place}: name one, as in --config=experiments/quickstart.py.'
      )
    spec = str(workdir / 'config.json')
  experiment = configs.load_experiment(spec)
  assignments = list(_SET.value)
  if _PROMPT.value is not None:
    assignments.append(f'generate.prompt={_PROMPT.value}')
  config = configs.override(experiment.config, assignments)
  return experiment._replace(config=config)


def _holds_run(workdir: pathlib.Path) -> bool:
  """Returns whether a run has begun there; a config alone is no run."""
  if not (workdir / 'config.json').is_file():
    return False
  return any(path.name != 'config.json' for path in workdir.iterdir())


def _check_same_run(config, workdir: pathlib.Path, mode: str) -> None:
  """Refuses a workdir that holds the run of another config."""
  theirs = configs.load(str(workdir / 'config.json'))
  changed = configs.differences(config, theirs)
  if mode == 'generate':
    changed = {
      path: values
      for path, values in changed.items()
      if not path.startswith('generate.')
    }
  if not changed:
    return
  listed = [
    f'{path} ({theirs!r} there, {ours!r} here)'
    for path, (ours, theirs) in list(changed.items())[:5]
  ]
  if len(changed) > 5:
    listed.append(f'{len(changed) - 5} more')
  way_out = (
    'Use another --workdir; or leave out --config and --set to resume that run.'
    if mode == 'train'
    else 'Leave out --config to use the config of that run.'
  )
  raise errors.UserError(
    f'{workdir} holds a run that differs in {", ".join(listed)}. {way_out}'
  )


def _write_config(config, module: str | None, path: pathlib.Path) -> None:
  """Writes config.json before the run starts: whole, or not at all."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: the processes of one run write the same file.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix='config.')
    with open(handle, 'w', encoding='utf-8') as file:
      file.write(configs.to_json(config, module))
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except OSError as error:
    raise errors.UserError(
      f'Cannot write to --workdir={path.parent}: {error.strerror}.'
    ) from error


def _is_ours(error: ValueError) -> bool:
  """Returns whether the error is a check of the package or an experiment.

  Those name the value and the way out, so that a traceback adds nothing; a
  ValueError from inside another package keeps its traceback.
  """
  if isinstance(error, errors.UserError):
    return True
  frames = traceback.extract_tb(error.__traceback__)
  raised_in = pathlib.Path(frames[-1].filename).resolve()
  rooms = (_ROOT / 'nested_learning', _ROOT / 'experiments')
  return any(raised_in.is_relative_to(room) for room in rooms)


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    argv = flags.FLAGS(argv)
  except flags.Error as error:
    _print_error(error)
    sys.exit(2)
  if flags.FLAGS['verbosity'].using_default_value:
    # Orbax logs every step of a save as INFO; --verbosity=0 shows that.
    flags.FLAGS.verbosity = logging.WARNING
  return argv


def _print_error(error: Exception | str) -> None:
  print(f'run.py: {" ".join(str(error).split())}', file=sys.stderr)


if __name__ == '__main__':
  main()
