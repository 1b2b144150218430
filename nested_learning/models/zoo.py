"""The zoo: every family of models at every named size.

    config = zoo.make_config('hope_170m')
    inner = zoo.make_inner('hope_170m')

A family is a row of `FAMILIES`: a mixer, a chain of levels, and how these learn
inside a stream.

Widths, depths and heads of 170M to 760M are those of Miras, arXiv:2504.13173,
and of 1.3B those of Atlas, arXiv:2505.23735, whose tables Nested Learning
follows where it states nothing. No paper gives the width of the MLPs; here it
makes Hope as large as its name. Other families have the same sizes and another
mixer.
"""

from collections.abc import Callable
import dataclasses
import difflib
from typing import Any, NamedTuple

from nested_learning import errors
from nested_learning import levels as levels_lib
from nested_learning import optimizers
from nested_learning.layers import attention
from nested_learning.layers import cms
from nested_learning.layers import convolved
from nested_learning.layers import hybrids
from nested_learning.layers import memory_mixer
from nested_learning.layers import tnt
from nested_learning.memory import extensions
from nested_learning.models import trunk


@dataclasses.dataclass(frozen=True)
class Size:
  """Width and depth of a model with any mixer."""

  num_layers: int
  embed_dim: int  # also the width of all heads together
  num_heads: int
  mlp_dim: int  # hidden width of all levels of a block together
  vocab_size: int = 32_000
  max_length: int = 4096  # tokens
  window: int = 512  # tokens of sliding-window attention
  # Tokens of a stream between two steps of each level that learns inside it.
  update_every: tuple[int, int, int] = (512, 2048, 8192)

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if field.type is int:
        at_least_one = getattr(self, field.name) >= 1
        errors.check_field(self, field.name, at_least_one, 'at least 1')

  @property
  def head_dim(self) -> int:
    """Width of a head."""
    return self.embed_dim // self.num_heads


_SHORT = {'vocab_size': 257, 'update_every': (64, 256, 1024)}
SIZES = {
  'tiny': Size(2, 32, 2, 48, max_length=256, window=32, **_SHORT),
  'small': Size(3, 128, 4, 384, max_length=1024, window=128, **_SHORT),
  '170m': Size(12, 768, 16, 3840),
  '340m': Size(24, 1024, 16, 2304),
  '760m': Size(24, 1536, 16, 3744),
  '1p3b': Size(18, 2048, 8, 7392),
  '7b': Size(32, 4096, 16, 10_272),  # in no paper
  '70b': Size(80, 8192, 32, 21_120),  # in no paper
}

_LEVELS = ('fast', 'middle', 'slow')  # of Hope's chain


class Family(NamedTuple):
  """A family of models of any size.

  Attributes:
    mixer: `mixer(size)` returns the config of the mixer, or a tuple of them
      that the blocks repeat.
    levels: `levels(size)` returns the chain of a block.
    inner: `inner(size)` returns how its levels learn inside a stream.
    chain: How the levels are connected.
  """

  mixer: Callable[[Size], Any]
  levels: Callable[[Size], tuple[cms.LevelConfig, ...]]
  inner: Callable[[Size], levels_lib.InnerConfig] = lambda size: (
    levels_lib.InnerConfig()
  )
  chain: cms.ChainConfig = cms.ChainConfig()


def _mlp(size: Size) -> tuple[cms.LevelConfig, ...]:
  return (cms.LevelConfig('mlp', size.mlp_dim),)


def _chain(size: Size) -> tuple[cms.LevelConfig, ...]:
  return tuple(
    cms.LevelConfig(level, size.mlp_dim // len(_LEVELS)) for level in _LEVELS
  )


def _learning(size: Size) -> levels_lib.InnerConfig:
  """Makes all levels of a chain learn, in the last quarter of the blocks."""
  return levels_lib.make_inner(size.update_every)


def _memory(
  *, expansion: int = 1, **settings
) -> Callable[[Size], memory_mixer.MemoryMixerConfig]:
  """Makes a memory per head, its hidden layer `expansion` heads wide."""
  return lambda size: memory_mixer.MemoryMixerConfig(
    size.num_heads,
    size.head_dim,
    hidden_dim=0 if expansion == 1 else expansion * size.head_dim,
    **settings,
  )


def _printed_memory(size: Size) -> memory_mixer.MemoryMixerConfig:
  """Makes the mixer of Hope as printed, NL eqs. 83-96.

  Memories for k, v, inner_lr, retention and main are residual MLPs, q is a
  projection (`adaptive` takes 'q' as well). All are written towards their own
  output for the value, by Delta Gradient Descent with retention on every map.
  Keys, values, rates and reads come from the memories at their chunk's start.

  Where the equations leave a choice or contradict each other:

  * The error is M(k) - v^, as in eq. 93, although the objective of eq. 88 has
    no 1/2. The chunk of token t starts at C floor((t - 1) / C), which eq. 90
    prints with a ceiling. The sign of eq. 92 is not used.
  * inner_lr is the step eta' = eta / (1 + eta) of eq. 57, not the eta of eqs.
    88 to 93: a sigmoid, since eta = exp(x) for what the memory makes.
  * A map is erased along its own input (eq. 57): k for W2, h = act(W2 k) for
    W1, where k of eq. 88 does not fit. The rate of W1 is eta' / |h|^2.
  * Rates are one number per token and head, with a bias outside the memory.
    Chunks have 16 tokens (Figure 5) and 64; the paper gives no other.
  * Everything around the memories is that of `memory_mixer`.

  One deviation is for stability: `max_norm` bounds how far a map may go from
  its initial weights, to an eighth of the initial norm of the map that reads
  the key (for the four other roles together a sixteenth), so that retention
  cannot empty that map. A bound that lets it makes gradients explode in
  training; on long rows of one token they explode with this one, too. See
  experiments/results/ablations/README.md.
  """
  return memory_mixer.MemoryMixerConfig(
    size.num_heads,
    size.head_dim,
    objective='l2',
    erase='every_map',
    learns='every_map',
    retain_to='zero',
    read='chunk',
    chunk_size=16,
    chunk_size_others=64,
    max_inner_lr=1.0,
    max_norm=size.head_dim / 4,
  )


def _printed_learning(size: Size) -> levels_lib.InnerConfig:
  """Makes every level of every block learn as printed, NL eqs. 57, 71 and 97.

  A level takes a step of Delta Gradient Descent on the sum of the next-token
  losses of its chunk. The paper gives no rate. Norms, which eq. 97 leaves out,
  take gradient steps of the same rate, and these grow with the sum: at 1e-4
  they stay below the size of the norms.
  """
  return levels_lib.make_inner(
    size.update_every,
    learning_rate=1e-4,
    optimizer=optimizers.configs.Dgd(target='printed'),
    clip_norm=None,
    depth=1.0,
    reduce='sum',
  )


def _attention(**settings) -> Callable[[Size], attention.AttentionConfig]:
  """Makes attention to all tokens, with a key per four heads."""
  return lambda size: attention.AttentionConfig(
    size.num_heads, max(size.num_heads // 4, 1), size.head_dim, **settings
  )


def _window(**settings) -> Callable[[Size], attention.AttentionConfig]:
  """Makes attention to the last `window` tokens."""
  return lambda size: _attention(window=size.window, **settings)(size)


def _with(make, *parts) -> Callable[[Size], Any]:
  """Makes a config of the configs of its parts."""
  return lambda size: make(*(part(size) for part in parts))


def _pattern(*parts) -> Callable[[Size], tuple[Any, ...]]:
  """Makes a tuple of mixers that the blocks repeat."""
  return lambda size: tuple(part(size) for part in parts)


# Keys, values and rates are projections; the memory learns values.
_STATIC = {
  'learns': 'every_map',
  'adaptive': (),
  'target': 'value',
  'retain_to': 'zero',
  'max_inner_lr': 1.0,
  'max_norm': None,
}
_MATRIX = {**_STATIC, 'kind': 'matrix', 'initial': 'zero', 'objective': 'dot'}
_LINEAR = {**_MATRIX, 'erase': 'none', 'inner_lr': 'one'}
_DELTA = {**_MATRIX, 'erase': 'input'}
# Errors are those at the start of a chunk and nothing is erased, so that the
# steps of a chunk add up and larger ones overshoot.
_DESCENT = {
  **_STATIC,
  'objective': 'l2',
  'erase': 'none',
  'max_inner_lr': 0.1,
}
_TTT = {**_DESCENT, 'retention': 'none', 'output': 'norm', 'chunk_size': 16}
_MIRAS = {**_DESCENT, 'output': 'norm', 'read': 'chunk', 'chunk_size': 16}
_MAX_NORM = 8.0  # departure of a map from its initial weights, Frobenius norm
_WIDE = {'expansion': 4, 'activation': 'gelu'}


def _tnt(size: Size) -> tnt.TntConfig:
  """Makes TNT with one local memory and shards as long as global chunks."""
  shard = 4 * size.window
  # The paper bounds nothing. Without a bound the steps of a whole chunk, which
  # one anchor's errors make, overflow where keys repeat.
  settings = {
    **_DESCENT,
    'retention': 'none',
    'chunk_size': shard,
    'max_norm': _MAX_NORM,
  }
  return tnt.TntConfig(
    _memory(**settings)(size), (tnt.LocalConfig(shard_size=shard),)
  )


# Atlas: windows of tokens, and keys that are polynomials. The paper leaves the
# length of a window open.
_WINDOW = 8  # tokens
_OMEGA = {**_DESCENT, 'features': 'polynomial', 'chunk_size': 16}
# OmegaNet's plain steps sum the errors of a window, so that every error is
# written once per token of the window. The paper bounds neither the sum of a
# window's weights nor the state, and normalises the memory's layer at the end
# of a chunk. Here the largest rates of a window sum to the rate of one token,
# and `max_norm` bounds the state at the end of a chunk. Without the two bounds
# an untrained memory overflows within a hundred tokens. Atlas' orthogonal steps
# have a size of their own and need neither.
_OMEGA_NET = {
  **_OMEGA,
  'extension': extensions.Omega(_WINDOW),
  'max_inner_lr': _DESCENT['max_inner_lr'] / _WINDOW,
  'max_norm': _MAX_NORM,
}

# Titans' long-term memory: gradient descent with momentum, and forgetting. The
# paper bounds nothing; without a bound, what a trace adds up may overflow.
_LMM = _memory(**{**_DESCENT, 'max_norm': _MAX_NORM}, momentum=True)
_GATED_LINEAR = _memory(**_LINEAR)
_PERSISTENT = {'num_persistent': 4}  # tokens; Titans does not say how many

# Self-modifying Titans with the settings that measured best: values in place of
# the memory's own outputs as targets, projections in place of the memories that
# make keys, values and rates. See experiments/results/ablations/README.md.
_HOPE = _memory(expansion=2, adaptive=(), target='value')

FAMILIES = {
  'hope': Family(_HOPE, _chain, _learning),
  'hope_printed': Family(
    _printed_memory,
    _chain,
    _printed_learning,
    # Eqs. 70 and 97, whose first level is the slowest by eqs. 72 and 73; Figure
    # 5 draws the fastest first.
    cms.ChainConfig(order='slowest_first'),
  ),
  'hope_attention': Family(_attention(), _chain, _learning),
  'transformer': Family(_attention(), _mlp),
  'convolved_transformer': Family(
    _with(convolved.ConvolvedAttentionConfig, _attention()), _mlp
  ),
  'sliding_window': Family(_window(), _mlp),
  'samba': Family(_pattern(_GATED_LINEAR, _window()), _mlp),
  'linear_attention': Family(
    _memory(**_LINEAR, features='elu', retention='none'), _mlp
  ),
  'retnet': Family(_memory(**_LINEAR, retention='head'), _mlp),
  'gated_linear_attention': Family(_GATED_LINEAR, _mlp),
  'deltanet': Family(_memory(**_DELTA, retention='none'), _mlp),
  'gated_deltanet': Family(_memory(**_DELTA, erase_from='retained'), _mlp),
  'ttt_linear': Family(
    _memory(**{**_TTT, 'kind': 'matrix', 'max_inner_lr': 1.0}), _mlp
  ),
  'ttt_mlp': Family(_memory(**_TTT, **_WIDE), _mlp),
  'titans': Family(_LMM, _mlp),
  'tnt': Family(_tnt, _mlp),
  'yaad': Family(_memory(**{**_MIRAS, **_WIDE, 'objective': 'huber'}), _mlp),
  'moneta': Family(
    _memory(**{**_MIRAS, **_WIDE, 'objective': 'l3', 'weights': 'lq_norm'}),
    _mlp,
  ),
  'memora': Family(_memory(**_MIRAS, **_WIDE, weights='softmax'), _mlp),
  'omeganet': Family(_memory(**_OMEGA_NET, **_WIDE), _mlp),
  'atlas': Family(
    _memory(
      **_OMEGA,
      **_WIDE,
      momentum=True,
      extension=extensions.Omega(_WINDOW, step='orthogonal'),
    ),
    _mlp,
  ),
  'deltattt': Family(
    _memory(
      **_STATIC,
      erase='every_map',
      extension=extensions.LocalTargets(),
      output='map',
      retention='none',
    ),
    _mlp,
  ),
  'titans_mac': Family(
    _with(hybrids.MemoryAsContextConfig, _LMM, _attention(**_PERSISTENT)),
    _mlp,
  ),
  'titans_mag': Family(
    _with(hybrids.MemoryAsGateConfig, _LMM, _window(**_PERSISTENT)), _mlp
  ),
  'titans_mal': Family(
    _with(hybrids.MemoryAsLayerConfig, _LMM, _window(**_PERSISTENT)), _mlp
  ),
}


def names() -> list[str]:
  """Returns every name that `make_config` takes."""
  return list(_named())


def make_config(name: str, **changes) -> trunk.ModelConfig:
  """Returns the config of a named model.

  Args:
    name: Family and size, for instance 'hope_170m' or 'titans_mac_tiny'.
    **changes: Fields of the config to replace, for instance dtype='bfloat16'.

  Returns:
    A `ModelConfig`. Hope and Hope-Attention have three levels, every other
    model one MLP as wide as these together. A pattern of mixers repeats until
    there are at least as many layers as the size has.

  Raises:
    errors.UserError: The zoo has no such model.
  """
  family, size = _find(name)
  return make_sized(family, size, **changes)


def make_inner(name: str) -> levels_lib.InnerConfig:
  """Returns how the levels of a named model learn inside a stream.

  Args:
    name: Family and size, see `make_config`.

  Returns:
    An `InnerConfig`: `make_model(make_config(name), make_inner(name))` is the
    model with these levels. It is off for a family whose MLPs do not learn.

  Raises:
    errors.UserError: The zoo has no such model.
  """
  family, size = _find(name)
  return FAMILIES[family].inner(size)


def make_sized(family: str, size: Size, **changes) -> trunk.ModelConfig:
  """Returns the config of a family at any size; see `make_config`.

  Args:
    family: One of `FAMILIES`.
    size: Its width and depth.
    **changes: Fields of the config to replace.

  Returns:
    A `ModelConfig`.
  """
  mixer = FAMILIES[family].mixer(size)
  length = len(mixer) if isinstance(mixer, tuple) else 1  # of the pattern
  config = trunk.ModelConfig(
    vocab_size=size.vocab_size,
    num_layers=-(-size.num_layers // length) * length,
    embed_dim=size.embed_dim,
    mixer=mixer,
    levels=FAMILIES[family].levels(size),
    chain=FAMILIES[family].chain,
    max_length=size.max_length,
  )
  return dataclasses.replace(config, **changes)


def _find(name: str) -> tuple[str, Size]:
  """Returns family and size of a name."""
  if name not in _named():
    nearest = difflib.get_close_matches(name, names(), n=3, cutoff=0)
    raise errors.UserError(
      f'no model {name!r} in the zoo; the nearest are {", ".join(nearest)}.'
    )
  return _named()[name]


def _named() -> dict[str, tuple[str, Size]]:
  return {
    f'{family}_{name}': (family, size)
    for family in FAMILIES
    for name, size in SIZES.items()
  }
