"""Cost of levels that learn while they read: ratios of one run.

Command:
  python launch/run.py --config=experiments/benchmarks/levels.py \
    --workdir=runs/levels

Hardware: two CPU cores.
Result: experiments/results/benchmarks/README.md. A session runs at 0.79 of the
speed of its model with the last quarter of the blocks learning.

summary.json has
  session_over_frozen: tokens per second of a session whose levels step every
    512, 2K and 8K tokens in the last quarter of the blocks, over those of the
    model at rest that reads the same segments;
  session_over_frozen_dgd: with Delta Gradient Descent in every level;
  session_over_frozen_all_blocks, session_over_frozen_all_blocks_local: with all
    blocks learning, and with a local objective in all of them;
  bound and bound_*: the same ratios by matmul operations alone;
  flatness_to_1m: time per token at the end of a stream of `stream_tokens` over
    the time at its start; experiments/benchmarks/levels.py:long reads a million
    tokens;
  state_bytes_growth: size of the state at the end over its size at the start;
  meta_memory_exponent: power of the number of segments with which the temporary
    memory of an outer gradient grows; 0.5 is a square root.
"""

from collections.abc import Mapping
import dataclasses
import time
from typing import Any

import jax
import numpy as np
import optax
import tqdm

from experiments import report_files
from experiments.benchmarks import timing
from nested_learning import compilation
from nested_learning import errors
from nested_learning import inference
from nested_learning import levels
from nested_learning import models
from nested_learning import optimizers
from nested_learning.layers import attention


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """Sizes of the model and of its streams."""

  num_layers: int = 4
  embed_dim: int = 256
  mlp_dim: int = 256  # of each of three levels
  window: int = 512  # tokens of attention
  update_every: tuple[int, ...] = (512, 2048, 8192)  # tokens
  num_segments: int = 16  # timed segments of each kind
  stream_tokens: int = 65_536  # tokens of the stream of the flatness
  meta_segments: tuple[int, ...] = (16, 64, 256)  # rows of outer gradients
  meta_update_every: int = 16  # tokens; few, so that carried states dominate
  meta_embed_dim: int = 64
  repeats: int = 3  # runs of each function; the fastest counts


def get_config(arg: str | None = None) -> BenchmarkConfig:
  """Returns the benchmark; 'long' reads a million tokens, 'small' few."""
  if arg == 'small':
    return BenchmarkConfig(
      num_layers=1,
      embed_dim=16,
      mlp_dim=16,
      window=8,
      update_every=(8, 16, 32),
      num_segments=4,
      stream_tokens=64,
      meta_segments=(4, 64),
      meta_update_every=4,
      meta_embed_dim=16,
      repeats=1,
    )
  if arg == 'long':
    return BenchmarkConfig(stream_tokens=2**20)
  if arg is not None:
    raise errors.UserError(f"{arg!r} must be 'long' or 'small', or nothing.")
  return BenchmarkConfig()


def run(config: BenchmarkConfig, workdir: str, mode: str) -> None:
  """Measures all parts and writes the ratios."""
  report_files.check_mode(mode)
  summary = {}
  for part in tqdm.tqdm((_speed, _stream, _memory), desc='benchmark'):
    summary |= part(config)
  report_files.write_numbers(
    workdir,
    config,
    module=__name__,
    summary=summary,
    title=['# Levels that learn while they read'],
  )


# Arguments of `levels.make_inner` for each measured session.
_VARIANTS = {
  'session_over_frozen': {},
  'session_over_frozen_dgd': {'optimizer': optimizers.configs.Dgd()},
  'session_over_frozen_all_blocks': {'depth': 1.0},
  'session_over_frozen_all_blocks_local': {'depth': 1.0, 'objective': 'dot'},
}


def make_session(
  config: Any,
  mlp_dims: Mapping[str, int],
  *,
  tokenizer_fingerprint: str = '',
  **changes,
) -> inference.Session:
  """Makes a session on a small model with attention and levels that learn.

  Args:
    config: Has `num_layers`, `embed_dim`, `window` and `update_every`.
    mlp_dims: Width of each level by name.
    tokenizer_fingerprint: See `inference.Session`.
    **changes: Of the levels, see `levels.make_inner`.
  """
  heads = max(config.embed_dim // 64, 1)
  model = models.make_model(
    models.ModelConfig(
      vocab_size=257,
      num_layers=config.num_layers,
      embed_dim=config.embed_dim,
      mixer=attention.AttentionConfig(
        heads, heads, config.embed_dim // heads, window=config.window
      ),
      levels=tuple(models.LevelConfig(*x) for x in mlp_dims.items()),
      max_length=max(config.update_every),
    )
  )
  params = jax.jit(model.init_params)(jax.random.key(0))
  inner = levels.make_inner(config.update_every, learning_rate=1e-3, **changes)
  return inference.Session(
    model, params, inner, tokenizer_fingerprint=tokenizer_fingerprint
  )


def _session(config: BenchmarkConfig, **changes) -> inference.Session:
  names = ('fast', 'middle', 'slow')
  return make_session(config, dict.fromkeys(names, config.mlp_dim), **changes)


def _tokens(num_tokens: int) -> np.ndarray:
  return np.random.default_rng(0).integers(257, size=num_tokens)


def _speed(config: BenchmarkConfig) -> dict[str, float]:
  """Measures sessions against their model, which reads the same segments."""
  sessions = {
    name: _session(config, **changes) for name, changes in _VARIANTS.items()
  }
  session = sessions['session_over_frozen']
  model, size = session.model, session.segment_size
  tokens = _tokens(config.num_segments * size)
  forward = jax.jit(model.forward)

  def frozen():
    state = model.init_state(session.params, 1)
    for part in np.split(tokens[None], config.num_segments, axis=1):
      logits, state = forward(session.params, state, part)
      losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], part[:, 1:]
      )
      np.asarray(losses)

  functions = {'frozen': (frozen,)} | {
    name: (_feed, session, tokens) for name, session in sessions.items()
  }
  times = timing.fastest(functions, config.repeats)
  return {
    **{name: times['frozen'] / times[name] for name in sessions},
    **{
      name.replace('session_over_frozen', 'bound'): _bound(session)
      for name, session in sessions.items()
    },
    'tokens_per_second_frozen': len(tokens) / times['frozen'],
    'tokens_per_second_session': len(tokens) / times['session_over_frozen'],
  }


def _feed(session: inference.Session, tokens: np.ndarray) -> None:
  session.fork().feed(tokens)


def _bound(session: inference.Session) -> float:
  """Counts matmul operations of the model over those of the session."""
  model = session.model
  reader = models.make_model(model.config, session.inner).reader
  tokens = jax.ShapeDtypeStruct((1, session.segment_size), np.int32)
  params = jax.eval_shape(reader.prepare, session.params)
  count = lambda function, init: compilation.matmul_flops(
    function, params, jax.eval_shape(lambda p: init(p, 1), params), tokens
  )
  return count(model.forward, model.init_state) / count(
    reader.read_segments, reader.init_state
  )


def _stream(config: BenchmarkConfig) -> dict[str, float]:
  """Measures time per token and state at both ends of a stream."""
  session = _session(config)
  part = max(config.update_every)  # every part has the same steps
  tokens = _tokens(part)
  session.fork().feed(tokens)  # compiles
  begin = sum(x.nbytes for x in jax.tree.leaves(session.state))
  seconds = []
  for _ in tqdm.trange(config.stream_tokens // part, desc='stream'):
    start = time.perf_counter()
    session.feed(tokens)
    seconds.append(time.perf_counter() - start)
  share = max(len(seconds) // 4, 1)
  end = sum(x.nbytes for x in jax.tree.leaves(session.state))
  return {
    'flatness_to_1m': np.median(seconds[-share:]) / np.median(seconds[:share]),
    'flatness_tokens': int(session.clock[0]),
    'state_bytes': end,
    'state_bytes_growth': end / begin,
  }


def _memory(config: BenchmarkConfig) -> dict[str, float]:
  """Measures the memory of outer gradients of rows of several lengths."""
  size, width = config.meta_update_every, config.meta_embed_dim
  learner = models.make_model(
    models.ModelConfig(
      vocab_size=64,
      num_layers=1,
      embed_dim=width,
      mixer=attention.AttentionConfig(2, 2, width // 2, window=size),
      levels=(models.LevelConfig('mlp', 4 * width),),
      max_length=size * max(config.meta_segments),
    ),
    levels.make_inner((size,), learning_rate=0.1),
  )
  params = jax.eval_shape(learner.init_params, jax.random.key(0))
  sizes = []
  for count in config.meta_segments:
    tokens = jax.ShapeDtypeStruct((1, count * size), np.int32)

    def loss(params, tokens):
      losses, _ = learner.losses(
        params,
        None,
        tokens,
        tokens,
        optax.softmax_cross_entropy_with_integer_labels,
      )
      return losses.mean()

    compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
    sizes.append(compiled.memory_analysis().temp_size_in_bytes)
  slope, _ = np.polyfit(np.log(config.meta_segments), np.log(sizes), 1)
  return {
    'meta_memory_exponent': float(slope),
    **{
      f'meta_bytes_{count}_segments': value
      for count, value in zip(config.meta_segments, sizes, strict=True)
    },
  }
