"""Bits per byte of a text, and the loss by position in the context.

The loss of token t of a document as a function of t shows what a memory does: a
model that learns while it reads predicts late tokens better than early ones,
and better than the same model with memory writes off. Both runs read the same
tokens, so that their difference at a position, the gain, compares like with
like; the slope of one curve also depends on which documents are that long.
"""

from collections.abc import Callable, Iterable
import dataclasses
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib import figure as mpl_figure
import numpy as np
import optax

from nested_learning import errors
from nested_learning import files
from nested_learning import levels
from nested_learning import models
from nested_learning.evaluation import scoring

_HEADER = 'position,num_tokens,loss,loss_writes_off,gain'


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """How much of the validation split is read."""

  num_batches: int = 8  # batches of data.batch_size rows, always the same ones
  # Tokens of the streams that are read after training, data.batch_size of them
  # side by side, with memories and levels carried to the end; 0 reads none.
  stream_tokens: int = 8192
  # How levels learn on these streams; off: as in `inner` of the experiment, or,
  # if that is off too, as in a session (`inference.default_inner`).
  inner: levels.InnerConfig = levels.InnerConfig()

  def __post_init__(self):
    errors.check_field(self, 'num_batches', self.num_batches >= 1, 'at least 1')
    fine = self.stream_tokens >= 0
    errors.check_field(self, 'stream_tokens', fine, 'at least 0')


class Totals(NamedTuple):
  """Sums over tokens by position in the context, each float32 [t]."""

  loss: Any  # nats
  num_tokens: Any
  num_bytes: Any


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The loss of a model on a text.

  Attributes:
    totals: Sums by position, float64 NumPy arrays [t]. Position 0 is the first
      token of a document, or of a row that starts inside one.
  """

  totals: Totals

  @property
  def loss(self) -> float:
    """Mean loss in nats per token."""
    return float(self.totals.loss.sum() / self.totals.num_tokens.sum())

  @property
  def score(self) -> float:
    """Validation score, lower is better; selects the best checkpoint."""
    return self.bits_per_byte

  @property
  def numbers(self) -> dict[str, float]:
    """The numbers of a report, by name."""
    return {'loss': self.loss, 'bits_per_byte': self.bits_per_byte}

  @property
  def sentence(self) -> str:
    """The numbers as a sentence."""
    return (
      f'{self.bits_per_byte:.4f} bits per byte on {self.num_tokens:,} tokens '
      'of validation text'
    )

  @property
  def bits_per_byte(self) -> float:
    """Total loss in bits over the bytes of text of the targets."""
    bits = self.totals.loss.sum() / math.log(2)
    return float(bits / self.totals.num_bytes.sum())

  @property
  def num_tokens(self) -> int:
    """Number of targets that were predicted."""
    return int(self.totals.num_tokens.sum())

  @property
  def loss_by_position(self) -> np.ndarray:
    """Mean loss in nats per token at each position [t]; NaN without tokens."""
    with np.errstate(invalid='ignore'):
      return self.totals.loss / self.totals.num_tokens


class Reading(NamedTuple):
  """A way to read text: a model, with writes on or off.

  Attributes:
    model: The model.
    init_state: `init_state(params, num_rows)`, compiled.
    read: `read(params, state, batch)` returns `Totals` by position in the
      context, `Totals` by position in the row, in float64, and the state. Rows
      whose first token is a reset begin anew.
  """

  model: models.Model
  init_state: Callable[[Any, int], Any]
  read: Callable[..., tuple[Totals, Totals, Any]]


def make_reading(
  model: models.Model, byte_lengths: np.ndarray, *, write: bool = True
) -> Reading:
  """Makes a `Reading`, which is compiled once for rows and streams alike.

  Args:
    model: From `models.make_model`.
    byte_lengths: int [v], bytes of text of each token; no more tokens than the
      model has.
    write: Whether memories are written; if not, they stay at their initial
      values, and no level learns.

  Returns:
    The reading. Batches are dicts with tokens and targets int [b, t], mask
    [b, t] (targets that count) and reset bool [b, t]; `read` raises UserError
    if the model does not have a token.

  Raises:
    errors.UserError: If there are more tokens than the model has.
  """
  byte_lengths = jnp.asarray(byte_lengths, jnp.float32)
  vocab_size = scoring.check_vocab_size(model.config, len(byte_lengths))
  token_loss = optax.softmax_cross_entropy_with_integer_labels

  @jax.jit
  def compute(params, state, batch):
    tokens, targets, reset = batch['tokens'], batch['targets'], batch['reset']
    counts = batch['mask'].astype(jnp.float32)
    state = models.restart(model, params, state, reset[:, 0])
    if write and model.losses is not None:  # whole segments, read only once
      loss, state = model.losses(
        params, state, tokens, targets, token_loss, reset=reset
      )
    else:
      logits, state = model.forward(
        params, state, tokens, reset=reset, write=write
      )
      loss = token_loss(logits, targets)  # [b, t]

    def by(position):
      def add(x):
        values = (x * counts).astype(jnp.float32)
        return jnp.zeros(x.shape[1], jnp.float32).at[position].add(values)

      return Totals(
        add(loss), add(jnp.ones_like(loss)), add(byte_lengths[targets])
      )

    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    # A token that the model does not have would make the loss NaN in silence.
    wrong = (tokens < 0) | (tokens >= vocab_size)
    wrong |= ((targets < 0) | (targets >= vocab_size)) & batch['mask']
    sums = by(context_position(reset)), by(index)
    return sums, jnp.sum(wrong), state

  def read(params, state, batch):
    sums, num_wrong, state = compute(params, state, batch)
    if num_wrong:
      raise errors.UserError(
        f'{int(num_wrong)} tokens of a batch are not among the {vocab_size} '
        'of the model; use the tokenizer that the model was trained with.'
      )
    # Summed in float64: float32 stops counting at 2^24 tokens.
    return *jax.tree.map(np.float64, jax.device_get(sums)), state

  return Reading(model, jax.jit(model.init_state, static_argnums=1), read)


def make_evaluate(
  reading: Reading, *, carry: bool = False
) -> Callable[[Any, Iterable[Any]], Evaluation]:
  """Makes `evaluate(params, batches) -> Evaluation` by position in the context.

  Args:
    reading: From `make_reading`.
    carry: Whether row r of a batch continues row r of the batch before, unless
      its first token is a reset; otherwise every row starts a stream.

  Returns:
    The function. It raises UserError if no target counts, or the model does not
    have a token.
  """

  def evaluate(params, batches):
    totals, state = Totals(0.0, 0.0, 0.0), None
    for batch in batches:
      if state is None:
        start = state = reading.init_state(params, len(batch['tokens']))
      sums, _, state = reading.read(params, state, batch)
      state = state if carry else start
      totals = jax.tree.map(np.add, totals, sums)
    return make_evaluation(totals)

  return evaluate


def make_evaluation(totals: Totals) -> Evaluation:
  """Returns the evaluation with these sums.

  Raises:
    errors.UserError: If no target counts.
  """
  if not np.sum(totals.num_bytes):
    raise errors.UserError(
      'no target with text in the batches to evaluate; the validation split '
      'is empty or too small: give more text or raise '
      'data.validation_fraction.'
    )
  return Evaluation(totals)


def context_position(reset: jax.Array) -> jax.Array:
  """Counts the tokens since the last reset, or since the start of the row.

  Args:
    reset: bool [b, t], True at the first token of a document.

  Returns:
    int32 [b, t].
  """
  index = jnp.arange(reset.shape[1], dtype=jnp.int32)
  starts = jnp.where(reset, index, 0)
  return index - jax.lax.cummax(starts, axis=1)


def gain_by_position(
  writes_on: Evaluation, writes_off: Evaluation
) -> np.ndarray:
  """Returns the nats per token that writing saves at each position [t]."""
  return writes_off.loss_by_position - writes_on.loss_by_position


def write_by_position(
  path: pathlib.Path, writes_on: Evaluation, writes_off: Evaluation
) -> None:
  """Writes losses and gain as comma-separated values, a line per position."""
  columns = (
    np.arange(len(writes_on.totals.loss)),
    writes_on.totals.num_tokens,
    writes_on.loss_by_position,
    writes_off.loss_by_position,
    gain_by_position(writes_on, writes_off),
  )
  lines = [
    f'{int(position)},{int(count)},{on:.6f},{off:.6f},{gain:.6f}'
    for position, count, on, off, gain in zip(*columns, strict=True)
    if count
  ]
  files.write_whole(path, '\n'.join([_HEADER, *lines]) + '\n')


def mean_over_bins(evaluation: Evaluation, edges: np.ndarray) -> np.ndarray:
  """Returns the mean loss between successive positions.

  Args:
    evaluation: The losses.
    edges: int [n + 1], positions in ascending order.

  Returns:
    Nats per token, float [n]; NaN where a bin has no token.
  """
  sums = lambda x: np.add.reduceat(x, edges[:-1])
  with np.errstate(invalid='ignore'):
    return sums(evaluation.totals.loss) / sums(evaluation.totals.num_tokens)


def bin_edges(num_positions: int) -> np.ndarray:
  """Returns the edges 0, 1, 2, 3, 4, 6, 8, ..., num_positions, even in log."""
  num_edges = 2 * max(math.ceil(math.log2(num_positions)), 1)
  edges = np.round(2 ** (np.arange(num_edges) / 2)).astype(int)
  return np.unique([0, *edges[edges < num_positions], num_positions])


def plot_by_position(
  path: pathlib.Path, writes_on: Evaluation, writes_off: Evaluation
) -> None:
  """Draws both losses and the gain, in bits per token, as a PNG file."""
  edges = bin_edges(len(writes_on.totals.loss))
  centers = (edges[:-1] + edges[1:] - 1) / 2 + 1
  on = mean_over_bins(writes_on, edges) / math.log(2)
  off = mean_over_bins(writes_off, edges) / math.log(2)
  figure = mpl_figure.Figure(figsize=(7, 6), layout='tight')
  losses, gain = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
  losses.plot(centers, off, 'o-', color='tab:gray', label='writes off')
  losses.plot(centers, on, 'o-', color='tab:blue', label='writes on')
  losses.set_ylabel('loss, bits per token')
  losses.legend()
  gain.axhline(0, color='black', linewidth=0.8)
  gain.plot(centers, off - on, 'o-', color='tab:green')
  gain.set_ylabel('gain, bits per token')
  gain.set_xlabel('position in the context, tokens')
  gain.set_xscale('log')
  figure.savefig(path, dpi=120)
