"""Speed of the memory engine: ratios of one run on one machine.

Command:
  python launch/run.py --config=experiments/benchmarks/engine.py \
    --workdir=runs/engine

Hardware: two CPU cores and 15 GB, seven minutes. Writes summary.json with:

  chunk_over_token_loop    forward and backward pass of one layer
  hope_over_transformer    speed of a training step, equal parameter count
  hope_flop_ceiling        the same if both ran at one rate of operations; the
                           branch for borders between documents is not counted
  share_of_matmul_rate     of a training step of Hope
  flatness_1k_32k          training time per token of a 32K row over 1K rows
  flatness_1k_32k_work     the same in CPU time of the program, without the
                           system's
  decode_flatness_1k_100k  generation time per token after 100K over 1K tokens

`:decoding` and the like run one part; `taskset -c 1` takes one core.

Results: experiments/results/benchmarks/README.md.
"""

import dataclasses

import jax
import jax.numpy as jnp
import tqdm

from experiments import report_files
from experiments.benchmarks import timing
from nested_learning import compilation
from nested_learning import data
from nested_learning import errors
from nested_learning import models
from nested_learning import parameters
from nested_learning import training
from nested_learning.layers import attention
from nested_learning.layers import base
from nested_learning.layers import memory_mixer


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """Sizes of the models and lengths of the streams."""

  num_layers: int = 4
  embed_dim: int = 256
  num_heads: int = 4
  mlp_dim: int = 640  # of Hope's levels together
  batch_size: int = 4  # rows of a training step
  num_tokens: int = 1024  # of a row
  chunk_sizes: tuple[int, ...] = (16, 64, 128)  # tokens
  long_row: int = 32_768  # tokens
  long_context: int = 100_000  # tokens read before generating
  decode_steps: int = 64  # tokens generated
  repeats: int = 3  # timings, of which the fastest counts
  step_repeats: int = 10  # of training steps
  parts: tuple[str, ...] = (
    'layers',
    'training_steps',
    'long_rows',
    'decoding',
  )


def get_config(arg: str | None = None) -> BenchmarkConfig:
  """Returns the benchmark, one part of it, or a 'small' one for tests."""
  if arg == 'small':
    return BenchmarkConfig(
      num_layers=1,
      embed_dim=16,
      num_heads=2,
      mlp_dim=16,
      batch_size=1,
      num_tokens=32,
      chunk_sizes=(16,),
      long_row=64,
      long_context=64,
      decode_steps=4,
      repeats=1,
      step_repeats=1,
    )
  parts = BenchmarkConfig().parts
  if arg in parts:
    return BenchmarkConfig(parts=(arg,))
  if arg is not None:
    raise errors.UserError(
      f"{arg!r} must be 'small', {', '.join(parts)}, or nothing."
    )
  return BenchmarkConfig()


def run(config: BenchmarkConfig, workdir: str, mode: str) -> None:
  """Times all parts in turn and writes the ratios."""
  report_files.check_mode(mode)
  parts = {
    'layers': _layers,
    'training_steps': _training_steps,
    'long_rows': _long_rows,
    'decoding': _decoding,
  }
  matmul_rate = _matmul_rate()
  summary = {'matmul_flops_per_second': matmul_rate}
  for part in tqdm.tqdm(config.parts, desc='benchmark'):
    summary |= parts[part](config, matmul_rate)
  report_files.write_numbers(
    workdir,
    config,
    module=__name__,
    summary=summary,
    title=[
      '# The memory engine',
      'Ratios of one run on one machine; rates are tokens per second.',
    ],
  )


def _layers(config: BenchmarkConfig, matmul_rate: float) -> dict[str, float]:
  """Times forward and backward pass of a layer, by token and in chunks."""
  del matmul_rate
  shape = (config.batch_size, config.num_tokens, config.embed_dim)
  inputs = jax.random.normal(jax.random.key(1), shape)
  num_tokens = config.batch_size * config.num_tokens
  mixers = {'token_loop': _mixer(config, engine='token')}
  for size in config.chunk_sizes:
    mixers[f'chunk_{size}'] = _mixer(
      config, chunk_size=size, chunk_size_others=size
    )
  functions = {}
  for name, mixer in mixers.items():
    made = mixer.make(embed_dim=config.embed_dim, dtype=jnp.float32)
    params = parameters.init(jax.random.key(0), made.table)

    def loss(params, inputs, made=made):
      return jnp.sum(made.apply(params, None, inputs, base.TokenInfo())[0] ** 2)

    functions[name] = jax.jit(jax.grad(loss, argnums=(0, 1))), params, inputs
  seconds = timing.fastest(functions, config.repeats)
  rates = {name: num_tokens / value for name, value in seconds.items()}
  default = memory_mixer.MemoryMixerConfig(1, 1).chunk_size
  chosen = f'chunk_{default}' if f'chunk_{default}' in rates else min(rates)
  return {
    'chunk_over_token_loop': rates[chosen] / rates['token_loop'],
    **{f'tokens_per_second_{name}': rate for name, rate in rates.items()},
  }


def _training_steps(config: BenchmarkConfig, rate: float) -> dict[str, float]:
  """Times training steps of Hope and of a Transformer++ of its size."""
  hope = _hope(config, config.num_tokens)
  transformer = _transformer_as_large(hope)
  num_tokens = config.batch_size * config.num_tokens
  functions, flops, counts = {}, {}, {}
  for name, model_config in {'hope': hope, 'transformer': transformer}.items():
    experiment = training.ExperimentConfig(
      name=name,
      model=model_config,
      data=data.DataConfig(
        batch_size=config.batch_size, sequence_length=config.num_tokens
      ),
      train=training.TrainConfig(),
    )
    model = models.make_model(model_config)
    optimizer = training.make_optimizer(experiment, model.table)
    init = training.make_init(experiment, model, optimizer)
    step = training.make_step(experiment, model, optimizer)
    state = init(jax.random.key(0))
    tokens = _tokens(config.batch_size, config.num_tokens)
    batch = {
      'tokens': tokens,
      'targets': tokens,
      'mask': jnp.ones(tokens.shape, bool),
      'reset': jnp.zeros(tokens.shape, bool),
    }
    functions[name] = jax.jit(step), state, batch
    flops[name] = compilation.matmul_flops(
      _gradient(model), state.params, tokens
    )
    counts[name] = parameters.count(model.table)
  seconds = timing.fastest(functions, config.step_repeats)
  return {
    'hope_over_transformer': seconds['transformer'] / seconds['hope'],
    'hope_flop_ceiling': flops['transformer'] / flops['hope'],
    'share_of_matmul_rate': flops['hope'] / seconds['hope'] / rate,
    'share_of_matmul_rate_transformer': (
      flops['transformer'] / seconds['transformer'] / rate
    ),
    'tokens_per_second_hope': num_tokens / seconds['hope'],
    'tokens_per_second_transformer': num_tokens / seconds['transformer'],
    'parameters_hope': counts['hope'],
    'parameters_transformer': counts['transformer'],
  }


def _long_rows(config: BenchmarkConfig, matmul_rate: float) -> dict[str, float]:
  """Times forward and backward pass per token of a short and a long row."""
  del matmul_rate
  functions = {}
  for length in (config.num_tokens, config.long_row):
    model = models.make_model(_hope(config, length))
    params = model.init_params(jax.random.key(0))
    functions[length] = jax.jit(_gradient(model)), params, _tokens(1, length)
  seconds = timing.fastest(functions, config.repeats)
  work = timing.fastest(functions, 1, clock=timing.work_time)
  short, long = config.num_tokens, config.long_row
  flatness = lambda found: (found[long] / long) / (found[short] / short)
  return {
    'flatness_1k_32k': flatness(seconds),
    'flatness_1k_32k_work': flatness(work),
    'tokens_per_second_long_row': long / seconds[long],
  }


def _decoding(config: BenchmarkConfig, matmul_rate: float) -> dict[str, float]:
  """Times generation and measures the state, after little and much text."""
  del matmul_rate
  piece = config.num_tokens
  model = models.make_model(_hope(config, piece))
  params = model.init_params(jax.random.key(0))
  forward = jax.jit(model.forward)
  state = model.init_state(params, 1)

  def decode(state):
    token = jnp.zeros((1, 1), jnp.int32)
    for _ in range(config.decode_steps):
      logits, state = forward(params, state, token)
      token = jnp.argmax(logits[:, -1:], axis=-1)
    return token

  states, read = {}, 0
  while read < config.long_context:
    _, state = forward(params, state, _tokens(1, piece))
    read += piece
    states.setdefault('near', state)
  states['far'] = state
  seconds = timing.fastest(
    {name: (decode, state) for name, state in states.items()}, config.repeats
  )
  size = {
    name: sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for name, state in states.items()
  }
  return {
    'decode_flatness_1k_100k': seconds['far'] / seconds['near'],
    'state_bytes_100k_over_1k': size['far'] / size['near'],
    'state_bytes': size['far'],
    'decode_seconds_per_token': seconds['far'] / config.decode_steps,
  }


def _hope(config: BenchmarkConfig, max_length: int) -> models.ModelConfig:
  half = config.mlp_dim // 2
  return models.ModelConfig(
    vocab_size=257,
    num_layers=config.num_layers,
    embed_dim=config.embed_dim,
    mixer=_mixer(config),
    levels=(models.LevelConfig('fast', half), models.LevelConfig('slow', half)),
    max_length=max_length,
  )


def _mixer(config: BenchmarkConfig, **changes):
  head_dim = config.embed_dim // config.num_heads
  return memory_mixer.MemoryMixerConfig(config.num_heads, head_dim, **changes)


def _transformer_as_large(hope: models.ModelConfig) -> models.ModelConfig:
  """Returns a Transformer++ whose MLP makes the parameter counts equal."""
  mixer = attention.AttentionConfig(
    hope.mixer.num_heads, hope.mixer.num_heads, hope.mixer.head_dim
  )

  def with_mlp(mlp_dim):
    levels = (models.LevelConfig('mlp', mlp_dim),)
    return dataclasses.replace(hope, mixer=mixer, levels=levels)

  count = lambda c: parameters.count(models.make_model(c).table)
  missing = count(hope) - count(with_mlp(1))
  return with_mlp(1 + missing // (3 * hope.embed_dim * hope.num_layers))


def _gradient(model: models.Model):
  """Returns the gradient of a loss, for rows of one document each."""

  def loss(params, tokens):
    return jnp.mean(model.forward(params, None, tokens)[0] ** 2)

  return jax.grad(loss)


def _tokens(batch_size: int, num_tokens: int) -> jax.Array:
  return jax.random.randint(jax.random.key(2), (batch_size, num_tokens), 0, 256)


def _matmul_rate() -> float:
  """Measures the FLOPs per second of large float32 matmuls."""
  size, chain = 1024, 4
  a = jnp.eye(size)

  def multiply(a):
    for _ in range(chain):
      a = a @ a
    return a

  seconds = timing.fastest({'matmul': (jax.jit(multiply), a)}, 5)['matmul']
  return 2 * chain * size**3 / seconds
