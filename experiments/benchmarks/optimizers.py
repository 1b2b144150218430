"""Measures the cost of optimiser steps: time, bytes of state, and moves.

Command:
  python launch/run.py --config=experiments/benchmarks/optimizers.py \
    --workdir=runs/benchmark_optimizers

Hardware: two CPU cores and 6 GB, about 15 minutes. Numbers of one run are in
experiments/results/benchmarks/. report.md has all numbers,
summary.json the ratios:

* m3_over_muon, m3_over_adamw: of a training step (loss, gradients, update of
  the parameters). One step of M3 in sixteen orthogonalises the slow momentum,
  and counts a sixteenth. `_update` is the update alone, `_bfloat16` has
  momenta in bfloat16 on both sides.
* dgd_overhead: gradients with the energies that DGD needs over plain ones, less
  one; dgd_printed_overhead with the printed target.
* Bytes of state per parameter, of every optimiser.
* Collectives of an update of sharded parameters; see `optimizer_moves.py`.

Programs run in turn, several times. Ratios are of processor time, summed over
the cores, which other work on the machine hardly changes; report.md has those
of elapsed time, too. A ratio is that of the fastest runs.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import report_files
from experiments.benchmarks import optimizer_moves
from nested_learning import optimizers

_PERIOD = 16  # of M3's slow momentum, its default


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """Parameters with the shapes of a language model, 54 million."""

  num_layers: int = 12
  embed_dim: int = 512
  vocab_size: int = 16384
  num_tokens: int = 2048  # of one training step
  repeats: int = 3


def get_config(arg: str | None = None) -> BenchmarkConfig:
  """Returns the benchmark; `arg` is 'small' in tests."""
  if arg == 'small':
    return BenchmarkConfig(
      num_layers=2, embed_dim=32, vocab_size=64, num_tokens=64, repeats=2
    )
  return BenchmarkConfig()


def run(config: BenchmarkConfig, workdir: str, mode: str) -> None:
  """Times all optimisers in turn, several times, and writes the ratios."""
  report_files.check_mode(mode)
  params = _init_params(config)
  tokens = jnp.arange(config.num_tokens) % config.vocab_size
  num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
  numbers = optimizers.dimension_numbers(_loss, params, tokens)
  numbers['logits'] = None  # Adam's, as usual with Muon

  seconds = _time_all(config, params, tokens, numbers)
  ratios = {
    name: _ratio(seconds, *pair)
    for name, pair in {
      'm3_over_muon': ('M3 step', 'Muon step'),
      'm3_over_adamw': ('M3 step', 'AdamW step'),
      'm3_over_muon_update': ('M3 update', 'Muon update'),
      'm3_over_adamw_update': ('M3 update', 'AdamW update'),
      'm3_over_muon_bfloat16': ('M3, bfloat16 step', 'Muon, bfloat16 step'),
      'm3_over_muon_update_bfloat16': (
        'M3, bfloat16 update',
        'Muon, bfloat16 update',
      ),
      'dgd': ('corrected gradients', 'gradients'),
      'dgd_printed': ('printed gradients', 'gradients'),
    }.items()
  }
  summary = {'parameters': num_params, 'tokens_per_step': config.num_tokens}
  for name, (ratio, _) in ratios.items():
    if name.startswith('dgd'):
      summary[f'{name}_overhead'] = float(ratio - 1)
    else:
      summary[name] = float(ratio)
  states = _count_bytes(params, numbers)
  for name, size in states.items():
    key = f'state_bytes_per_parameter_{report_files.key(name)}'
    summary[key] = size / num_params
  moves = optimizer_moves.count(config.num_layers, config.embed_dim)
  report_files.write(
    workdir,
    config,
    module=__name__,
    summary=summary,
    metrics=[
      {'name': name, 'turn': i, 'processor': processor, 'elapsed': elapsed}
      for name, values in seconds.items()
      for i, (processor, elapsed) in enumerate(values)
    ],
    sections=[
      '# What an optimiser step costs',
      f'{num_params / 1e6:.1f} million parameters, {config.num_tokens} tokens '
      f'a step, float32, {config.repeats} turns.',
      report_files.table(
        ('ratio', 'processor time', 'elapsed time'),
        [(name, *values) for name, values in ratios.items()],
      ),
      report_files.table(
        ('seconds of the fastest run', 'processor time', 'elapsed time'),
        [(name, *np.min(values, 0)) for name, values in seconds.items()],
      ),
      '## State',
      report_files.table(
        ('optimiser', 'bytes per parameter'),
        [(name, size / num_params) for name, size in states.items()],
      ),
      f'## Sharded over {optimizer_moves.NUM_DEVICES} devices',
      'Collectives of matrices per stack of them, in every step and in those '
      'of the slow momentum; those in loops; those of sums; bytes that a '
      'device sends per step, over the bytes of its parameters.',
      report_files.table(optimizer_moves.Moves._fields, moves),
    ],
  )


def _make_optimizers(numbers):
  """Makes the optimisers that are timed, by name."""
  made = {'AdamW': optax.adamw(1e-3, 0.9, 0.95)}
  for suffix, dtype in (('', None), (', bfloat16', jnp.bfloat16)):
    made[f'Muon{suffix}'] = optax.contrib.muon(
      1e-3,
      consistent_rms=0.2,
      mu_dtype=dtype,
      muon_weight_dimension_numbers=numbers,
    )
    made[f'M3{suffix}'] = optimizers.m3(
      1e-3, slow_every=_PERIOD, mu_dtype=dtype, dimension_numbers=numbers
    )
  return made


def _time_all(config, params, tokens, numbers):
  """Times gradients, updates and steps.

  Args:
    config: The benchmark.
    params: The parameters.
    tokens: The batch.
    numbers: Dimension numbers of the matrices.

  Returns:
    By name, [turn, 2] seconds of the processor and elapsed. Those of M3 are
    means over a period of its slow momentum.
  """
  plain = jax.jit(jax.grad(_loss))
  gradients = {'gradients': jax.jit(jax.value_and_grad(_loss))}
  for target in ('corrected', 'printed'):
    delta = optimizers.value_and_delta_grad(_loss, target=target)
    gradients[f'{target} gradients'] = jax.jit(delta)
  made = _make_optimizers(numbers)
  programs = {name: _compile(tx) for name, tx in made.items()}
  seconds = {}
  for turn in range(config.repeats + 1):
    for name, function in gradients.items():
      seconds.setdefault(name, []).append(_time(function, params, tokens)[0])
    given = plain(params, tokens)
    for name, tx in made.items():
      update, step = programs[name]
      state = tx.init(params)
      for kind, program, inputs in (
        ('update', update, given),
        ('step', step, tokens),
      ):
        spent, state = _time(program, state, params, inputs)
        if name.startswith('M3'):  # The slow momentum is due next.
          slow, state = _time(program, _at_step(state, 15), params, inputs)
          state = _at_step(state, 0)
          spent = ((_PERIOD - 1) * spent + slow) / _PERIOD
        seconds.setdefault(f'{name} {kind}', []).append(spent)
      del state  # Only one optimiser's state fits beside the parameters.
    if turn == 0:  # It compiled.
      seconds = {}
  return seconds


def _compile(tx):
  """Compiles two functions of (state, params, gradients or tokens).

  The first one is the update alone, the second one a training step.
  """

  def update(state, params, gradients):
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  def step(state, params, tokens):
    return update(state, params, jax.grad(_loss)(params, tokens))

  return [jax.jit(function, donate_argnums=0) for function in (update, step)]


def _ratio(seconds, name, other):
  """Returns the ratios of the fastest runs, of processor and elapsed time."""
  return np.min(seconds[name], 0) / np.min(seconds[other], 0)


def _count_bytes(params, numbers):
  """Returns the bytes of state of all optimisers, by name."""
  sizes = {}
  for kind in optimizers.OptimizerConfig.__args__:
    fields = {field.name for field in dataclasses.fields(kind)}
    for dtype in (None, 'bfloat16') if 'mu_dtype' in fields else (None,):
      config = kind(mu_dtype=dtype) if dtype else kind()
      tx = optimizers.configs.make(config, 1e-3, dimension_numbers=numbers)
      state = jax.eval_shape(tx.init, params)
      name = kind.NAME + (f', {dtype}' if dtype else '')
      sizes[name] = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
      )
  return sizes


def _loss(params, tokens):
  logits = _forward(params, tokens)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
  return jnp.mean(losses)


def _init_params(config):
  embed, layers = config.embed_dim, config.num_layers
  shapes = {
    'embedding': (config.vocab_size, embed),
    'layers': {
      'query': (layers, embed, embed),
      'key': (layers, embed, embed),
      'value': (layers, embed, embed),
      'out': (layers, embed, embed),
      'up': (layers, embed, 4 * embed),
      'down': (layers, 4 * embed, embed),
    },
    'logits': (embed, config.vocab_size),
  }
  key = jax.random.key(0)
  return jax.tree.map(
    lambda shape: jax.random.normal(key, shape) * shape[-2] ** -0.5,
    shapes,
    is_leaf=lambda shape: isinstance(shape, tuple),
  )


def _forward(params, tokens):
  """Computes logits by a gated network with a transformer's products."""

  def layer(x, w):
    h = jax.nn.standardize(x)
    gated = jax.nn.sigmoid(h @ w['query']) * (h @ w['key']) + h @ w['value']
    x = x + gated @ w['out']
    return x + jax.nn.gelu(jax.nn.standardize(x) @ w['up']) @ w['down'], None

  x = params['embedding'][tokens]
  x, _ = jax.lax.scan(layer, x, params['layers'])
  return jax.nn.standardize(x) @ params['logits']


def _at_step(state, count):
  is_m3 = lambda node: hasattr(node, 'slow')
  return jax.tree.map(
    lambda node: node._replace(count=jnp.int32(count)) if is_m3(node) else node,
    state,
    is_leaf=is_m3,
  )


def _time(function, *args):
  """Returns the seconds that a call takes, and the last of its results."""
  processor, elapsed = time.process_time(), time.perf_counter()
  outputs = jax.block_until_ready(function(*args))
  processor = time.process_time() - processor
  elapsed = time.perf_counter() - elapsed
  return np.array([processor, elapsed]), outputs[-1]
