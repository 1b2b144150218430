"""Learning a SentencePiece model from any source of documents."""

from collections.abc import Iterable, Iterator
import contextlib
import io
import os
import pathlib

from nested_learning import errors
from nested_learning import files

# SentencePiece skips longer lines, so documents are cut into shorter ones.
_LONGEST = 4000  # characters


def train_sentencepiece(
  documents: Iterable[str],
  path: pathlib.Path,
  *,
  vocab_size: int,
  kind: str = 'bpe',
  num_characters: int = 10**9,
) -> None:
  """Learns a vocabulary and writes it, ready for data.tokenizer.

  The tokenizer loses nothing: white space is kept, text is not normalised, and
  characters without a piece become bytes. <s> stands before each document.

  Args:
    documents: Texts, read until there is enough.
    path: The .model to write; must not exist.
    vocab_size: Number of pieces; 259 of them are bytes and marks.
    kind: 'bpe' or 'unigram'.
    num_characters: Length of the text to learn from.

  Raises:
    errors.UserError: The path is taken or no .model, the package is not
      installed, or the text does not give so many pieces.
  """
  try:
    taken = os.path.lexists(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
      os.lstat(path)  # refuses a name that is too long
  except OSError as error:
    raise errors.of_disk(error.errno)(
      f'{files.shown(path)} cannot be written ({error.strerror}); name another '
      'file.'
    ) from error
  if path.suffix != '.model' or taken:
    raise errors.UserError(
      f'{files.shown(path)} must end in .model and not exist; name another '
      'file.'
    )
  try:
    import sentencepiece
  except ImportError as error:
    raise errors.UserError(
      'Learning a tokenizer needs the package sentencepiece. Install it with '
      '`pip install "nested-learning[tokenizers]"`.'
    ) from error
  model, failures = io.BytesIO(), []

  def lines():  # SentencePiece replaces the exceptions of its iterator
    try:
      yield from _pieces(documents, num_characters)
    except Exception as error:
      failures.append(error)
      raise

  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=lines(),
      model_writer=model,
      vocab_size=vocab_size,
      model_type=kind,
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      byte_fallback=True,
      split_digits=True,
      allow_whitespace_only_pieces=True,
      max_sentence_length=4 * _LONGEST + 4,  # bytes
      minloglevel=2,
    )
  except Exception as error:  # RuntimeError for most
    if failures:
      raise failures[0] from None
    if not isinstance(error, RuntimeError | OSError):
      raise
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    raise errors.UserError(
      f'No vocabulary of {vocab_size} pieces was learned ({reason[:200]}); '
      'choose another size, or give more text.'
    ) from error
  files.write_whole(path, model.getvalue())


def _pieces(documents: Iterable[str], num_characters: int) -> Iterator[str]:
  """Yields the lines of the documents, cut where they are too long."""
  for text in documents:
    # NUL is SentencePiece's own mark; lines keep their ends.
    for line in text.replace('\0', '').splitlines(keepends=True):
      for begin in range(0, len(line), _LONGEST):
        yield line[begin : begin + _LONGEST]
    num_characters -= len(text)
    if num_characters <= 0:
      return
