"""Streams of text that a pretrained model has not seen, with planted facts."""

from collections.abc import Sequence
import pathlib
import subprocess
from typing import NamedTuple

import numpy as np

from nested_learning import data as data_lib
from nested_learning import errors

_ROOT = pathlib.Path(__file__).resolve().parents[2]
# This repository in November 2026; SmolLM2 is from 2024.
_COMMIT = '7ee5287b5726'
# Folders and files of that commit, by the name of the stream.
_PATHS = {
  'sources': ('nested_learning/levels', 'nested_learning/models'),
  'pages': ('README.md', 'WORKSPACE.md', 'launch', 'experiments/README.md'),
}
_TELLINGS = (1, 2, 4)  # of the facts in turn
_TOKENS_PER_FACT = 1024  # about, of the stream
_PLANTED = 0.75  # facts are told in this part of a stream, the first one
_COLOURS = 'amber azure crimson golden indigo ivory scarlet silver violet white'
_PLACES = 'harbour library tower garden bridge station market chapel mill barn'


class Fact(NamedTuple):
  """A sentence that a stream tells, and the question about it.

  Attributes:
    question: int [q], the sentence without its code.
    code: int [c].
    tellings: How often it is told.
    position: Place of its last telling in the stream, in tokens.
  """

  question: np.ndarray
  code: np.ndarray
  tellings: int
  position: int


class Stream(NamedTuple):
  """A text.

  Attributes:
    tokens: int [t + 1], with the token between documents in front.
    counts: bool [t + 1], False for tokens of facts.
    facts: The facts.
  """

  tokens: np.ndarray
  counts: np.ndarray
  facts: list[Fact]


def read_text(name: str) -> str:
  """Returns a text: one of this repository's, or a file.

  Args:
    name: 'sources', 'pages', or a path.

  Raises:
    errors.UserError: It cannot be read.
  """
  if name not in _PATHS:
    try:
      return pathlib.Path(name).read_text(encoding='utf-8')
    except OSError as error:
      raise errors.UserError(
        f'the text {name} cannot be read ({error.strerror}); name '
        f'{", ".join(_PATHS)}, or a file.'
      ) from error
  found = _git('ls-tree', '-r', '--name-only', _COMMIT, '--', *_PATHS[name])
  paths = [x for x in found.split() if x.endswith(('.py', '.md'))]
  return '\n'.join(_git('show', f'{_COMMIT}:{path}') for path in paths)


def make_stream(
  text: str, tokenizer: data_lib.Tokenizer, num_tokens: int
) -> Stream:
  """Plants facts in a text.

  Args:
    text: The text, long enough.
    tokenizer: Tokens of the model.
    num_tokens: Tokens that are predicted.

  Raises:
    errors.UserError: The text is too short.
  """
  told = _plan(num_tokens)
  # Pieces between facts end with lines, so that tokens stay what they are.
  sample = text[: 4 * num_tokens]
  per_token = len(sample) / max(len(tokenizer.encode(sample)), 1)
  size = int(per_token * _PLANTED * num_tokens / (len(told) + 1))
  parts, counts, last = [np.array([tokenizer.document_id])], [[True]], {}
  begin = 0

  def put(piece, is_text):
    parts.append(tokenizer.encode(piece))
    counts.append(np.full(len(parts[-1]), is_text))

  for fact in told:
    end = text.find('\n', begin + size) + 1
    put(text[begin:end], is_text=True)
    put(''.join(fact), is_text=False)
    last[fact] = sum(map(len, parts))
    begin = end
  put(text[begin : begin + 8 * num_tokens], is_text=True)
  tokens = np.concatenate(parts).astype(np.int32)
  if len(tokens) <= num_tokens or not begin:
    raise errors.UserError(
      f'the text has {len(tokens)} tokens, and a stream needs '
      f'{num_tokens + 1}; give a longer text, or lower num_tokens.'
    )
  facts = [
    Fact(
      tokenizer.encode(question),
      tokenizer.encode(code),
      told.count((question, code, end)),
      position,
    )
    for (question, code, end), position in last.items()
  ]
  cut = slice(num_tokens + 1)
  return Stream(tokens[cut], np.concatenate(counts)[cut], facts)


def _plan(num_tokens: int) -> Sequence[tuple[str, str, str]]:
  """Returns sentences (question, code, end) in the order of their tellings."""
  rng = np.random.default_rng(0)
  count = max(num_tokens // _TOKENS_PER_FACT, 3)
  names = [(a, b) for a in _COLOURS.split() for b in _PLACES.split()]
  names = [names[i] for i in rng.permutation(len(names))[:count]]
  codes = rng.choice(np.arange(1000, 10_000), count, replace=False)
  told = []
  for i, ((colour, place), code) in enumerate(zip(names, codes, strict=True)):
    question = f'The access code of the {colour} {place} is '
    told += [(question, str(code), '.\n')] * _TELLINGS[i % len(_TELLINGS)]
  return [told[i] for i in rng.permutation(len(told))]


def _git(*args: str) -> str:
  try:
    done = subprocess.run(
      ['git', *args], cwd=_ROOT, capture_output=True, check=True
    )
  except (OSError, subprocess.CalledProcessError) as error:
    raise errors.UserError(
      f'the texts are those of the commit {_COMMIT}, which git cannot read '
      'here; clone the repository with its history, or name a file in texts.'
    ) from error
  return done.stdout.decode()
