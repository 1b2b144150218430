"""What the experiments on continual learning share: learners and how they read.

A model is trained on short generated rows, with an outer gradient through the
steps that its levels take. Then it reads a stream, and now and then a copy of
it is asked something, which the stream's reader never hears of.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib import figure as mpl_figure
import numpy as np
import optax
import tqdm

from nested_learning import errors
from nested_learning import layers
from nested_learning import levels
from nested_learning import models

_PIECE = 1024  # tokens of a row that one program reads
_CHUNK = 16  # tokens of a memory's chunk
_WINDOW = 16  # tokens that attention sees, in families that have some


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
  """A small model, and how it is trained before it meets a stream."""

  # Of the zoo: what mixes tokens. A memory that forgets nothing, as deltanet's,
  # says stale things after more tokens than it was trained on.
  family: str = 'gated_deltanet'
  num_layers: int = 1
  embed_dim: int = 32
  num_heads: int = 1
  mlp_dim: int = 64  # of each level
  connection: str = 'sequential'  # of the levels; or 'nested', 'independent'
  num_steps: int = 300
  batch_size: int = 8  # rows
  learning_rate: float = 3e-3


def make_config(
  config: LearnerConfig, vocab_size: int, level_names: Sequence[str]
) -> models.ModelConfig:
  """The config of an experiment's model.

  Args:
    config: Its sizes.
    vocab_size: Tokens that there are.
    level_names: Of the chain, fastest first.

  Returns:
    A config of a model that reads streams of any length.

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
    # Segments are short: wider chunks would be padding.
    chunks = {'chunk_size': _CHUNK, 'chunk_size_others': _CHUNK}
    mixer = dataclasses.replace(made.mixer, **chunks)
    made = dataclasses.replace(made, mixer=mixer)
  return made


def make_model(
  config: LearnerConfig, vocab_size: int, level_names: Sequence[str]
) -> models.Model:
  """Makes the model of an experiment; see `make_config`."""
  return models.make_model(make_config(config, vocab_size, level_names))


def train(
  model: models.Model,
  inner: levels.InnerConfig,
  make_row: Callable[[np.random.Generator], tuple[Any, Any]],
  config: LearnerConfig,
  *,
  seed: int = 0,
  name: str = 'training',
) -> tuple[Any, np.ndarray]:
  """Trains a model on rows, through the steps that its levels take on them.

  Args:
    model: The model.
    inner: How its levels learn inside a row.
    make_row: From a generator of random numbers to tokens int [t] and the
      weights [t] with which each counts, as predicted by those before it.
    config: How many steps of what batch, and the peak of the learning rate.
    seed: Of parameters and rows.
    name: Of the progress bar.

  Returns:
    The parameters, and the loss of every step [step].
  """
  learner = models.make_model(model.config, inner, head=model.head)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0,
    config.learning_rate,
    max(config.num_steps // 20, 1),
    config.num_steps,
    config.learning_rate / 20,
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(schedule, 0.9, 0.98)
  )

  def loss_fn(params, tokens, weights):
    targets = jnp.roll(tokens, -1, axis=1)
    if learner.losses is None:
      logits, _ = learner.forward(params, None, tokens)
      losses = _nats(logits, targets)
    else:
      losses, _ = learner.losses(params, None, tokens, targets, _nats)
    weights = jnp.roll(weights, -1, axis=1).at[:, -1].set(0)
    return jnp.sum(losses * weights) / jnp.sum(weights)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, tokens, weights):
    loss, gradients = jax.value_and_grad(loss_fn)(params, tokens, weights)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss

  params = jax.jit(model.init_params)(jax.random.key(seed))
  state = jax.jit(optimizer.init)(params)
  rng, curve = np.random.default_rng(seed), []
  bar = tqdm.trange(config.num_steps, desc=name)
  for _ in bar:
    rows = [make_row(rng) for _ in range(config.batch_size)]
    tokens, weights = (np.stack(x) for x in zip(*rows, strict=True))
    params, state, loss = step(
      params, state, tokens.astype(np.int32), weights.astype(np.float32)
    )
    curve.append(float(loss))
    bar.set_postfix(loss=f'{np.mean(curve[-20:]):.3f}', refresh=False)
  return params, np.array(curve)


class Said(NamedTuple):
  """What a model said of tokens [..., t].

  Attributes:
    losses: Nats of each token as predicted before it; NaN for the first.
    answers: The likeliest token in its place; -1 for the first.
  """

  losses: np.ndarray
  answers: np.ndarray


class Reading(NamedTuple):
  """A model that reads streams, and learns if it has levels that do.

  Attributes:
    segment_size: Tokens of which every call has a multiple.
    start: `start(params, num_rows)` is the state before the first token.
    read: `read(params, state, tokens)` gives what was `Said` of tokens [b, t]
      and the state after them.
    ask: `ask(params, state, questions, *, allowed=None)` gives what is `Said`
      of questions [n, b, t], each read after the state as if there were no
      other, with no level learning; answers are among the tokens of allowed
      [v]. A question has at most a segment.
  """

  segment_size: int
  start: Callable[[Any, int], Any]
  read: Callable[..., tuple[Said, Any]]
  ask: Callable[..., Said]


def make_reading(
  model: models.Model, inner: levels.InnerConfig, *, segment_size: int
) -> Reading:
  """Makes a model read streams.

  Args:
    model: The model.
    inner: How its levels learn; none does if `update_every` is empty.
    segment_size: Tokens of which every call has a multiple: a multiple of the
      segments of the levels.

  Returns:
    A `Reading`. Reading compiles for two lengths, a segment and many of them.

  Raises:
    errors.UserError: Levels learn from segments that do not fit.
  """
  if inner.is_on:
    names = [level.name for level in model.config.levels]
    size = levels.segment_size(levels.make_levels(inner, names))
    if segment_size % size:
      raise errors.UserError(
        f'inner.update_every={inner.update_every} makes segments of {size} '
        f'tokens, and {segment_size} is not a multiple of them; change '
        'inner.update_every.'
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
    judge = lambda logits, targets: _judge(logits, targets, True)
    return losses(params, state, tokens, targets, judge)

  @jax.jit
  def ask_all(params, state, questions, allowed):
    def one(tokens):
      logits, _ = look(params, state, tokens)
      return _judge(logits, jnp.roll(tokens, -1, axis=-1), allowed)

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
    said, begin = [], 0
    while begin < num_tokens:
      size = long if num_tokens - begin >= long else segment_size
      part = slice(begin, begin + size)
      piece, state = read_piece(
        params, state, tokens[:, part], targets[:, part]
      )
      said.append(piece)
      begin += size
    return _said(np.concatenate([np.asarray(x) for x in said], axis=1)), state

  def ask(params, state, questions, *, allowed=None):
    if allowed is None:
      allowed = np.ones(model.config.vocab_size, bool)
    questions = np.asarray(questions, np.int32)
    return _said(np.asarray(ask_all(params, state, questions, allowed)))

  return Reading(segment_size, jax.jit(init_state, static_argnums=1), read, ask)


def only(inner: levels.InnerConfig, which: Iterable[int]) -> levels.InnerConfig:
  """The same levels, of which all but some rest, on the same segments.

  Args:
    inner: How levels learn, fastest first.
    which: Indices of those that go on learning.

  Returns:
    A config for the same chain. A level faster than all that learn keeps its
    clock and has a rate of 0, so that the stream is cut as before.
  """
  which = set(which)
  sizes, count = inner.update_every, len(inner.update_every)
  rates = inner.learning_rates
  rates = rates * count if len(rates) == 1 else rates
  slowest = max(which, default=-1)
  return dataclasses.replace(
    inner,
    update_every=tuple(
      x if i <= slowest else None for i, x in enumerate(sizes)
    ),
    learning_rates=tuple(x if i in which else 0.0 for i, x in enumerate(rates)),
  )


def print_warnings(state: Any, name: str) -> None:
  """Prints what is wrong with the levels of a stream, if any learn.

  Args:
    state: From a `Reading`.
    name: Of the learner.
  """
  if isinstance(state, levels.State):
    for warning in levels.health_warnings(levels.measure_health(state)):
      print(f'{name}: {warning}', flush=True)


def mean_and_spread(values: Iterable[float]) -> str:
  """Mean and standard deviation over seeds or streams, as text."""
  values = np.asarray(list(values), np.float64)
  spread = f' ± {np.std(values):.3f}' if len(values) > 1 else ''
  return f'{np.mean(values):.3f}{spread}'


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
  """Draws one line per name, with its spread over rows.

  Args:
    path: Of the picture.
    x: [x].
    curves: From name to values [row, x] or [x].
    xlabel: What x is.
    ylabel: What the values are.
    log_x: Whether x is on a logarithmic axis, linear below its first positive.
    floor: Where to draw what a guess gives; None for nowhere.
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


def _nats(logits, targets):
  return optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), targets
  )


def _judge(logits, targets, allowed):
  """Nats and likeliest allowed token, float32 [..., 2]."""
  answers = jnp.argmax(jnp.where(allowed, logits, -jnp.inf), axis=-1)
  return jnp.stack([_nats(logits, targets), answers.astype(jnp.float32)], -1)


def _said(judged):
  """What was said at a token, of the next one, as said of that one."""
  losses, answers = (np.roll(judged[..., i], 1, axis=-1) for i in range(2))
  losses[..., 0], answers[..., 0] = np.nan, -1
  return Said(losses, answers.astype(np.int32))
