"""seqio tasks and mixtures over this package's sources and tokenizers.

    seqio_tasks.register('/data', 'tokenizer.model')  # fineweb_edu, c4, web
    python launch/prepare.py --source=seqio:web --output=/data/web_tokens ...

seqio brings TensorFlow, so that it is imported when a function here is called,
and never where a model trains: a task's tokens are written once
(`token_files`), and training reads them without it.
"""

from collections.abc import Iterator, Mapping
import functools
import importlib
import pathlib
from typing import Any

import numpy as np

from nested_learning import errors
from nested_learning.data import documents as documents_lib
from nested_learning.data import tokenizers

# The layouts in which the two are published: Parquet files with a column
# 'text', and gzipped lines of JSON with a field 'text'.
_FINEWEB_EDU = {'train': 'parquet:{root}/fineweb_edu'}
_C4 = {
  'train': 'jsonl:{root}/c4/en/c4-train.*.json.gz',
  'validation': 'jsonl:{root}/c4/en/c4-validation.*.json.gz',
}


def register(root: str, tokenizer: str, *, prefix: str = '') -> None:
  """Registers the tasks fineweb_edu and c4, and the mixture web of both.

  Args:
    root: Folder with fineweb_edu/ and c4/en/ as they are published.
    tokenizer: As in data.tokenizer.
    prefix: Of the three names.
  """
  for name, splits in (('fineweb_edu', _FINEWEB_EDU), ('c4', _C4)):
    sources = {split: path.format(root=root) for split, path in splits.items()}
    add_task(prefix + name, sources, tokenizer)
  add_mixture(prefix + 'web', {prefix + 'fineweb_edu': 0.7, prefix + 'c4': 0.3})


def add_task(
  name: str,
  splits: Mapping[str, str],
  tokenizer: str,
  *,
  text_field: str = 'text',
) -> Any:
  """Registers a task whose targets are the tokens of a source's documents.

  Args:
    name: Of the task.
    splits: From split to source, as in data.source.
    tokenizer: As in data.tokenizer.
    text_field: As in data.text_field.

  Returns:
    The `seqio.Task`.

  Raises:
    errors.UserError: seqio is not installed, or the tokenizer cannot be used.
  """
  seqio, tf = _import()
  vocabulary = make_vocabulary(tokenizer)

  def dataset_fn(split, shuffle_files=False, seed=None):
    del shuffle_files, seed  # the order is that of the source

    def texts():
      source = documents_lib.open_documents(
        splits[split], text_field=text_field
      )
      for text in source:
        yield {'text': text}

    return tf.data.Dataset.from_generator(
      texts, output_signature={'text': tf.TensorSpec((), tf.string)}
    )

  return seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(dataset_fn, splits=tuple(splits)),
    preprocessors=[
      functools.partial(seqio.preprocessors.rekey, key_map={'targets': 'text'}),
      seqio.preprocessors.tokenize,
    ],
    output_features={
      'targets': seqio.Feature(vocabulary=vocabulary, add_eos=False)
    },
  )


def add_mixture(name: str, rates: Mapping[str, float]) -> Any:
  """Registers a mixture of tasks, by how often each gives a document."""
  seqio, _ = _import()
  return seqio.MixtureRegistry.add(name, list(rates.items()))


def make_vocabulary(tokenizer: str) -> Any:
  """Any tokenizer of this package as a `seqio.Vocabulary`.

  Its ids are those that training sees, SentencePiece's or Hugging Face's, and
  its attribute `tokenizer` is the `Tokenizer`.

  Args:
    tokenizer: As in data.tokenizer.
  """
  seqio, tf = _import()

  class Vocabulary(seqio.Vocabulary):
    """A vocabulary by a `Tokenizer`."""

    def __init__(self):
      super().__init__(extra_ids=0)
      self.tokenizer = tokenizers.make_tokenizer(tokenizer)

    def __eq__(self, other):
      theirs = getattr(other, 'tokenizer', None)
      mine = self.tokenizer.fingerprint
      return getattr(theirs, 'fingerprint', None) == mine

    def __hash__(self):
      return hash(self.tokenizer.fingerprint)

    @property
    def bos_id(self):
      return self.tokenizer.document_id

    @property
    def eos_id(self):
      return self.tokenizer.document_id

    @property
    def unk_id(self):
      return None

    @property
    def _base_vocab_size(self):
      return self.tokenizer.vocab_size

    def _encode(self, s):
      return self.tokenizer.encode(s).tolist()

    def _decode(self, ids):
      return self.tokenizer.decode(np.asarray(ids))

    def _encode_tf(self, s):
      encode = lambda text: self.tokenizer.encode(text.decode('utf-8'))
      ids = tf.numpy_function(encode, [s], tf.int32)
      ids.set_shape([None])
      return ids

    def _decode_tf(self, ids):
      decode = lambda row: self.tokenizer.decode(row).encode()
      return tf.numpy_function(decode, [ids], tf.string)

  return Vocabulary()


def read(
  name: str, split: str, tokenizer: tokenizers.Tokenizer
) -> Iterator[tuple[str, np.ndarray]]:
  """The documents of a task or mixture, as tokens, in an order of its own.

  Args:
    name: Of a registered task or mixture. One pass over a mixture ends with
      the first of its tasks that ends.
    split: A split that it has.
    tokenizer: What training will use; the task's vocabulary must be it.

  Yields:
    The number of each document, as text, and its ids.

  Raises:
    errors.UserError: There is no such task or split, or its vocabulary is
      another.
  """
  seqio, _ = _import()
  try:
    task = seqio.get_mixture_or_task(name)
  except ValueError as error:
    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    raise errors.UserError(
      f'seqio knows no task {name!r}, but {", ".join(known) or "none"}; name '
      'the module that registers it in --module.'
    ) from error
  if split not in task.splits:
    raise errors.UserError(
      f'{name} has no split {split!r}, but {", ".join(task.splits)}.'
    )
  _check_vocabulary(name, task.output_features['targets'], tokenizer)
  dataset = task.get_dataset(
    sequence_length=None,
    split=split,
    shuffle=False,
    seed=0,
    num_epochs=1,
    trim_output_features=False,
  )
  for i, example in enumerate(dataset.as_numpy_iterator()):
    yield str(i), example['targets']


def _check_vocabulary(name, feature, tokenizer: tokenizers.Tokenizer) -> None:
  """Refuses a task whose ids stand for something else."""
  theirs = getattr(feature.vocabulary, 'tokenizer', None)
  if theirs is not None and hasattr(theirs, 'fingerprint'):
    fingerprint = theirs.fingerprint
  else:  # seqio's own, by the file that it was made of
    path = getattr(feature.vocabulary, 'sentencepiece_model_file', None)
    extra = getattr(feature.vocabulary, 'extra_ids', 0)
    fingerprint = f'{type(feature.vocabulary).__name__} with {extra} extra ids'
    if path and not extra and pathlib.Path(path).is_file():
      fingerprint = tokenizers.make_tokenizer(str(path)).fingerprint
  if fingerprint != tokenizer.fingerprint:
    raise errors.UserError(
      f'{name} has tokens of {fingerprint}, and --tokenizer is '
      f'{tokenizer.fingerprint}; give the one that the task was made with.'
    )


def _import() -> tuple[Any, Any]:
  try:
    return tuple(map(importlib.import_module, ('seqio', 'tensorflow')))
  except ImportError as error:
    raise errors.UserError(
      'seqio tasks need the package seqio. Install it with '
      '`pip install "nested-learning[seqio]"`; it brings TensorFlow.'
    ) from error
