"""Trains and reads streams in the experiments on continual learning.

A model is trained on short generated rows, with an outer gradient through the
steps of its levels. Then it reads a stream. Now and then a copy of its state is
asked questions, which leave no trace in the stream.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import io
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib import figure as mpl_figure
import numpy as np
import optax

from nested_learning import errors
from nested_learning import evaluation
from nested_learning import files
from nested_learning import layers
from nested_learning import levels
from nested_learning import models
from nested_learning import parameters
from nested_learning import training

_PIECE = 1024  # tokens of a row that one call of the program reads
_CHUNK = 16  # tokens of a memory's chunk
_WINDOW = 16  # tokens that attention sees, in families that have some


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
  """A small model, and how it is trained before it meets a stream."""

  # A family of the zoo. A memory that forgets nothing, such as deltanet's,
  # answers with stale facts on streams longer than its training rows.
  family: str = 'gated_deltanet'
  num_layers: int = 1
  embed_dim: int = 32
  num_heads: int = 1
  mlp_dim: int = 64  # of each level
  connection: str = 'sequential'  # of the levels; or 'nested', 'independent'
  num_steps: int = 300  # 0 leaves the initial parameters
  batch_size: int = 8  # rows
  learning_rate: float = 3e-3


def make_config(
  config: LearnerConfig, vocab_size: int, level_names: Sequence[str]
) -> models.ModelConfig:
  """Makes the config of a model that reads streams of any length.

  Args:
    config: The family and its sizes.
    vocab_size: Number of tokens.
    level_names: Names of the levels of the chain, fastest first.

  Returns:
    The config.

  Raises:
    errors.UserError: The zoo has no such family, or its state is limited.
  """
  if config.family not in models.zoo.FAMILIES:
    raise errors.UserError(
      f'learner.family={config.family!r} must be one of '
      f'{", ".join(models.zoo.FAMILIES)}.'
    )
  size = models.zoo.Size(
    num_layers=config.num_layers,
    embed_dim=config.embed_dim,
    num_heads=config.num_heads,
    mlp_dim=config.mlp_dim,
    vocab_size=vocab_size,
    max_length=2**20,
    window=_WINDOW,
  )
  chain = tuple(
    models.LevelConfig(name, config.mlp_dim) for name in level_names
  )
  made = models.zoo.make_sized(
    config.family,
    size,
    levels=chain,
    chain=models.ChainConfig(config.connection),
  )
  if models.max_stream_length(made) is not None:
    raise errors.UserError(
      f'learner.family={config.family!r} holds a limited number of tokens, and '
      'a stream has any; use one with a state of constant size, as '
      "'gated_deltanet'."
    )
  if isinstance(made.mixer, layers.MemoryMixerConfig):
    # Segments are short; wider chunks would be padding.
    chunks = {'chunk_size': _CHUNK, 'chunk_size_others': _CHUNK}
    mixer = dataclasses.replace(made.mixer, **chunks)
    made = dataclasses.replace(made, mixer=mixer)
  return made


def train(
  model: models.Model,
  inner: levels.InnerConfig,
  make_row: Callable[[np.random.Generator], tuple[Any, Any]],
  config: LearnerConfig,
  *,
  seed: int = 0,
  name: str = 'training',
  file: pathlib.Path | None = None,
) -> tuple[Any, np.ndarray]:
  """Trains a model on rows, with a gradient through the steps of its levels.

  Args:
    model: The model.
    inner: How its levels learn inside a row.
    make_row: `make_row(rng)` returns tokens int [t] and the weight [t] of the
      loss of each, as predicted by the tokens before it.
    config: Number of steps, batch size and peak learning rate.
    seed: Seed of parameters and rows.
    name: Label of the progress bar.
    file: Where the result is kept; if it is there, no training is needed. None
      keeps none.

  Returns:
    The parameters, and the loss of every step [step].
  """

  def make():
    params, losses = _train(model, inner, make_row, config, seed, name)
    leaves = jax.tree.leaves_with_path(params)
    named = {parameters.path_name(path): x for path, x in leaves}
    return {**named, 'losses': losses}

  found = make() if file is None else remember(file, make)
  shapes = jax.eval_shape(model.init_params, jax.random.key(0))
  params = jax.tree_util.tree_map_with_path(
    lambda path, _: jnp.asarray(found[parameters.path_name(path)]), shapes
  )
  return params, np.asarray(found['losses'])


def remember(
  file: pathlib.Path, make: Callable[[], Mapping[str, Any]]
) -> dict[str, np.ndarray]:
  """Returns arrays by name from a file, or makes them and writes the file."""
  if not file.exists():
    content = io.BytesIO()
    np.savez(content, **make())
    files.write_whole(file, content.getvalue())
  with np.load(file) as found:
    return dict(found)


def _train(model, inner, make_row, config, seed, name):
  learner = models.make_model(model.config, inner, head=model.head)
  num_steps = max(config.num_steps, 2)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0,
    config.learning_rate,
    max(num_steps // 20, 1),
    num_steps,
    config.learning_rate / 20,
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(schedule, 0.9, 0.98)
  )

  def batches():
    rng = np.random.default_rng(seed)
    while True:
      rows = [make_row(rng) for _ in range(config.batch_size)]
      tokens, weights = (np.stack(x) for x in zip(*rows, strict=True))
      tokens = tokens.astype(np.int32)  # [b, t]
      weights = np.roll(weights.astype(np.float32), -1, axis=1)
      weights[:, -1] = 0  # the last token has no target
      yield {
        'tokens': tokens,
        'targets': np.roll(tokens, -1, axis=1),
        'mask': weights,
        'reset': np.zeros(tokens.shape, bool),
      }

  return training.fit(
    learner,
    optimizer,
    batches(),
    config.num_steps,
    token_loss=evaluation.cross_entropy,
    seed=seed,
    name=name,
  )


class Predictions(NamedTuple):
  """Predictions of tokens [..., t] from the tokens before them.

  Attributes:
    losses: Loss of each token in nats; NaN for the first.
    answers: Most likely token at each position; -1 for the first.
    confidences: Its log-probability, in nats; NaN for the first.
  """

  losses: np.ndarray
  answers: np.ndarray
  confidences: np.ndarray


class StreamReader(NamedTuple):
  """A model that reads streams; its levels learn if `inner` says so.

  Attributes:
    segment_size: Every call reads a multiple of this many tokens.
    start: `start(params, num_rows)` is the state before the first token.
    read: `read(params, state, tokens)` returns the `Predictions` of tokens
      [b, t] and the state after them.
    ask: `ask(params, state, questions, *, allowed=None)` returns the
      `Predictions` of questions [n, b, t]. Each is read from the same state,
      with no level learning; answers and their probabilities are among the
      tokens of allowed [v]. A question has at most a segment.
  """

  segment_size: int
  start: Callable[[Any, int], Any]
  read: Callable[..., tuple[Predictions, Any]]
  ask: Callable[..., Predictions]


def make_reading(
  model: models.Model, inner: levels.InnerConfig, *, segment_size: int
) -> StreamReader:
  """Makes a reader of streams.

  Args:
    model: The model.
    inner: How its levels learn; none does if `levels` is empty.
    segment_size: Tokens of which every call has a multiple: a multiple of the
      segments of the levels.

  Returns:
    A `StreamReader`. It compiles for two lengths: a segment and many of them.

  Raises:
    errors.UserError: Segments of the levels do not fit.
  """
  if inner.is_on:
    names = [level.name for level in model.config.levels]
    size = levels.segment_size(levels.make_levels(inner, names))
    if segment_size % size:
      raise errors.UserError(
        f'inner.levels, with update_every={inner.update_every}, make segments '
        f'of {size} tokens, and {segment_size} is not a multiple of them; '
        'change inner.levels.'
      )
    reader = models.make_model(model.config, inner, head=model.head).reader
    init_state, losses = reader.init_state, reader.losses

    def look(params, state, tokens):
      marks = jnp.zeros(tokens.shape, bool)
      return reader.read_piece(params, state, tokens, reset=marks, mask=~marks)
  else:
    init_state, look = model.init_state, model.forward

    def losses(params, state, tokens, targets, token_loss):
      logits, state = model.forward(params, state, tokens)
      return token_loss(logits, targets), state

  @jax.jit
  def read_piece(params, state, tokens, targets):
    score = lambda logits, targets: _score(logits, targets, True)
    return losses(params, state, tokens, targets, score)

  @jax.jit
  def ask_all(params, state, questions, allowed):
    def one(tokens):
      logits, _ = look(params, state, tokens)
      return _score(logits, jnp.roll(tokens, -1, axis=-1), allowed)

    return jax.lax.map(one, questions, batch_size=min(16, len(questions)))

  def read(params, state, tokens):
    tokens = np.asarray(tokens, np.int32)
    num_tokens = tokens.shape[1]
    if num_tokens % segment_size:
      raise ValueError(
        f'{num_tokens} tokens are no whole segments of {segment_size}.'
      )
    targets = np.roll(tokens, -1, axis=1)
    long = max(_PIECE // segment_size, 1) * segment_size
    scores, begin = [], 0
    while begin < num_tokens:
      size = long if num_tokens - begin >= long else segment_size
      part = slice(begin, begin + size)
      piece, state = read_piece(
        params, state, tokens[:, part], targets[:, part]
      )
      scores.append(piece)
      begin += size
    scores = np.concatenate([np.asarray(x) for x in scores], axis=1)
    return _predictions(scores), state

  def ask(params, state, questions, *, allowed=None):
    if allowed is None:
      allowed = np.ones(model.config.vocab_size, bool)
    questions = np.asarray(questions, np.int32)
    return _predictions(np.asarray(ask_all(params, state, questions, allowed)))

  return StreamReader(
    segment_size, jax.jit(init_state, static_argnums=1), read, ask
  )


def only(inner: levels.InnerConfig, which: Iterable[int]) -> levels.InnerConfig:
  """Stops all levels but some from learning, and keeps the segments.

  Args:
    inner: How levels learn, fastest first.
    which: Indices of the levels that continue to learn.

  Returns:
    A config for the same chain. A level faster than all that learn keeps its
    clock and gets a rate of 0, so that the segments stay the same.
  """
  which = set(which)
  slowest = max(which, default=-1)

  def change(i, level):
    if i in which:
      return level
    size = level.update_every if i <= slowest else None
    return dataclasses.replace(level, update_every=size, learning_rate=0.0)

  changed = tuple(change(i, level) for i, level in enumerate(inner.levels))
  return dataclasses.replace(inner, levels=changed)


def make_unmixed(
  model: models.Model, inner: levels.InnerConfig, *, segment_size: int
) -> StreamReader:
  """Makes a reader of a nested chain's states, to ask the whole chain alone.

  Args:
    model: The model, with a nested chain.
    inner: As for `make_reading`.
    segment_size: As for `make_reading`.

  Returns:
    A `StreamReader` that takes states of `unmixed`.
  """
  plain = dataclasses.replace(model.config, chain=models.ChainConfig())
  return make_reading(
    models.make_model(plain, head=model.head), inner, segment_size=segment_size
  )


def unmixed(state: levels.State) -> levels.State:
  """Returns the state of the member of a nested chain that has all levels."""
  first = lambda part: part._replace(model=part.model[:1], mixture=())
  return first(state)._replace(segment=first(state.segment))


def print_warnings(state: Any, name: str) -> None:
  """Prints warnings about the levels of a stream, if any learn.

  Args:
    state: State of a `StreamReader`.
    name: Name of the learner.
  """
  if isinstance(state, levels.State):
    for warning in levels.health_warnings(levels.measure_health(state)):
      print(f'{name}: {warning}', flush=True)


def plot_lines(
  path: pathlib.Path,
  x: Sequence[float],
  curves: Mapping[str, Any],
  *,
  xlabel: str,
  ylabel: str,
  log_x: bool = True,
  floor: float | None = None,
) -> None:
  """Plots one line per name, with its spread over rows.

  Args:
    path: Path of the picture.
    x: Values of x, [x].
    curves: Values [row, x] or [x] by name.
    xlabel: Label of the x axis.
    ylabel: Label of the y axis.
    log_x: Whether the x axis is logarithmic; it is linear below the first
      positive x.
    floor: Height of a line for the value of a guess; None draws none.
  """
  figure = mpl_figure.Figure(figsize=(8, 4.5), layout='constrained')
  axes = figure.subplots()
  for i, (name, values) in enumerate(curves.items()):
    values = np.atleast_2d(np.asarray(values, np.float64))
    mean, spread = np.mean(values, axis=0), np.std(values, axis=0)
    style = {'color': f'C{i % 10}', 'linestyle': ('-', '--')[i // 10 % 2]}
    axes.plot(x, mean, marker='.', label=name, **style)
    axes.fill_between(
      x, mean - spread, mean + spread, color=style['color'], alpha=0.12
    )
  if log_x:
    axes.set_xscale('symlog', linthresh=min(v for v in x if v > 0))
  if floor is not None:
    axes.axhline(floor, color='black', linewidth=0.8, linestyle=':')
  axes.set(xlabel=xlabel, ylabel=ylabel)
  axes.legend(fontsize=8)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)


def _score(logits, targets, allowed):
  """Returns loss, the likeliest allowed token, its log-probability [..., 3]."""
  losses = evaluation.cross_entropy(logits, targets)
  logits = jnp.where(allowed, logits, -jnp.inf)
  answers = jnp.argmax(logits, axis=-1)
  confidences = -evaluation.cross_entropy(logits, answers)
  return jnp.stack([losses, answers.astype(jnp.float32), confidences], -1)


def _predictions(scores):
  """Moves the scores [..., t, 3] of next tokens to those tokens."""
  losses, answers, confidences = (
    np.roll(scores[..., i], 1, axis=-1) for i in range(3)
  )
  for first in (losses, confidences):
    first[..., 0] = np.nan
  answers[..., 0] = -1
  return Predictions(losses, answers.astype(np.int32), confidences)
