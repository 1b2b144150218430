"""Time and memory of every family of the zoo, over Transformer++'s.

Command:
  python launch/run.py --config=experiments/benchmarks/zoo.py \
    --workdir=runs/zoo

Hardware: two CPU cores, 20 minutes with --set=repeats=1.
Results: experiments/results/benchmarks/README.md.

Models have equal blocks around their mixers, not equal parameter counts. For
each family, summary.json has `<family>/training_<length>` (tokens per second of
a gradient over Transformer++'s at the same length), `<family>/decode` (seconds
per generated token over Transformer++'s), `<family>/state_bytes` (of one
stream) and `<family>/temporary_bytes_<length>` (memory of the gradient's
program beside its arguments). `deltanet_over_reference` and
`gated_deltanet_over_reference` compare forward and backward of the engine with
the chunked gated delta rule of the papers, `delta_rule.py`; above 1 the engine
is faster.

`:hope,transformer` measures these families alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import tqdm

from experiments import report_files
from experiments.benchmarks import delta_rule
from experiments.benchmarks import timing
from nested_learning import errors
from nested_learning import memory
from nested_learning import models

_BASE = 'transformer'


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """Families, their size and the lengths of rows."""

  families: tuple[str, ...] = tuple(models.zoo.FAMILIES)
  num_layers: int = 2
  embed_dim: int = 128
  num_heads: int = 4
  mlp_dim: int = 384
  window: int = 256  # tokens of sliding-window attention
  lengths: tuple[int, ...] = (1024, 4096, 16_384)  # tokens of a row
  step_tokens: int = 16_384  # tokens of a gradient, in all rows
  decode_steps: int = 32  # tokens generated
  repeats: int = 2  # runs of each function; the fastest counts
  rule_repeats: int = 20  # runs of the delta rule alone, which is short

  def __post_init__(self):
    unknown = set(self.families) - set(models.zoo.FAMILIES)
    if unknown:
      raise errors.UserError(
        f'families={self.families} names {sorted(unknown)}; the zoo has '
        f'{", ".join(models.zoo.FAMILIES)}.'
      )
    if _BASE not in self.families:
      raise errors.UserError(
        f'families={self.families} lacks {_BASE!r}, which all ratios are to.'
      )


def get_config(arg: str | None = None) -> BenchmarkConfig:
  """Returns the benchmark of all or the named families, or a small one."""
  if arg == 'small':
    return BenchmarkConfig(
      families=(_BASE, 'deltanet'),
      num_layers=1,
      embed_dim=16,
      num_heads=2,
      mlp_dim=16,
      window=8,
      lengths=(64,),
      step_tokens=64,
      decode_steps=2,
      repeats=1,
      rule_repeats=1,
    )
  if arg is None:
    return BenchmarkConfig()
  return BenchmarkConfig(families=tuple(arg.split(',')))


def run(config: BenchmarkConfig, workdir: str, mode: str) -> None:
  """Measures all families and writes the ratios."""
  report_files.check_mode(mode)
  seconds, facts = {}, {}
  lengths = config.lengths
  parts = [(n, None) for n in lengths] + [(None, 'decode'), (None, 'rule')]
  for length, part in tqdm.tqdm(parts, desc='zoo'):
    if length:
      seconds[length] = _training(config, length, facts)
    elif part == 'decode':
      seconds['decode'] = _decoding(config, facts)
    else:
      facts |= _delta_rules(config)
  summary, rows = {}, []
  for family in config.families:
    ratio = lambda what, f=family: seconds[what][f] / seconds[what][_BASE]
    line = {f'training_{n}': 1 / ratio(n) for n in lengths}
    line |= {'decode': ratio('decode')}
    summary |= {f'{family}/{name}': value for name, value in line.items()}
    rows.append((family, *line.values(), facts[f'{family}/state_bytes']))
  for length in lengths:
    rate = config.step_tokens / seconds[length][_BASE]
    summary[f'tokens_per_second_{_BASE}_{length}'] = rate
  summary |= facts
  head = ['', *(f'{n} tokens' for n in lengths)]
  report_files.write(
    workdir,
    config,
    module=__name__,
    summary=summary,
    metrics=[{'name': k, 'value': v} for k, v in summary.items()],
    sections=[
      '# Speed of the zoo',
      'Training: tokens per second over those of Transformer++; above 1 is '
      'faster. Decode: seconds per token over those of Transformer++ with room '
      f'for {max(lengths)} tokens; below 1 is faster. One machine, one run.',
      report_files.table([*head, 'decode', 'bytes of a stream'], rows),
      'Bytes that the program of a gradient needs beside its arguments, over '
      'those of Transformer++:',
      report_files.table(head, _temporaries(config, facts)),
      report_files.table(
        ('the engine over the rule alone', ''),
        [item for item in facts.items() if item[0].endswith('_reference')],
      ),
    ],
  )
  print(report_files.table([*head, 'decode', 'bytes of a stream'], rows))


def _temporaries(config, facts):
  """Returns a row per family; empty if the compiler does not report memory."""

  def ratio(family, length):
    name = f'temporary_bytes_{length}'
    of, base = (facts.get(f'{f}/{name}') for f in (family, _BASE))
    return of / base if of and base else ''

  return [(f, *(ratio(f, n) for n in config.lengths)) for f in config.families]


def _model(config: BenchmarkConfig, family: str, length: int) -> models.Model:
  size = models.zoo.Size(
    config.num_layers,
    config.embed_dim,
    config.num_heads,
    config.mlp_dim,
    vocab_size=257,
    max_length=length,
    window=config.window,
  )
  return models.make_model(models.zoo.make_sized(family, size))


def _training(config, length, facts):
  functions = {}
  batch_size = max(config.step_tokens // length, 1)
  tokens = jax.random.randint(jax.random.key(1), (batch_size, length), 0, 256)
  for family in config.families:
    model = _model(config, family, length)

    def loss(params, tokens, model=model):
      return jnp.mean(model.forward(params, None, tokens)[0] ** 2)

    params = model.init_params(jax.random.key(0))
    compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
    memory_needed = compiled.memory_analysis()
    if memory_needed is not None:
      name = f'{family}/temporary_bytes_{length}'
      facts[name] = memory_needed.temp_size_in_bytes
    functions[family] = compiled, params, tokens
  return timing.fastest(functions, config.repeats)


def _decoding(config, facts):
  functions = {}
  for family in config.families:
    model = _model(config, family, max(config.lengths))
    params = model.init_params(jax.random.key(0))
    forward = jax.jit(model.forward)
    state = model.init_state(params, 1)
    facts[f'{family}/state_bytes'] = sum(
      leaf.nbytes for leaf in jax.tree.leaves(state)
    )

    def decode(params, state, forward=forward):
      token = jnp.zeros((1, 1), jnp.int32)
      for _ in range(config.decode_steps):
        logits, state = forward(params, state, token)
        token = jnp.argmax(logits[:, -1:], axis=-1)
      return token

    functions[family] = decode, params, state
  return timing.fastest(functions, config.repeats)


def _delta_rules(config):
  """Measures the gated delta rule of the engine over `delta_rule.py`."""
  heads, dim = config.num_heads, config.embed_dim // config.num_heads
  length = min(config.lengths)
  shape = max(config.step_tokens // length, 1), heads, length
  keys = jax.random.split(jax.random.key(0), 5)
  k, v, q = (jax.random.normal(key, (*shape, dim)) for key in keys[:3])
  k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
  inner_lr = jax.random.uniform(keys[3], (*shape, 1))
  retention = jax.random.uniform(keys[4], (*shape, 1), minval=0.9)
  facts = {}
  for family in ('deltanet', 'gated_deltanet'):
    mixer = models.zoo.FAMILIES[family].mixer(
      models.zoo.Size(1, heads * dim, heads, 1)
    )
    kept = retention if family == 'gated_deltanet' else jnp.ones_like(retention)
    network = mixer.network()
    initial = {'in': jnp.zeros((heads, dim, dim))}

    def engine(
      k, v, q, inner_lr, kept, mixer=mixer, network=network, initial=initial
    ):
      feed = memory.WriteInputs(k, v, inner_lr, kept, query=q)
      return memory.scan_chunks(
        network, mixer.rule('main'), initial, None, feed, project=None
      )[0].read

    alone = functools.partial(
      delta_rule.read_tokens, chunk_size=mixer.rule('main').chunk_size
    )
    arguments = k, v, q, inner_lr, kept
    functions = {}
    for name, rule in {'engine': engine, 'alone': alone}.items():
      loss = lambda *args, rule=rule: jnp.sum(rule(*args) ** 2)
      gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))
      functions[name] = gradient, *arguments
    seconds = timing.fastest(functions, config.rule_repeats)
    facts[f'{family}_over_reference'] = seconds['alone'] / seconds['engine']
  return facts
