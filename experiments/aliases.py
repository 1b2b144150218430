"""Measures what one layer finds behind aliases, by which of its parts learn.

In self-modifying Titans, keys, values and queries are outputs of memories that
are written like the main one: at a key, towards their own output for a value.
So a pair of two names makes a memory treat the one as the other, also when a
later pair is written or a query is read. This experiment asks what that gives:
names get values and aliases, aliases get aliases, and the last alias of every
chain is asked for its name's value. A delta rule follows one pair a layer.

It is a construction, not a training. The layer is the one of the zoo, with
matrices as memories and a rate of one, and its projections are set by hand:
they copy key, value and query out of the token. A pair is one token, of two
random names. Which of them is the key is a choice of the projections, so both
ways are tried and the better one counts.

Command:
  python launch/run.py --config=experiments/aliases.py --workdir=runs/aliases \
    --set=results=experiments/results/aliases

Hardware: one CPU core, two minutes.
Results: experiments/results/aliases/README.md.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cells as cells_lib
from experiments import report_files
from nested_learning import errors
from nested_learning import parameters
from nested_learning.layers import base
from nested_learning.layers import memory_mixer

_TASK = 'aliases'
_SCALE = 100.0  # of tokens; the activation of the projections then copies them


@dataclasses.dataclass(frozen=True)
class AliasesConfig:
  """The streams."""

  dim: int = 64  # of a name
  num_units: int = 8  # entries of a name that are one; the others are zero
  num_chains: int = 4  # names with a value
  hops: tuple[int, ...] = (0, 1, 2, 4)  # aliases of each
  num_streams: int = 64
  # Folder of earlier cells, to which page and cells are written as well.
  results: str | None = None

  def __post_init__(self):
    for name in ('dim', 'num_chains', 'num_streams'):
      errors.check_field(self, name, getattr(self, name) >= 1, 'at least 1')
    fits = 1 <= self.num_units <= self.dim
    errors.check_field(self, 'num_units', fits, f'from 1 to dim={self.dim}')
    fits = bool(self.hops) and min(self.hops) >= 0
    errors.check_field(self, 'hops', fits, 'one or more numbers of at least 0')


class Row(NamedTuple):
  """A layer: the roles that are memories, its target, and how many there are.

  Attributes:
    adaptive: Roles that are memories.
    target: What a write aims at; see `MemoryMixerConfig`.
    num_layers: Equal layers, of which each asks for what the last one found.
  """

  adaptive: tuple[str, ...] = ()
  target: str = 'own'
  num_layers: int = 1


ROWS = {
  'delta rule': Row(target='value'),
  'delta rule, two layers': Row(target='value', num_layers=2),
  'own targets': Row(),
  'and values': Row(('v',)),
  'and keys': Row(('k',)),
  'and keys, values (as printed)': Row(('k', 'v')),
  'and queries': Row(('q',)),
  'and keys, values, queries': Row(('k', 'v', 'q')),
}
ORDERS = {
  'values first': 'values, then aliases, aliases of these, and so on',
  'values last': 'aliases, aliases of these, and so on, then values',
  'backwards': 'the last aliases, those before them, and so on, then values',
}


def get_config() -> AliasesConfig:
  """Returns the experiment."""
  return AliasesConfig()


def run(config: AliasesConfig, workdir: str, mode: str) -> None:
  """Measures every layer and order, and writes the page."""
  report_files.check_mode(mode)
  store = cells_lib.open_store(pathlib.Path(workdir), config.results)
  settings = dataclasses.asdict(config)
  del settings['results']
  found = {}
  for name, order in itertools.product(ROWS, ORDERS):
    cell = cells_lib.measure(
      store,
      _TASK,
      f'{report_files.key(name)} {report_files.key(order)}',
      settings,
      lambda name=name, order=order: measure(config, ROWS[name], order),
    )
    found[name, order] = cell.values['right']
  _write(config, store, found)


def measure(
  config: AliasesConfig, row: Row, order: str
) -> dict[str, list[float]]:
  """Tells streams to a layer, and asks for the values.

  Args:
    config: The streams.
    row: The layer.
    order: A key of `ORDERS`.

  Returns:
    'right', the share of right values by number of hops, with the better one of
    the two ways to write pairs of names.
  """
  answer = _make_answer(config, row)
  right = []
  for hops in config.hops:
    streams = [
      _make_stream(config, hops, order, seed)
      for seed in range(config.num_streams)
    ]
    shares = []
    for swaps in (False, True):
      scores = answer(*(np.stack(x) for x in zip(*streams, strict=True)), swaps)
      is_right = np.argmax(scores, axis=-1) == np.arange(config.num_chains)
      shares.append(float(np.mean(is_right)))
    right.append(max(shares))
  return {'right': right}


def _make_stream(config, hops, order, seed):
  """Returns the pairs of a stream, and what is asked for.

  Returns:
    The pairs [t, 2, d], a key and what it stands for, with zeros at the end;
    whether each is one of two names, [t]; whether it is there, [t]; the last
    aliases [n, d]; and the values of their names, [n, d].
  """
  rng = np.random.default_rng(seed)
  size = max(config.hops) + 2, config.num_chains, config.dim
  names = np.argsort(rng.random(size), axis=-1) < config.num_units
  values, *names = names.astype(np.float32)
  told = [(names[0], values)]
  told += [(names[i + 1], names[i]) for i in range(hops)]
  if order == 'values last':
    told = [*told[1:], told[0]]
  elif order == 'backwards':
    told.reverse()
  pairs = np.concatenate([np.stack(pair, axis=1) for pair in told])
  count = (max(config.hops) + 1) * config.num_chains
  pairs = np.pad(pairs, [(0, count - len(pairs)), (0, 0), (0, 0)])
  is_alias = [second is not values for _, second in told]
  is_alias = np.pad(
    np.repeat(is_alias, config.num_chains),
    (0, count - len(told) * config.num_chains),
  )
  mask = np.arange(count) < len(told) * config.num_chains
  return pairs, is_alias, mask, names[hops], values


def _make_answer(config, row):
  """Returns a function of streams that scores every value for every query."""
  mixer = memory_mixer.MemoryMixerConfig(
    num_heads=1,
    head_dim=config.dim,
    kind='matrix',
    adaptive=row.adaptive,
    target=row.target,
    inner_lr='one',
    retention='none',
    chunk_size=1,
    chunk_size_others=1,
    max_norm=None,
  )
  layer = mixer.make(embed_dim=3 * config.dim + 1, dtype=jnp.float32)
  params = _set_by_hand(config, layer)

  def tokens(key, value, query):
    one = jnp.ones((*key.shape[:-1], 1))
    return _SCALE * jnp.concatenate([key, value, query, one], axis=-1)

  @jax.jit
  def answer(pairs, is_alias, mask, asked, values, swaps):
    turned = (swaps & is_alias)[..., None, None]
    pairs = jnp.where(turned, pairs[:, :, ::-1], pairs)
    key, value = pairs[:, :, 0], pairs[:, :, 1]
    state = layer.init_state(params, len(pairs))
    info = base.TokenInfo(mask=mask)
    _, state = layer.apply(params, state, tokens(key, value, key), info)
    scores = []
    for _ in range(row.num_layers):
      inputs = tokens(asked, asked, asked)
      out, _ = layer.apply(params, state, inputs, base.TokenInfo(write=False))
      asked = out[..., : config.dim]
      asked /= jnp.linalg.norm(asked, axis=-1, keepdims=True)
      scores.append(jnp.einsum('bqd,bnd->bqn', asked, values))
    return jnp.max(jnp.stack(scores), axis=0)

  return answer


def _set_by_hand(config, layer):
  """Returns parameters that copy key, value and query out of the token."""
  dim = config.dim
  params = parameters.init(jax.random.key(0), layer.table)
  copy = jnp.eye(3 * dim + 1)
  kernel = jnp.zeros_like(params['conv']['kernel'])
  return (
    params
    | {
      'in': copy[:, :-1].reshape(-1, 1, 3, dim),
      'conv': {'kernel': kernel.at[-1].set(1.0)},  # the token itself
      'gate': jnp.tile(copy[:, -1:, None], (1, 1, dim)),  # is open
      'out': copy[None, :dim],
    }
  )


def _write(
  config: AliasesConfig,
  store: cells_lib.Store,
  found: Mapping[tuple[str, str], Sequence[float]],
) -> None:
  """Writes the page."""
  summary, rows = {}, []
  for name in ROWS:
    shown = []
    for order in ORDERS:
      shares = [round(x, 2) for x in found[name, order]]
      key = f'{report_files.key(name)}_{report_files.key(order)}'
      hops = zip(config.hops, shares, strict=True)
      summary |= {f'{key}_{hop}': share for hop, share in hops}
      shown.append(' / '.join(f'{share:.2f}' for share in shares))
    rows.append((name, *shown))
  cells_lib.write_page(
    store,
    _TASK,
    config,
    module=__name__,
    summary=summary,
    sections=[
      '# Aliases in one layer',
      _outcome(config, found),
      f'Share of the values that are found for the last alias of '
      f'{config.num_chains} names, after {_hops(config)} aliases of each; a '
      f'guess finds {1 / config.num_chains:.2f}. Means over '
      f'{config.num_streams} streams. From "own targets" on, each row adds '
      'memories to one layer that writes towards its own output.',
      report_files.table(('layer', *ORDERS), rows),
      '\n'.join(f'* {name}: {text}.' for name, text in ORDERS.items()),
      'The projections are set by hand. Whether training finds such weights '
      'was not measured.',
    ],
    plots=[],
  )


def _hops(config):
  return ' / '.join(map(str, config.hops))


def _outcome(config, found) -> str:
  """Returns what the numbers say."""
  share = lambda name, order: f'{found[name, order][-1]:.2f}'
  most = f'{config.hops[-1]} aliases away'
  last, first = 'values last', 'values first'
  rule = max(found['delta rule', order][-1] for order in ORDERS)
  return (
    f'Of values that are {most}, a layer with a memory of queries finds '
    f'{share("and queries", last)} where the aliases are told before the '
    f'values, one whose targets are its own outputs '
    f'{share("own targets", first)} where the values are told first, and one '
    f'with a memory of keys {share("and keys", "backwards")} where the last '
    f'aliases are told first. A delta rule finds at most {rule:.2f}, whatever '
    'comes first: it needs a layer for every alias on the way.'
  )
