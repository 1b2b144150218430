"""A SentencePiece model learned from any source of documents."""

from collections.abc import Iterable, Iterator
import io
import pathlib

from nested_learning import errors

# SentencePiece leaves out longer lines, so that documents are cut into these.
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

  Nothing is lost in it: white space is kept as it is, text is not normalised,
  and what has no piece becomes bytes. <s> stands before each document.

  Args:
    documents: Texts, read until there is enough.
    path: The .model to write; must not exist.
    vocab_size: Number of pieces, 259 of which are taken (bytes and marks).
    kind: 'bpe' or 'unigram'.
    num_characters: Of the text to learn from.

  Raises:
    errors.UserError: The path is taken or no .model, the package is not
      installed, or the text does not give so many pieces.
  """
  if path.suffix != '.model' or path.exists():
    raise errors.UserError(
      f'{path} must end in .model and not exist; name another file.'
    )
  try:
    import sentencepiece
  except ImportError as error:
    raise errors.UserError(
      'Learning a tokenizer needs the package sentencepiece. Install it with '
      '`pip install "nested-learning[tokenizers]"`.'
    ) from error
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_pieces(documents, num_characters),
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
  except (RuntimeError, OSError) as error:
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    raise errors.UserError(
      f'No vocabulary of {vocab_size} pieces was learned ({reason[:200]}); '
      'choose another size, or give more text.'
    ) from error
  path.parent.mkdir(parents=True, exist_ok=True)
  draft = path.with_suffix('.draft')  # whole, or not at all
  draft.write_bytes(model.getvalue())
  draft.replace(path)


def _pieces(documents: Iterable[str], num_characters: int) -> Iterator[str]:
  """Lines of the documents, cut where they are too long."""
  for text in documents:
    # NUL is SentencePiece's own mark; lines keep their ends.
    for line in text.replace('\0', '').splitlines(keepends=True):
      for begin in range(0, len(line), _LONGEST):
        yield line[begin : begin + _LONGEST]
    num_characters -= len(text)
    if num_characters <= 0:
      return
