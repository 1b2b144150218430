"""Rotary positions in a config.json, as transformers 4 and 5 write them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nested_learning import layers
from nested_learning.pretrained import keys as keys_lib

_SLIDING = 'sliding_attention'


class Rope(NamedTuple):
  """Rotary positions of the layers of one type."""

  theta: float
  scaling: layers.LinearScaling | layers.Llama3Scaling | None


def read(keys: keys_lib.Keys, types: Sequence[str]) -> dict[str, Rope]:
  """Reads the rotary positions of every type of layers.

  Args:
    keys: Keys of a config.json. transformers 5 writes `rope_parameters`,
      perhaps by type of layer; 4 wrote `rope_theta` and `rope_scaling`, and
      `rope_local_base_freq` for layers with a window, which are not scaled.
    types: Types of layers.

  Returns:
    The positions by type.

  Raises:
    errors.UserError: They are of a kind that is not supported.
  """
  given = keys.get('rope_parameters')
  theta = keys.number('rope_theta', 10_000.0)
  scaling = keys.get('rope_scaling')
  local = keys.number('rope_local_base_freq')
  keys.only('rope_interleaved', False)
  keys.only('partial_rotary_factor', 1, 1.0)
  if scaling is not None and not isinstance(scaling, Mapping):
    raise keys_lib.unsupported('rope_scaling', scaling)
  if given is None:
    given = {'rope_theta': theta, **(scaling or {'rope_type': 'default'})}
    if local is not None:
      full = dict.fromkeys(types, given)
      plain = {'rope_theta': local, 'rope_type': 'default'}
      given = {**full, _SLIDING: plain}
  if not isinstance(given, Mapping):
    raise keys_lib.unsupported('rope_parameters', given)
  nested = {kind: given[kind] for kind in types if kind in given}
  if nested and len(nested) < len(types):
    raise keys_lib.unsupported('rope_parameters', given)
  return {kind: _read_one(nested.get(kind, given), theta) for kind in types}


def write(mixers: Mapping[str, layers.AttentionConfig]) -> dict[str, Any]:
  """Writes `rope_parameters` of the mixer of every type of layers."""
  found = {kind: _write_one(mixer) for kind, mixer in mixers.items()}
  if all(one == next(iter(found.values())) for one in found.values()):
    return next(iter(found.values()))
  return found


def _read_one(given: Mapping[str, Any], theta: float) -> Rope:
  if not isinstance(given, Mapping):
    raise keys_lib.unsupported('rope_parameters', given)
  own = keys_lib.Keys(given, {})
  theta = own.number('rope_theta', theta)
  kind = own.get('rope_type', given.get('type', 'default'))
  own.get('type')
  own.only('partial_rotary_factor', 1, 1.0)
  scaling = None
  if kind == 'linear':
    scaling = layers.LinearScaling(own.needed('factor'))
  elif kind == 'llama3':
    scaling = layers.Llama3Scaling(
      own.needed('factor'),
      own.needed('low_freq_factor'),
      own.needed('high_freq_factor'),
      own.size('original_max_position_embeddings'),
    )
  elif kind != 'default':
    raise keys_lib.unsupported('rope_type', kind)
  own.finish(())
  return Rope(theta, scaling)


def _write_one(mixer: layers.AttentionConfig) -> dict[str, Any]:
  written = {'rope_theta': mixer.rope_theta, 'rope_type': 'default'}
  match mixer.rope_scaling:
    case layers.LinearScaling(factor=factor):
      written |= {'rope_type': 'linear', 'factor': factor}
    case layers.Llama3Scaling() as scaling:
      written |= {
        'rope_type': 'llama3',
        'factor': scaling.factor,
        'low_freq_factor': scaling.low_factor,
        'high_freq_factor': scaling.high_factor,
        'original_max_position_embeddings': scaling.original_length,
      }
  return written
