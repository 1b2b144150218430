"""Measures the cost of optimiser steps: ratios of time, and bytes of state.

Command:
  python launch/run.py --config=experiments/benchmarks/optimizers.py \
    --workdir=runs/benchmark_optimizers

Hardware: two CPU cores and 4 GB, about five minutes. Results in summary.json:

* m3_over_muon and m3_over_adamw. For a training step (gradients and update):
  0.99 and 1.60. For the update alone: 0.98 and 15.6, nearly all of it products
  of Newton-Schulz, which Muon has as well.
* dgd_overhead, the time of gradients with DGD's term over plain gradients, less
  one: 0.09.
* Bytes of state per parameter: AdamW 8, Muon 5.2, M3 13.5, deep momentum 2.0,
  DGD 1.2.

The cores were shared with other work, which slows products more than AdamW.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import optax

from experiments import report_files
from experiments.optimizers import rules
from nested_learning import optimizers


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """Parameters with the shapes of a language model, 54 million."""

  num_layers: int = 12
  embed_dim: int = 512
  vocab_size: int = 16384
  num_tokens: int = 2048  # of one training step
  repeats: int = 3  # the fastest one counts


def get_config(arg: str | None = None) -> BenchmarkConfig:
  """Returns the benchmark; `arg` is 'small' in tests."""
  if arg == 'small':
    return BenchmarkConfig(
      num_layers=2, embed_dim=32, vocab_size=64, num_tokens=64, repeats=1
    )
  return BenchmarkConfig()


def run(config: BenchmarkConfig, workdir: str, mode: str) -> None:
  """Times all optimisers in turn, several times, and writes the ratios."""
  report_files.check_mode(mode)
  params = _init_params(config)
  tokens = jnp.arange(config.num_tokens) % config.vocab_size
  num_params = sum(leaf.size for leaf in jax.tree.leaves(params))

  def loss_fn(params, tokens):
    logits = _forward(params, tokens)
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    )

  seconds, best = _time_steps(config, loss_fn, params, tokens)
  step = {
    name: best['gradients'] + best[name] for name in ('Muon', 'M3', 'AdamW')
  }
  summary = {
    'parameters': num_params,
    'tokens_per_step': config.num_tokens,
    'm3_over_muon': step['M3'] / step['Muon'],
    'm3_over_adamw': step['M3'] / step['AdamW'],
    'm3_over_muon_update_only': best['M3'] / best['Muon'],
    'm3_over_adamw_update_only': best['M3'] / best['AdamW'],
    'dgd_overhead': best['delta gradients'] / best['gradients'] - 1,
  }
  rows = []
  for name in rules.NAMES:
    tx = rules.make_optimizer(name, 1e-3, loss_fn, params, tokens)
    state = jax.eval_shape(tx.init, params)
    size = sum(
      leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )
    key = f'state_bytes_per_parameter_{report_files.key(name)}'
    summary[key] = size / num_params
    rows.append((name, size / num_params))
  report_files.write(
    workdir,
    config,
    module=__name__,
    summary=summary,
    metrics=[
      {'name': name, 'repeat': i, 'seconds': value}
      for name, values in seconds.items()
      for i, value in enumerate(values)
    ],
    sections=[
      '# What an optimiser step costs',
      f'{num_params / 1e6:.1f} million parameters, {config.num_tokens} tokens '
      f'a step, float32; the fastest of {config.repeats} repeats in turn. A '
      'step is the gradients and the update; M3 orthogonalises its slow '
      'momentum on one step in sixteen.',
      report_files.table(
        ('', 'seconds', 'of a step with AdamW'),
        [(name, value, value / step['AdamW']) for name, value in best.items()],
      ),
      report_files.table(
        ('ratio', ''),
        [(name, value) for name, value in summary.items() if '_over_' in name]
        + [('dgd_overhead', summary['dgd_overhead'])],
      ),
      '## State',
      report_files.table(('optimiser', 'bytes per parameter'), rows),
    ],
  )


def _time_steps(config, loss_fn, params, tokens):
  """Times gradients and updates.

  Args:
    config: The benchmark.
    loss_fn: Function of (params, tokens).
    params: The parameters.
    tokens: The batch.

  Returns:
    Seconds of every repeat, by name, and the fastest ones. The fastest of M3 is
    the mean over a period of its slow momentum.
  """
  delta_grad = optimizers.value_and_delta_grad(loss_fn, target='printed')
  functions = {
    'gradients': jax.jit(jax.grad(loss_fn)),
    'delta gradients': jax.jit(lambda p, t: delta_grad(p, t)[1:]),
  }
  updates = {name: rules.RULES[name](1e-3) for name in ('Muon', 'M3')}
  updates['AdamW'] = optax.adamw(1e-3, 0.9, 0.95)
  compiled = {
    name: jax.jit(tx.update, donate_argnums=1) for name, tx in updates.items()
  }
  gradients = functions['gradients'](params, tokens)
  names = (*functions, *updates, 'M3, slow step')
  seconds = {name: [] for name in names}
  for repeat in range(config.repeats + 1):
    for name, function in functions.items():
      seconds[name].append(_time(function, params, tokens)[0])
    for name, tx in updates.items():
      state = tx.init(params)
      spent, (_, state) = _time(compiled[name], gradients, state, params)
      seconds[name].append(spent)
      if name == 'M3':
        state = _at_step(state, 15)  # The slow momentum is due next.
        spent, _ = _time(compiled[name], gradients, state, params)
        seconds['M3, slow step'].append(spent)
      del state  # Only one optimiser's state fits beside the parameters.
    if repeat == 0:  # It compiled.
      seconds = {name: [] for name in names}
  best = {name: min(values) for name, values in seconds.items()}
  # One step in sixteen orthogonalises the slow momentum as well.
  best['M3'] = (15 * best['M3'] + best.pop('M3, slow step')) / 16
  return seconds, best


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
  start = time.perf_counter()
  outputs = jax.block_until_ready(function(*args))
  return time.perf_counter() - start, outputs
