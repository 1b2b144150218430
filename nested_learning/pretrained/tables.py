"""One table per family: their tensor, our parameter, how axes turn.

The same rows import and export. A row is used if the model has its parameter:
rows of biases, of norms after a part and of an own head are in the tables of
all families that may have them. Paths of blocks are those below
`params['blocks']`.
"""

from collections.abc import Iterator
from typing import NamedTuple

from nested_learning import layers
from nested_learning import models
from nested_learning.pretrained import axes

# Buffers that some checkpoints hold and that are no weights.
BUFFERS = r'.*(rotary_emb\.inv_freq|attn\.(masked_)?bias)'


class Row(NamedTuple):
  """A row of a table.

  Attributes:
    name: Name of their tensor; '{i}' stands for the layer.
    paths: Our parameters; several are one tensor of theirs, along axis 's'.
    turn: How its axes turn, see `axes`.
  """

  name: str
  paths: tuple[str, ...]
  turn: axes.Turn


class Place(NamedTuple):
  """A tensor of theirs and its place in our parameters.

  Attributes:
    name: Name of their tensor.
    paths: Paths of our parameters.
    layer: Index along the leading axis of stacked layers; None if the
      parameters are not stacked.
    turn: How its axes turn.
  """

  name: str
  paths: tuple[str, ...]
  layer: int | None
  turn: axes.Turn


def expand(
  rows: tuple[Row, ...], config: models.ModelConfig
) -> Iterator[Place]:
  """Yields the places of all tensors that the rows allow a model to have.

  Args:
    rows: The table of a family.
    config: The model.

  Yields:
    A `Place` for every row outside the blocks, and for every row and layer.
  """
  period = len(config.blocks)
  for row in rows:
    if '{i}' not in row.name:
      yield Place(row.name, row.paths, None, row.turn)
      continue
    for i in range(config.num_layers):
      block = config.blocks[i % period]
      prefix = f'blocks/{i % period}' if config.is_grouped else 'blocks'
      yield Place(
        row.name.format(i=i),
        tuple(f'{prefix}/{_own(block, path)}' for path in row.paths),
        i // period,
        row.turn,
      )


def is_added(config: models.ModelConfig, path: str) -> bool:
  """Returns whether a parameter is one that pretrained models do not have.

  These are memories beside attention, and levels beside the first of a layer;
  see `models.complete`.
  """
  names = path.split('/')
  if names[0] != 'blocks':
    return False
  block = config.blocks[int(names[1]) if config.is_grouped else 0]
  part, name, *_ = (*names[2 if config.is_grouped else 1 :], '')
  if part == 'mixer':
    return _has_memory(block) and name == 'memory'
  return part == 'mix' or (part == 'levels' and name != block.levels[0].name)


def _has_memory(block: models.Block) -> bool:
  return isinstance(block.mixer, layers.MemoryBesideConfig)


def _own(block: models.Block, path: str) -> str:
  """Returns the path of a parameter in a block."""
  path = path.format(level=block.levels[0].name)
  if _has_memory(block) and path.startswith('mixer/'):
    return path.replace('mixer/', 'mixer/attention/')
  return path


def _row(name: str, paths: str | tuple[str, ...], turn: str) -> Row:
  paths = (paths,) if isinstance(paths, str) else paths
  return Row(name, paths, axes.parse(turn))


def _layer(part: str, path: str, turn: str) -> Row:
  return _row(f'model.layers.{{i}}.{part}', path, turn)


def _projection(theirs: str, ours: str) -> list[Row]:
  """Returns the rows of queries, keys or values: matrix, bias and norm."""
  return [
    _layer(
      f'self_attn.{theirs}_proj.weight', f'mixer/{ours}', '(h d) e -> e h d'
    ),
    _layer(
      f'self_attn.{theirs}_proj.bias', f'mixer/{ours}_bias', '(h d) -> h d'
    ),
    _layer(f'self_attn.{theirs}_norm.weight', f'mixer/{ours}_norm', 'd -> d'),
  ]


def _matrix(name: str, turn: str) -> list[Row]:
  """Returns the rows of a matrix of the MLP and of its bias."""
  path = f'levels/{{level}}/{name}'
  return [
    _layer(f'mlp.{name}_proj.weight', path, turn),
    _layer(f'mlp.{name}_proj.bias', f'{path}_bias', 'x -> x'),
  ]


_ENDS = (
  _row('model.embed_tokens.weight', 'embedding', 'v e -> v e'),
  _row('model.norm.weight', 'norm', 'e -> e'),
  _row('lm_head.weight', 'head', 'v e -> v e'),
)
_BLOCK = (
  *_projection('q', 'query'),
  *_projection('k', 'key'),
  *_projection('v', 'value'),
  _layer('self_attn.o_proj.weight', 'mixer/out', 'e (h d) -> h d e'),
  _layer('self_attn.o_proj.bias', 'mixer/out_bias', 'e -> e'),
  *_matrix('gate', 'f e -> e f'),
  *_matrix('up', 'f e -> e f'),
  *_matrix('down', 'e f -> f e'),
  _layer('input_layernorm.weight', 'norm', 'e -> e'),
)

# Llama, Mistral, Qwen2 and Qwen3.
LLAMA = (
  *_ENDS,
  *_BLOCK,
  _layer('post_attention_layernorm.weight', 'levels/{level}/norm', 'e -> e'),
)

# Gemma 2 and 3 normalise what a part adds, too.
GEMMA = (
  *_ENDS,
  *_BLOCK,
  _layer('post_attention_layernorm.weight', 'norm_after', 'e -> e'),
  _layer('pre_feedforward_layernorm.weight', 'levels/{level}/norm', 'e -> e'),
  _layer(
    'post_feedforward_layernorm.weight', 'levels/{level}/norm_after', 'e -> e'
  ),
)


def _gpt2(part: str, paths: str | tuple[str, ...], turn: str) -> Row:
  return _row(f'transformer.h.{{i}}.{part}', paths, turn)


def _gpt2_norm(name: str, path: str) -> list[Row]:
  return [
    _row(f'transformer.{name}.weight', f'{path}/scale', 'e -> e'),
    _row(f'transformer.{name}.bias', f'{path}/bias', 'e -> e'),
  ]


_QKV = ('query', 'key', 'value')
_MLP = 'levels/{level}'

# GPT-2's matrices are [inputs, outputs], and q, k and v are one of them.
GPT2 = (
  _row('transformer.wte.weight', 'embedding', 'v e -> v e'),
  _row('transformer.wpe.weight', 'positions', 't e -> t e'),
  _row('lm_head.weight', 'head', 'v e -> v e'),
  *_gpt2_norm('ln_f', 'norm'),
  *_gpt2_norm('h.{i}.ln_1', 'norm'),
  *_gpt2_norm('h.{i}.ln_2', f'{_MLP}/norm'),
  _gpt2(
    'attn.c_attn.weight',
    tuple(f'mixer/{name}' for name in _QKV),
    'e (s h d) -> s e h d',
  ),
  _gpt2(
    'attn.c_attn.bias',
    tuple(f'mixer/{name}_bias' for name in _QKV),
    '(s h d) -> s h d',
  ),
  _gpt2('attn.c_proj.weight', 'mixer/out', '(h d) e -> h d e'),
  _gpt2('attn.c_proj.bias', 'mixer/out_bias', 'e -> e'),
  _gpt2('mlp.c_fc.weight', f'{_MLP}/up', 'e f -> e f'),
  _gpt2('mlp.c_fc.bias', f'{_MLP}/up_bias', 'f -> f'),
  _gpt2('mlp.c_proj.weight', f'{_MLP}/down', 'f e -> f e'),
  _gpt2('mlp.c_proj.bias', f'{_MLP}/down_bias', 'e -> e'),
)
