"""Batches of text as a pure function of the step.

The position in the token stream where row r of the global batch begins depends
on the step alone. So the state of an iterator is the step: it restores in
constant time, on any number of processes, and a process makes only its rows.
"""

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import sys
from typing import Any, Literal

import grain
import numpy as np

from nested_learning import errors
from nested_learning.data import corpus as corpus_lib
from nested_learning.data import formats
from nested_learning.data import streams
from nested_learning.data import token_files
from nested_learning.data import tokenizers

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The text to train on, and how it is cut into batches."""

  # 'stdlib', a folder, a file or a glob of text files; another format (see
  # `formats`); a folder that launch/prepare.py made; or a mixture of these by
  # share of the tokens, '0.7*web/*.parquet + 0.3*code'.
  source: str = 'stdlib'
  text_field: str = 'text'  # field of the text, in formats with fields
  tokenizer: str = 'bytes'  # or the path of a .model or .json file
  sequence_length: int = 1024  # tokens per row
  batch_size: int = 8  # rows per step, over all processes
  # Where memories begin anew: at starts of documents and rows; or rows go on
  # where those of the batch before stopped, and memories and levels begin anew
  # after every stream_tokens tokens, or never.
  reset: Literal['document', 'stream', 'never'] = 'document'
  stream_tokens: int = 8192  # tokens of a stream, with reset='stream'
  # Share of the documents that is held out; of the tokens, if a source is a
  # single text. 0 trains without validation.
  validation_fraction: float = 0.05
  seed: int = 0  # for the order of documents and rows
  cache_dir: str | None = None  # for tokens; None: in the user's cache

  def __post_init__(self):
    errors.check_choices(self)
    for name in ('sequence_length', 'batch_size'):
      errors.check_field(self, name, getattr(self, name) >= 1, 'at least 1')
    if self.reset == 'stream':
      fine = self.stream_tokens >= 1
      fine &= self.stream_tokens % self.sequence_length == 0
      errors.check_field(
        self,
        'stream_tokens',
        fine,
        f'a multiple of sequence_length={self.sequence_length}',
      )
    errors.check_field(
      self,
      'validation_fraction',
      0 <= self.validation_fraction < 1,
      'at least 0 and below 1',
    )
    errors.check_field(
      self, 'seed', 0 <= self.seed < 2**32, 'at least 0 and below 2**32'
    )
    for name in ('source', 'tokenizer', 'cache_dir'):
      value = getattr(self, name) or ''
      errors.check_field(self, name, '\0' not in value, 'free of NUL')

  @property
  def has_validation(self) -> bool:
    """True if a part of the text is held out."""
    return self.validation_fraction > 0

  @property
  def carries_state(self) -> bool:
    """True if a row of a batch continues the same row of the batch before."""
    return self.reset != 'document'


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
    self._num_steps, self._stream = num_steps, stream

  def __iter__(self):
    return self

  def __next__(self) -> Batch:
    return next(self._batches)

  def get_state(self) -> dict[str, Any]:
    """Returns the step, and the settings that must be the same to restore."""
    step = self._batches.get_state()['next_index']
    return {'step': step, 'stream': dict(self._stream)}

  def set_state(self, state: dict[str, Any]):
    """Restores a state: the next batch is the one that followed it.

    Args:
      state: From `get_state`, perhaps with another number of processes.

    Raises:
      UserError: The state belongs to other data.
    """
    theirs = state.get('stream') if isinstance(state, dict) else None
    theirs = theirs if isinstance(theirs, dict) else {}
    for name, value in self._stream.items():
      saved = theirs.get(name)
      if saved != value:
        raise errors.UserError(
          f'The checkpoint was made on data with {name}={saved!r}, not '
          f'{value!r}. Restore the text and the settings in data.*, or start '
          'in another workdir.'
        )
    step = state.get('step')
    if type(step) is not int or not 0 <= step <= self._num_steps:
      raise errors.UserError(
        f'The checkpoint has the position step={step!r} in its data, which is '
        f'not among {self._num_steps} steps. Use another checkpoint.'
      )
    self._batches.set_state({'next_index': step})


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
  With reset='document' this stream is cut into rows, which are shuffled anew in
  every epoch; memories start afresh in a row that begins inside a document.
  With reset='never' it is cut into batch_size lanes, and row r of a batch
  continues row r of the batch before. So it does with reset='stream', where
  each lane begins a new stream every stream_tokens tokens, at a step of its
  own. Training on a mixture keeps its shares; validation reads the held-out
  documents of every source.

  Training drops the tokens that do not fill a row and, after num_epochs, the
  rows that do not fill a batch. Validation keeps the order of the files and
  counts every token once: positions beyond the end are padding, mask False.

  Args:
    config: The data.
    split: 'train' or 'validation'. No text is in both.
    process_index: Number of this process's slice of each batch.
    process_count: Number of slices.
    num_epochs: Passes over the training data; None is without end. Validation
      is always one pass.

  Returns:
    An iterator of dicts of arrays [batch_size / process_count,
    sequence_length]: `tokens` and `targets` int32; `mask` bool, the targets
    that count; `reset` bool, where memories forget; `document` int32, counted
    from 0 in each row. It has `get_state` and `set_state`.

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
  mixture = streams.parse_mixture(config.source)
  corpora = [_load(config, source, tokenizer) for source in mixture]
  fingerprint = _fingerprint(corpora, list(mixture.values()))
  stream = _make_stream(config, split, corpora, list(mixture.values()))
  make_plan = _plan_lanes if config.carries_state else _plan_rows
  num_steps, place = make_plan(config, split, stream.length, num_epochs)

  def make_batch(step: int) -> Batch:
    begins, ends = place(step, rows)
    batch = streams.pack(stream, begins, length=config.sequence_length)
    if config.carries_state:
      batch['reset'] = np.zeros_like(batch['reset'])
    batch['reset'][:, 0] |= _begins(config, step, rows)
    batch['mask'] = (
      begins[:, None] + np.arange(config.sequence_length) < ends[:, None]
    )
    return batch

  identity = dataclasses.asdict(config)
  for name in ('source', 'text_field', 'cache_dir'):
    del identity[name]
  if config.reset != 'stream':  # so that older checkpoints have the same
    del identity['stream_tokens']
  identity |= {
    'tokenizer': tokenizer.fingerprint,
    'text': fingerprint,
    'split': split,
  }
  return Batches(make_batch, num_steps, stream=identity)


def _begins(config: DataConfig, step: int, rows: np.ndarray) -> np.ndarray:
  """Returns which rows of the global batch begin a stream at a step."""
  match config.reset:
    case 'document':
      return np.ones(len(rows), bool)
    case 'never':
      return np.full(len(rows), step == 0)
  # Lanes begin at different steps, so that a batch has early and late rows.
  period = config.stream_tokens // config.sequence_length
  phases = rows * period // config.batch_size
  return (step + phases) % period == 0 if step else np.ones(len(rows), bool)


def _load(
  config: DataConfig, source: str, tokenizer: tokenizers.Tokenizer
) -> corpus_lib.Corpus:
  """Loads the tokens of one source, or makes them."""
  if token_files.holds_tokens(source):
    return token_files.load(source, tokenizer)
  return corpus_lib.load_corpus(
    formats.open_documents(source, text_field=config.text_field),
    tokenizer,
    cache_dir=config.cache_dir,
  )


def _fingerprint(
  corpora: Sequence[corpus_lib.Corpus], weights: Sequence[float]
) -> str:
  """Returns the fingerprint of the text and, in a mixture, of its shares."""
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
  corpora: Sequence[corpus_lib.Corpus],
  weights: Sequence[float],
) -> streams.Stream:
  """Makes the stream of a split, long enough for a row."""
  if split == 'validation' and not config.has_validation:
    raise errors.UserError(
      'data.validation_fraction=0 holds nothing out to evaluate on; set it '
      'above 0.'
    )
  splits = streams.split(corpora, config.validation_fraction)
  stream = streams.make_stream(
    corpora,
    [getattr(own, split) for own in splits],
    weights,
    seed=config.seed if split == 'train' else None,
  )
  needed = 1
  if split == 'train':
    lanes = config.batch_size if config.carries_state else 1
    needed = lanes * config.sequence_length
  if stream.length < needed:
    raise errors.UserError(
      f'data.source={config.source!r} has {stream.length} tokens for '
      f'{split}, fewer than the {needed} that data.sequence_length='
      f'{config.sequence_length}, data.batch_size={config.batch_size} and '
      f'data.reset={config.reset!r} need. Give more text, or lower them.'
    )
  return stream


# A plan is the number of steps, and a function from a step and rows of the
# global batch, int [b], to the positions in the stream where each row begins
# and where its targets stop counting, both int [b].
_Plan = tuple[int, Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]]]


def _plan_rows(
  config: DataConfig, split: str, length: int, num_epochs: int | None
) -> _Plan:
  """Plans rows side by side over the stream, shuffled for training."""
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
  """Plans a lane per row; in training it continues into the next lane."""
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
