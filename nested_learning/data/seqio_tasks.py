"""seqio tasks and mixtures of this package's sources and tokenizers.

    seqio_tasks.register('/data', 'tokenizer.model')  # fineweb_edu, c4, web
    python launch/prepare.py --source=seqio:web --output=/data/web_tokens ...

seqio imports TensorFlow, so it is imported when a function here is called and
never in training: a task's tokens are written once (`token_files`).
"""

from collections.abc import Iterator, Mapping
import functools
import importlib
import pathlib
from typing import Any

import numpy as np

from nested_learning import errors
from nested_learning.data import formats
from nested_learning.data import tokenizers

# The published layouts: Parquet files with a column 'text', and gzipped lines
# of JSON with a field 'text'.
_FINEWEB_EDU = {'train': 'parquet:{root}/fineweb_edu'}
_C4 = {
  'train': 'jsonl:{root}/c4/en/c4-train.*.json.gz',
  'validation': 'jsonl:{root}/c4/en/c4-validation.*.json.gz',
}


def register(root: str, tokenizer: str, *, prefix: str = '') -> None:
  """Registers the tasks fineweb_edu and c4, and the mixture web of both.

  Args:
    root: Folder with fineweb_edu/ and c4/en/ in their published layout.
    tokenizer: As in data.tokenizer.
    prefix: Prefix of the three names.
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
  """Registers a task whose targets are the tokens of documents.

  Args:
    name: Name of the task.
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
    del shuffle_files, seed  # the source has an order

    def texts():
      source = formats.open_documents(splits[split], text_field=text_field)
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
  """Registers a mixture of tasks, by their shares of the documents."""
  seqio, _ = _import()
  return seqio.MixtureRegistry.add(name, list(rates.items()))


def make_vocabulary(tokenizer: str) -> Any:
  """Makes a `seqio.Vocabulary` of a tokenizer of this package.

  Its ids are the same as in training, and its attribute `tokenizer` is the
  `Tokenizer`.

  Args:
    tokenizer: As in data.tokenizer.
  """
  seqio, tf = _import()

  class Vocabulary(seqio.Vocabulary):
    """A vocabulary that calls a `Tokenizer`."""

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
  """Yields the documents of a task or mixture as tokens, in its own order.

  Args:
    name: Name of a registered task or mixture. A pass over a mixture ends with
      the first of its tasks that ends.
    split: One of its splits.
    tokenizer: The tokenizer of training; the task's vocabulary must be the
      same.

  Yields:
    The number of each document, as text, and its ids.

  Raises:
    errors.UserError: There is no such task or split, or its vocabulary is
      different.
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
  """Raises `errors.UserError` if ids of a task have another meaning."""
  theirs = getattr(feature.vocabulary, 'tokenizer', None)
  if theirs is not None and hasattr(theirs, 'fingerprint'):
    fingerprint = theirs.fingerprint
  else:  # a vocabulary of seqio, identified by its file
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
