"""Batches of text as a pure function of the step.

Row r of the global batch at a step begins at a known position of the token
stream, so the state of an iterator is the step: it restores in constant time,
on any number of processes, and every process makes its own rows only.
"""

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import sys
from typing import Any

import grain
import numpy as np

from nested_learning import errors
from nested_learning.data import documents
from nested_learning.data import mixtures
from nested_learning.data import packing
from nested_learning.data import sources
from nested_learning.data import token_files
from nested_learning.data import tokenizers

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What text to learn from, and how it is cut into batches."""

  # 'stdlib', or a folder, a file, a glob of text files; or records, as in
  # `documents`; or tokens that launch/prepare.py made; or a mixture of such,
  # '0.7*web/*.parquet + 0.3*code', by share of the tokens.
  source: str = 'stdlib'
  text_field: str = 'text'  # of records that have fields
  tokenizer: str = 'bytes'  # or the path of a .model or a .json
  sequence_length: int = 1024  # tokens per row
  batch_size: int = 8  # rows per step, over all processes
  reset: str = 'document'  # forget at document starts; or 'never'
  validation_fraction: float = 0.05  # share of the files that is held out
  seed: int = 0  # of the order of documents and rows
  cache_dir: str | None = None  # of tokens; None: below the user's cache

  def __post_init__(self):
    for name in ('sequence_length', 'batch_size'):
      if getattr(self, name) < 1:
        raise errors.UserError(
          f'data.{name}={getattr(self, name)} must be at least 1.'
        )
    if self.reset not in ('document', 'never'):
      raise errors.UserError(
        f"data.reset={self.reset!r} must be 'document' or 'never'."
      )
    if not 0 <= self.validation_fraction < 1:
      raise errors.UserError(
        f'data.validation_fraction={self.validation_fraction} must be at '
        'least 0 and below 1.'
      )
    if not 0 <= self.seed < 2**32:
      raise errors.UserError(
        f'data.seed={self.seed} must be at least 0 and below 2**32.'
      )

  @property
  def carries_state(self) -> bool:
    """Whether a row of a batch goes on where the batch before it stopped."""
    return self.reset == 'never'


class Batches:
  """An iterator over batches whose state is a small JSON-able dict."""

  def __init__(
    self, make_batch: Callable[[int], Batch], num_steps: int, *, stream: dict
  ):
    steps = grain.MapDataset.range(num_steps).map(make_batch)
    self._batches = iter(
      steps.to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
      )
    )
    self._stream = stream

  def __iter__(self):
    return self

  def __next__(self) -> Batch:
    return next(self._batches)

  def get_state(self) -> dict[str, Any]:
    """The step, and what must be the same wherever it is restored."""
    step = self._batches.get_state()['next_index']
    return {'step': step, 'stream': dict(self._stream)}

  def set_state(self, state: dict[str, Any]):
    """Goes to the batch that followed when the state was taken.

    Args:
      state: From `get_state`, perhaps with another number of processes.

    Raises:
      UserError: The state belongs to other data.
    """
    for name, value in self._stream.items():
      saved = state.get('stream', {}).get(name)
      if saved != value:
        raise errors.UserError(
          f'The checkpoint was made on data with {name}={saved!r}, not '
          f'{value!r}. Restore the text and the settings in data.*, or start '
          'in another workdir.'
        )
    self._batches.set_state({'next_index': state['step']})


def make_iterator(
  config: DataConfig,
  *,
  split: str = 'train',
  process_index: int = 0,
  process_count: int = 1,
  num_epochs: int | None = None,
) -> Batches:
  """Makes an iterator over one process's rows of every global batch.

  Each document is [document_id] + tokens, and documents are laid end to end.
  With reset='document' this stream is cut into rows, shuffled anew in every
  epoch; a row that begins inside a document is a fresh start. With
  reset='never' it is cut into batch_size lanes, and row r of a batch
  continues row r of the batch before. In training on a mixture the stream holds
  its shares; validation reads the held-out documents of every source.

  Training drops the tokens that do not fill a row and, after num_epochs, the
  rows that do not fill a batch. Validation keeps the order of the files and
  counts every token once: what lies beyond the end is padding, mask False.

  Args:
    config: The data.
    split: 'train' or 'validation'. No file is in both.
    process_index: Which consecutive slice of each batch to make.
    process_count: Number of slices.
    num_epochs: Passes over the training data, None for no end. Validation is
      always one pass.

  Returns:
    An iterator of dicts of arrays [batch_size / process_count,
    sequence_length]: `tokens` and `targets` int32; `mask` bool, the targets
    that count; `reset` bool, where memories forget what was before; `document`
    int32, counted from 0 in each row. It has `get_state` and `set_state`.

  Raises:
    UserError: The text or the tokenizer cannot be used, or there is too
      little text.
  """
  if split not in ('train', 'validation'):
    raise ValueError(f"{split=} must be 'train' or 'validation'.")
  num_rows, remainder = divmod(config.batch_size, process_count)
  if remainder:
    raise errors.UserError(
      f'data.batch_size={config.batch_size} is not a multiple of the '
      f'{process_count} processes. Choose a multiple.'
    )
  rows = process_index * num_rows + np.arange(num_rows)
  tokenizer = tokenizers.make_tokenizer(config.tokenizer)
  mixture = mixtures.parse(config.source) or {config.source: 1.0}
  corpora = [_load(config, source, tokenizer) for source in mixture]
  fingerprint = _fingerprint(corpora, list(mixture.values()))
  stream = _make_stream(config, split, corpora, list(mixture.values()))
  make_plan = _plan_lanes if config.reset == 'never' else _plan_rows
  num_steps, place = make_plan(config, split, stream.length, num_epochs)

  def make_batch(step: int) -> Batch:
    begins, ends = place(step, rows)
    batch = packing.pack(stream, begins, length=config.sequence_length)
    if config.reset == 'never':
      batch['reset'] = np.zeros_like(batch['reset'])
    batch['reset'][:, 0] |= config.reset == 'document' or step == 0
    batch['mask'] = (
      begins[:, None] + np.arange(config.sequence_length) < ends[:, None]
    )
    return batch

  identity = dataclasses.asdict(config)
  for name in ('source', 'text_field', 'cache_dir'):
    del identity[name]
  identity |= {
    'tokenizer': tokenizer.fingerprint,
    'text': fingerprint,
    'split': split,
  }
  return Batches(make_batch, num_steps, stream=identity)


def _load(
  config: DataConfig, source: str, tokenizer: tokenizers.Tokenizer
) -> packing.Corpus:
  """The tokens of one source, made now or beforehand."""
  if token_files.holds_tokens(source):
    return token_files.load(source, tokenizer)
  return packing.load_corpus(
    documents.open_documents(source, text_field=config.text_field),
    tokenizer,
    cache_dir=config.cache_dir,
  )


def _fingerprint(
  corpora: Sequence[packing.Corpus], weights: Sequence[float]
) -> str:
  """Of the text and, in a mixture, of its shares."""
  if len(corpora) == 1:
    return corpora[0].fingerprint
  parts = [
    f'{weight!r}*{corpus.fingerprint}'
    for corpus, weight in zip(corpora, weights, strict=True)
  ]
  return hashlib.sha256(' + '.join(parts).encode()).hexdigest()[:16]


def _make_stream(
  config: DataConfig,
  split: str,
  corpora: Sequence[packing.Corpus],
  weights: Sequence[float],
) -> packing.Stream:
  """The documents of a split, shuffled for training, long enough for a row."""
  orders = []
  for corpus in corpora:
    held_out = sources.choose(corpus.places, config.validation_fraction)
    order = np.flatnonzero(held_out if split == 'validation' else ~held_out)
    if not len(order):
      raise errors.UserError(
        f'data.source={config.source!r} has {len(held_out)} documents and '
        f'data.validation_fraction is {config.validation_fraction}, which '
        'leaves none for validation. Split the text into several files, or '
        'raise data.validation_fraction.'
      )
    orders.append(order)
  if len(corpora) == 1:
    (corpus,), (order,) = corpora, orders
    if split == 'train':
      order = np.random.default_rng(config.seed).permutation(order)
  else:
    corpus, order = _mix(config, split, corpora, orders, weights)
  stream = packing.make_stream(corpus, order)
  needed = 1
  if split == 'train':
    lanes = config.batch_size if config.reset == 'never' else 1
    needed = lanes * config.sequence_length
  if stream.length < needed:
    raise errors.UserError(
      f'data.source={config.source!r} has {stream.length} tokens for '
      f'{split}, fewer than the {needed} that data.sequence_length='
      f'{config.sequence_length}, data.batch_size={config.batch_size} and '
      f'data.reset={config.reset!r} need. Give more text, or lower them.'
    )
  return stream


def _mix(
  config: DataConfig,
  split: str,
  corpora: Sequence[packing.Corpus],
  orders: Sequence[np.ndarray],
  weights: Sequence[float],
) -> tuple[packing.Corpus, np.ndarray]:
  """The corpora as one, and an order of the documents of a split."""
  lengths = [
    np.diff(corpus.starts)[order]
    for corpus, order in zip(corpora, orders, strict=True)
  ]
  for number, own in enumerate(lengths):
    if not own.sum():
      raise errors.UserError(
        f'data.source={config.source!r}: source {number + 1} has no token for '
        f'{split}. Leave it out, or give more text.'
      )
  sizes = [len(corpus.places) for corpus in corpora]
  bases = np.cumsum([0, *sizes[:-1]])
  if split == 'train':
    which, numbers = mixtures.make_order(lengths, weights, seed=config.seed)
    order = np.zeros(len(which), np.int64)
    for i, base in enumerate(bases):
      mine = which == i
      order[mine] = base + orders[i][numbers[mine]]
  else:
    order = np.concatenate(
      [base + own for base, own in zip(bases, orders, strict=True)]
    )
  return packing.join(corpora, _fingerprint(corpora, weights)), order


# A plan is the number of steps, and a function from a step and the rows of the
# global batch to where each row begins in the stream and where its tokens stop
# counting: (step, int [b]) -> (int [b], int [b]).
_Plan = tuple[int, Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]]]


def _plan_rows(
  config: DataConfig, split: str, length: int, num_epochs: int | None
) -> _Plan:
  """Rows side by side over the stream, shuffled for training."""
  num_tokens, batch_size = config.sequence_length, config.batch_size
  if split == 'train':
    order = grain.MapDataset.range(length // num_tokens)
    order = order.shuffle(seed=config.seed).repeat(num_epochs)
  else:
    num_batches = -(-length // (num_tokens * batch_size))
    order = grain.MapDataset.range(num_batches * batch_size)

  def place(step, rows):
    numbers = np.array([order[step * batch_size + row] for row in rows])
    return numbers * num_tokens, np.full(len(rows), length)

  return len(order) // batch_size, place


def _plan_lanes(
  config: DataConfig, split: str, length: int, num_epochs: int | None
) -> _Plan:
  """A contiguous lane per row; in training it runs on into the next lane."""
  num_tokens, batch_size = config.sequence_length, config.batch_size
  if split == 'train':
    lane = length // batch_size
    num_steps = num_epochs * lane // num_tokens if num_epochs else sys.maxsize
  else:
    lane = -(-length // batch_size)
    num_steps = -(-lane // num_tokens)

  def place(step, rows):
    begins = rows * lane + step * num_tokens
    if split == 'train':
      return begins, begins + num_tokens
    return begins, np.minimum((rows + 1) * lane, length)

  return num_steps, place
