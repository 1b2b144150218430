"""Prepares text for training: learns a tokenizer, or tokenises text once.

    python launch/prepare.py --source='web/*.jsonl' --vocab_size=32000 \
      --output=data/tokenizer.model
    python launch/prepare.py --source='web/*.jsonl' \
      --tokenizer=data/tokenizer.model --output=data/tokens
    python launch/run.py ... --set=data.source=data/tokens \
      --set=data.tokenizer=data/tokenizer.model

An --output that ends in .model is a tokenizer; any other is a folder of
ArrayRecord shards. A source is anything that data.source names, or seqio:NAME,
a task or mixture of seqio. The tasks fineweb_edu and c4 and their mixture web
read the published files in --data_dir; others come from --module:

    python launch/prepare.py --source=seqio:fineweb_edu --data_dir=/data \
      --tokenizer=data/tokenizer.model --output=data/fineweb_edu
"""

import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if _ROOT not in sys.path:
  sys.path.insert(0, _ROOT)  # A checkout runs without being installed.

from launch import startup

if __name__ == '__main__':
  startup.begin()  # before the imports, which take longer

from collections.abc import Iterator
import importlib
import pathlib
from typing import Any

from absl import flags
import tqdm

from launch import programs
from nested_learning import errors

_SOURCE = flags.DEFINE_string(
  'source', None, 'The text, as data.source, or seqio:NAME.'
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'A .model to learn, or a folder of tokens to make.'
)
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', 'bytes', 'The tokenizer, as data.tokenizer.'
)
_TEXT_FIELD = flags.DEFINE_string(
  'text_field', 'text', 'Field of records that holds the text.'
)
_VOCAB_SIZE = flags.DEFINE_integer(
  'vocab_size', 32000, 'Pieces of a tokenizer to learn.', lower_bound=260
)
_KIND = flags.DEFINE_enum(
  'kind', 'bpe', ['bpe', 'unigram'], 'Algorithm that learns a tokenizer.'
)
_NUM_CHARACTERS = flags.DEFINE_integer(
  'num_characters',
  10**9,
  'Text to learn a tokenizer from, in characters.',
  lower_bound=1,
)
_SPLIT = flags.DEFINE_string(
  'split', 'train', 'Split of a seqio task or mixture.'
)
_DATA_DIR = flags.DEFINE_string(
  'data_dir', None, 'Folder with fineweb_edu/ and c4/en/, for seqio.'
)
_MODULE = flags.DEFINE_string(
  'module', None, 'Python module that registers seqio tasks of your own.'
)


def main() -> None:
  """Parses the flags and runs."""
  programs.start(_main, example='--source=FILE')


def _main() -> None:
  for name, value in (('source', _SOURCE.value), ('output', _OUTPUT.value)):
    if not value:
      raise errors.UserError(f'--{name} is missing; see --help.')
  programs.check_path('output', _OUTPUT.value, folder=True)
  print(_run(_SOURCE.value, pathlib.Path(_OUTPUT.value)))


def _run(source: str, output: pathlib.Path) -> str:
  """Makes the output; returns a line to print."""
  is_model = output.suffix == '.model'
  if is_model and source.startswith('seqio:'):
    raise errors.UserError(
      f'--source={source} is made of tokens; learn a tokenizer from a source '
      'of text.'
    )
  # Importing takes seconds; mistakes in flags are answered before.
  from nested_learning.data import token_files
  from nested_learning.data import tokenizer_training
  from nested_learning.data import tokenizers

  if is_model:
    tokenizer_training.train_sentencepiece(
      (text for _, text in _read(source)),
      output,
      vocab_size=_VOCAB_SIZE.value,
      kind=_KIND.value,
      num_characters=_NUM_CHARACTERS.value,
    )
    return f'{output}: use it with --set=data.tokenizer={output}.'
  tokenizer = tokenizers.make_tokenizer(_TOKENIZER.value)
  if source.startswith('seqio:'):
    documents = _read_seqio(source.removeprefix('seqio:'), tokenizer)
  else:
    documents = _read(source)
  summary = token_files.write(
    output,
    tqdm.tqdm(documents, unit=' documents', disable=None),  # on a terminal
    tokenizer,
    spec=_TOKENIZER.value,
    source=source,
  )
  return (
    f'{output}: {summary["num_tokens"]:,} tokens of '
    f'{summary["num_documents"]:,} documents; use them with '
    f'--set=data.source={output} --set=data.tokenizer={_TOKENIZER.value}.'
  )


def _read(source: str) -> Iterator[tuple[str, str]]:
  """Yields the names and texts of a source."""
  from nested_learning.data import formats

  found = formats.open_documents(source, text_field=_TEXT_FIELD.value)
  for i, text in enumerate(found):
    yield found.name(i), text
  found.check_unchanged()


def _read_seqio(name: str, tokenizer: Any) -> Iterator[tuple[str, Any]]:
  """Yields the numbers and ids of the documents of a task or mixture."""
  from nested_learning.data import seqio_tasks

  if _DATA_DIR.value:
    seqio_tasks.register(_DATA_DIR.value, _TOKENIZER.value)
  if _MODULE.value:
    sys.path.insert(0, '')  # as `python -m` does
    try:
      importlib.import_module(_MODULE.value)
    except ImportError as error:
      raise errors.UserError(
        f'--module={_MODULE.value} cannot be imported ({error}).'
      ) from error
  return seqio_tasks.read(name, _SPLIT.value, tokenizer)


if __name__ == '__main__':
  main()
