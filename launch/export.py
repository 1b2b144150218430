"""Exports the model of a run as a folder that transformers loads.

    python launch/export.py --workdir=runs/tuned --to=exported

The run began with a model that launch/import.py imported. Its last checkpoint
is written, or the weights of the base, bit by bit, if it has none.
"""

import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if _ROOT not in sys.path:
  sys.path.insert(0, _ROOT)  # A checkout runs without being installed.

from launch import startup

if __name__ == '__main__':
  startup.begin()  # before the imports, which take longer

import pathlib

from absl import flags

from launch import programs
from launch import workdirs
from nested_learning import errors

_WORKDIR = flags.DEFINE_string('workdir', None, 'The folder of the run.')
_TO = flags.DEFINE_string('to', None, 'A new folder for the model.')
_DTYPE = flags.DEFINE_enum(
  'dtype',
  None,
  ['float32', 'bfloat16', 'float16'],
  'Type of the tensors; by default that of the imported ones.',
)
_SET = flags.DEFINE_multi_string(
  'set', [], 'A change of the config, such as model.mixer.window=none.'
)


def main() -> None:
  """Parses the flags and exports."""
  programs.start(_run, example='--workdir=runs/tuned')


def _run() -> None:
  for name, value in (('workdir', _WORKDIR.value), ('to', _TO.value)):
    if not value:
      raise errors.UserError(f'--{name} is missing; see --help.')
  programs.check_path('to', _TO.value, folder=True)
  workdir = workdirs.local(_WORKDIR.value)
  if not (workdir / 'config.json').is_file():
    raise errors.UserError(
      f'--workdir={workdir} holds no run; give the folder of one.'
    )
  # Importing takes seconds; mistakes in flags are answered before.
  from nested_learning import configs
  from nested_learning.training import modes
  from nested_learning.training import pretrained_runs
  from nested_learning.training import text_workload

  config = configs.load_experiment(str(workdir / 'config.json')).config
  config = configs.override(config, list(_SET.value))
  pretrained_runs.check_exportable(config)
  params = None
  if (workdir / 'checkpoints').is_dir():
    tokenizer = text_workload.make_tokenizer(config)
    params, _ = modes.restore_params(config, workdir, tokenizer.fingerprint)
  print(
    pretrained_runs.export_run(
      config, params, pathlib.Path(_TO.value), dtype=_DTYPE.value
    )
  )


if __name__ == '__main__':
  main()
