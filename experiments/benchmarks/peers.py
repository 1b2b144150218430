"""Speed beside PyTorch implementations of Hope and Titans, in one run.

Command, with the peers in an environment of their own:
  python -m venv peers
  peers/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
  peers/bin/pip install nested-learning==0.2.0 titans-pytorch==0.5.5
  taskset -c 1 python launch/run.py --config=experiments/benchmarks/peers.py \
    --set=python=peers/bin/python --workdir=runs/peers

Hardware: one CPU core, three minutes. Without --set=python, only ours are
measured.
Results: experiments/results/benchmarks/README.md.

All have two layers of width 256 and rows of 1,024 tokens, and the time is that
of the processor. `train_C` is a gradient of Hope with chunks of C tokens, and
`decode` generates with writes: 'hope' has memories for keys, values and rates
in one head, as the peer; 'hope_4_heads' four; 'hope_static' projections in
their place, four heads and hidden layers of twice their width, as the
quickstart; 'hope_printed' the mathematics of the peer, whose gradient does not
go through the writes.`mac` is a gradient of Titans' memory as context, whose
segments and chunks have 64 tokens, and `lmm_C` of its memory layer alone:
`_chunk_reads` reads at a chunk's start and bounds nothing, as the peer, the
other one reads after every write.
"""

import dataclasses
import json
import pathlib
import subprocess
import time

import jax
import jax.numpy as jnp

from experiments import report_files
from experiments.benchmarks import timing
from nested_learning import errors
from nested_learning import inference
from nested_learning import models
from nested_learning import parameters
from nested_learning.layers import base
from nested_learning.layers import memory_mixer

_PRINTED = {
  'objective': 'l2',
  'erase': 'every_map',
  'learns': 'every_map',
  'read': 'chunk',
  'retain_to': 'zero',
}


@dataclasses.dataclass(frozen=True)
class PeersConfig:
  """Sizes of all models, and where the peers are."""

  python: str | None = None  # of an environment with the peers
  num_layers: int = 2
  embed_dim: int = 256
  num_heads: int = 4
  mlp_dim: int = 1366  # of both levels: the parameters of the peer
  num_tokens: int = 1024  # of a row
  chunk_sizes: tuple[int, ...] = (16, 64)  # tokens
  decode_steps: int = 64  # tokens generated
  repeats: int = 3  # timings, of which the fastest counts


def get_config(arg: str | None = None) -> PeersConfig:
  """Returns the benchmark, or a 'small' one for tests."""
  if arg == 'small':
    return PeersConfig(
      num_layers=1,
      embed_dim=16,
      num_heads=2,
      mlp_dim=16,
      num_tokens=32,
      chunk_sizes=(16,),
      decode_steps=4,
      repeats=1,
    )
  if arg is not None:
    raise errors.UserError(f"{arg!r} must be 'small' or nothing.")
  return PeersConfig()


def run(config: PeersConfig, workdir: str, mode: str) -> None:
  """Times ours and, if there are any, the peers; writes rates and ratios."""
  report_files.check_mode(mode)
  theirs = {} if config.python is None else _time_peers(config)
  functions = {**_gradients(config), **_layers(config)}
  ours = _rates(functions, config.num_tokens, config.repeats)
  ours |= _rates(_draws(config), config.decode_steps, 2 * config.repeats)
  rows, summary = [], {}
  for name, rate in sorted(ours.items()):
    summary[name] = rate
    peer = max(filter(name.startswith, theirs), key=len, default=None)
    row = [name, f'{rate:,.0f}', '', '']
    if peer is not None:
      summary[f'{name}_ratio'] = rate / theirs[peer]
      row[2:] = f'{theirs[peer]:,.1f}', f'{rate / theirs[peer]:.1f}'
    rows.append(row)
    print(': '.join(row[:1] + [' '.join(row[1:])]))
  summary |= {f'peer_{name}': rate for name, rate in theirs.items()}
  report_files.write(
    workdir,
    config,
    module=__name__,
    summary=summary,
    metrics=[{'name': name, 'value': x} for name, x in summary.items()],
    sections=[
      '# Beside PyTorch',
      'Tokens per second of processor time.',
      report_files.table(('', 'ours', 'PyTorch', 'ratio'), rows),
    ],
  )


def _time_peers(config: PeersConfig) -> dict[str, float]:
  """Runs the peers in their environment."""
  script = pathlib.Path(__file__).with_name('peers_torch.py')
  sizes = json.dumps(dataclasses.asdict(config))
  try:
    result = subprocess.run(
      [config.python, str(script), sizes], capture_output=True, text=True
    )
  except OSError as error:
    raise errors.UserError(
      f'python={config.python!r} cannot be started: {error.strerror}.'
    ) from error
  if result.returncode:
    last = (result.stderr.strip() or 'no message').splitlines()[-1]
    raise errors.UserError(
      f'python={config.python!r} cannot run the peers: {last}; '
      f'{__name__.replace(".", "/")}.py says what to install.'
    )
  return json.loads(result.stdout.strip().splitlines()[-1])


def _rates(functions, num_tokens: int, repeats: int) -> dict[str, float]:
  """Returns tokens per second of processor time."""
  seconds = timing.fastest(functions, repeats, clock=time.process_time)
  return {name: num_tokens / value for name, value in seconds.items()}


def _mixers(config: PeersConfig):
  make = memory_mixer.MemoryMixerConfig
  dim, heads = config.embed_dim, config.num_heads
  width = dim // heads
  return {
    'hope': make(1, dim),
    'hope_4_heads': make(heads, width),
    'hope_static': make(heads, width, hidden_dim=2 * width, adaptive=()),
    'hope_printed': make(1, dim, **_PRINTED),
  }


def _hope(config: PeersConfig, mixer) -> models.ModelConfig:
  half = config.mlp_dim // 2
  return models.ModelConfig(
    vocab_size=257,
    num_layers=config.num_layers,
    embed_dim=config.embed_dim,
    mixer=mixer,
    levels=(models.LevelConfig('fast', half), models.LevelConfig('slow', half)),
    max_length=config.num_tokens,
  )


def _titans(config: PeersConfig) -> models.zoo.Size:
  return models.zoo.Size(
    config.num_layers,
    config.embed_dim,
    config.num_heads,
    config.mlp_dim // 2,
    vocab_size=257,
    max_length=config.num_tokens,
  )


def _gradients(config: PeersConfig):
  """Makes gradients of whole models."""
  made = {}
  for size in config.chunk_sizes:
    for name, mixer in _mixers(config).items():
      chunks = {'chunk_size': size, 'chunk_size_others': size}
      mixer = dataclasses.replace(mixer, **chunks)
      made[f'train_{size}_{name}'] = _hope(config, mixer)
  made['mac'] = models.zoo.make_sized('titans_mac', _titans(config))
  tokens = jax.random.randint(jax.random.key(2), (1, config.num_tokens), 0, 256)
  functions = {}
  for name, model_config in made.items():
    model = models.make_model(model_config)

    def loss(params, tokens, model=model):
      return jnp.mean(model.forward(params, None, tokens)[0] ** 2)

    params = model.init_params(jax.random.key(0))
    functions[name] = jax.jit(jax.grad(loss)), params, tokens
  return functions


def _layers(config: PeersConfig):
  """Makes gradients of Titans' memory layer: one head, hidden layer 4x."""
  dim = config.embed_dim
  inputs = jax.random.normal(jax.random.key(1), (1, config.num_tokens, dim))
  base_mixer = models.zoo.FAMILIES['titans'].mixer(_titans(config))
  functions = {}
  for size in config.chunk_sizes:
    for name, changes in {
      f'lmm_{size}': {},
      f'lmm_{size}_chunk_reads': {'read': 'chunk', 'max_norm': None},
    }.items():
      layer = dataclasses.replace(
        base_mixer,
        num_heads=1,
        head_dim=dim,
        hidden_dim=4 * dim,
        chunk_size=size,
        **changes,
      ).make(embed_dim=dim, dtype=jnp.float32)

      def loss(params, inputs, layer=layer):
        outputs, _ = layer.apply(params, None, inputs, base.TokenInfo())
        return jnp.sum(outputs**2)

      params = parameters.init(jax.random.key(0), layer.table)
      gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
      functions[name] = gradient, params, inputs
  return functions


def _draws(config: PeersConfig):
  """Makes functions that generate with writes."""
  functions, logits = {}, jnp.zeros((1, 257))
  for name, mixer in _mixers(config).items():
    model = models.make_model(_hope(config, mixer))
    params = model.init_params(jax.random.key(0))
    state = model.init_state(params, 1)
    settings = inference.DrawConfig(config.decode_steps)
    draw = jax.jit(inference.make_draw(model, settings))
    keys = inference.row_keys(jax.random.key(1), [0])
    functions[f'decode_{name}'] = draw, params, logits, state, keys
  return functions
