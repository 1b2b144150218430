"""Families of pretrained transformers, and what their configs mean here.

`read` of a family makes a `ModelConfig` of a config.json, and `write` makes the
keys of a config.json of a `ModelConfig`.
"""

from collections.abc import Callable, Mapping
import dataclasses
import difflib
import functools
from typing import Any, NamedTuple

from nested_learning import errors
from nested_learning import layers
from nested_learning import models
from nested_learning.pretrained import keys as keys_lib
from nested_learning.pretrained import rope
from nested_learning.pretrained import tables

_ACTIVATIONS = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
}
_SLIDING, _FULL = 'sliding_attention', 'full_attention'


class Family(NamedTuple):
  """A family.

  Attributes:
    architecture: The class of transformers with its language model.
    rows: The table of its tensors.
    read: `read(keys)` returns the `ModelConfig`.
    write: `write(config)` returns the keys of a config.json.
    defaults: Values of keys that a config.json may leave out.
  """

  architecture: str
  rows: tuple[tables.Row, ...]
  read: Callable[[keys_lib.Keys], models.ModelConfig]
  write: Callable[[models.ModelConfig], dict[str, Any]]
  defaults: Mapping[str, Any]


class _Traits(NamedTuple):
  """Properties of a family of the Llama kind that config.json leaves out.

  Attributes:
    layer_types: `layer_types(keys, n)` returns the types of n layers where
      config.json does not list them.
    bias: Biases of attention: 'none', 'qkv', or 'key', which asks
      `attention_bias` for all of them.
    mlp_bias: Whether the key `mlp_bias` asks for biases of the MLP.
    qk_norm: Whether queries and keys are normalised.
    is_gemma: Norms with 1 + w before and after, scaled embeddings, caps.
    activation: Key of the activation, and its default.
    window: Whether the key `sliding_window` is read.
  """

  layer_types: Callable[[keys_lib.Keys, int], list[str]]
  bias: str = 'none'
  mlp_bias: bool = False
  qk_norm: bool = False
  is_gemma: bool = False
  activation: tuple[str, str] = ('hidden_act', 'silu')
  window: bool = True


def _read_decoder(traits: _Traits, keys: keys_lib.Keys) -> models.ModelConfig:
  """Reads a config of the Llama kind."""
  num_layers = keys.size('num_hidden_layers')
  embed_dim = keys.size('hidden_size')
  num_heads = keys.size('num_attention_heads')
  norm = layers.NormConfig(
    epsilon=keys.number('rms_norm_eps', 1e-6),
    offset=1.0 if traits.is_gemma else 0.0,
  )
  place = 'both' if traits.is_gemma else 'before'
  block_norm = dataclasses.replace(norm, place=place)
  attention = layers.AttentionConfig(
    num_heads,
    keys.size('num_key_value_heads', num_heads),
    keys.size('head_dim', embed_dim // num_heads),
    bias=_read_bias(traits, keys),
    qk_norm=norm if traits.qk_norm else None,
  )
  if traits.is_gemma:
    scalar = keys.number('query_pre_attn_scalar')
    attention = dataclasses.replace(
      attention,
      score_scale=None if scalar is None else scalar**-0.5,
      score_cap=keys.number('attn_logit_softcapping'),
    )
    keys.only('use_bidirectional_attention', False)
  mixers = _read_mixers(traits, keys, attention, num_layers)
  mlp_bias = traits.mlp_bias and keys.flag('mlp_bias')
  name, usual = traits.activation
  if name != 'hidden_act':  # an older key of the same meaning
    keys.only('hidden_act', *_ACTIVATIONS)
  mlp = layers.MlpConfig(
    activation=keys.choice(name, _ACTIVATIONS, usual),
    bias='all' if mlp_bias else 'none',
    norm=block_norm,
  )
  return models.ModelConfig(
    vocab_size=keys.size('vocab_size'),
    num_layers=num_layers,
    embed_dim=embed_dim,
    mixer=mixers,
    levels=(
      models.LevelConfig('mlp', keys.size('intermediate_size'), mlp=mlp),
    ),
    max_length=keys.size('max_position_embeddings', 2048),
    norm=block_norm,
    embedding=models.EmbeddingConfig(
      scale=None if traits.is_gemma else 1.0,
      head='tied' if keys.flag('tie_word_embeddings') else 'own',
      logit_cap=keys.number('final_logit_softcapping')
      if traits.is_gemma
      else None,
    ),
  )


def _read_bias(traits, keys) -> str:
  if traits.bias == 'key':
    return 'all' if keys.flag('attention_bias') else 'none'
  keys.only('attention_bias', False)
  return traits.bias


def _read_mixers(traits, keys, attention, num_layers):
  """Returns the mixer of all layers, or the pattern that they repeat."""
  types = keys.get('layer_types')
  if types is None:
    types = traits.layer_types(keys, num_layers)
  for name in ('max_window_layers', 'use_sliding_window'):
    keys.get(name)
  for name in ('sliding_window_pattern', '_sliding_window_pattern'):
    keys.get(name)
  known = isinstance(types, list)
  known = known and all(kind in (_SLIDING, _FULL) for kind in types)
  if not known or len(types) != num_layers:
    raise keys_lib.unsupported('layer_types', types)
  window = None
  if _SLIDING in types:
    window = keys.size('sliding_window')
  keys.get('sliding_window')
  ropes = rope.read(keys, sorted(set(types)))
  mixers = [
    dataclasses.replace(
      attention,
      window=window if kind == _SLIDING else None,
      rope_theta=ropes[kind].theta,
      rope_scaling=ropes[kind].scaling,
    )
    for kind in types
  ]
  return shortest_pattern(mixers)


def shortest_pattern(mixers: list[Any]) -> Any:
  """Returns the pattern that `mixers` repeat a whole number of times.

  Args:
    mixers: Mixer of every layer.

  Returns:
    The mixer, if all are equal, or a tuple.
  """
  for period in range(1, len(mixers) + 1):
    if len(mixers) % period:
      continue
    if all(a == b for a, b in zip(mixers, mixers[period:], strict=False)):
      break
  return mixers[0] if period == 1 else tuple(mixers[:period])


def _write_decoder(
  traits: _Traits, config: models.ModelConfig
) -> dict[str, Any]:
  """Writes a config of the Llama kind; the caller reads it again to check."""
  mixers = [
    config.pattern[i % len(config.pattern)] for i in range(config.num_layers)
  ]
  first, level = mixers[0], config.levels[0]
  windows = {m.window for m in mixers} - {None}
  types = [_FULL if m.window is None else _SLIDING for m in mixers]
  name, usual = traits.activation
  activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  activation = activations[level.mlp.activation]
  if _ACTIVATIONS[usual] == level.mlp.activation:
    activation = usual
  written = {
    'vocab_size': config.vocab_size,
    'hidden_size': config.embed_dim,
    'intermediate_size': level.mlp_dim,
    'num_hidden_layers': config.num_layers,
    'num_attention_heads': first.num_heads,
    'num_key_value_heads': first.num_kv_heads,
    'head_dim': first.head_dim,
    'rms_norm_eps': config.norm.epsilon,
    name: activation,
    'max_position_embeddings': config.max_length,
    'tie_word_embeddings': config.embedding.head == 'tied',
    'rope_parameters': rope.write(dict(zip(types, mixers, strict=True))),
  }
  if traits.window:
    written['sliding_window'] = max(windows, default=None)
    if traits.layer_types is not _all_sliding:
      written['layer_types'] = types
    if traits.layer_types is _last_sliding:
      written['use_sliding_window'] = bool(windows)
      written['max_window_layers'] = (types + [_SLIDING]).index(_SLIDING)
  if traits.bias == 'key':
    written['attention_bias'] = first.bias == 'all'
  if traits.mlp_bias:
    written['mlp_bias'] = level.mlp.bias == 'all'
  if traits.is_gemma:
    written |= {
      'query_pre_attn_scalar': _write_scalar(first),
      'attn_logit_softcapping': first.score_cap,
      'final_logit_softcapping': config.embedding.logit_cap,
    }
  return written


def _write_scalar(attention: layers.AttentionConfig) -> float:
  """Returns the number whose root divides the scores."""
  if attention.score_scale is None:
    return attention.head_dim
  exact = attention.score_scale**-2
  whole = round(exact)
  return whole if whole**-0.5 == attention.score_scale else exact


def _all_full(keys: keys_lib.Keys, num_layers: int) -> list[str]:
  return [_FULL] * num_layers


def _all_sliding(keys: keys_lib.Keys, num_layers: int) -> list[str]:
  """Mistral: every layer has the window, if there is one."""
  return [_SLIDING if keys.has('sliding_window') else _FULL] * num_layers


def _last_sliding(keys: keys_lib.Keys, num_layers: int) -> list[str]:
  """Qwen: layers from `max_window_layers` on, if windows are used."""
  if not keys.flag('use_sliding_window'):
    return [_FULL] * num_layers
  first = keys.get('max_window_layers', num_layers)
  if type(first) is not int:
    raise keys_lib.unsupported('max_window_layers', first)
  return [_FULL if i < first else _SLIDING for i in range(num_layers)]


def _every_other(keys: keys_lib.Keys, num_layers: int) -> list[str]:
  """Gemma 2: a window in the first layer, none in the second, and so on."""
  return [_FULL if i % 2 else _SLIDING for i in range(num_layers)]


def _but_every_sixth(keys: keys_lib.Keys, num_layers: int) -> list[str]:
  """Gemma 3: windows, but in every sixth layer."""
  period = keys.size('sliding_window_pattern', 6)
  return [_SLIDING if (i + 1) % period else _FULL for i in range(num_layers)]


def _read_gpt2(keys: keys_lib.Keys) -> models.ModelConfig:
  """Reads a config of GPT-2."""
  embed_dim, num_heads = keys.size('n_embd'), keys.size('n_head')
  keys.only('scale_attn_weights', True)
  keys.only('scale_attn_by_inverse_layer_idx', False)
  keys.only('add_cross_attention', False)
  keys.get('n_ctx')  # n_positions once more
  norm = layers.NormConfig(
    'layer', epsilon=keys.number('layer_norm_epsilon', 1e-5)
  )
  mlp = layers.MlpConfig(
    'plain',
    activation=keys.choice('activation_function', _ACTIVATIONS, 'gelu_new'),
    bias='all',
    norm=norm,
  )
  tied = keys.flag('tie_word_embeddings')
  return models.ModelConfig(
    vocab_size=keys.size('vocab_size'),
    num_layers=keys.size('n_layer'),
    embed_dim=embed_dim,
    mixer=layers.AttentionConfig(
      num_heads, num_heads, embed_dim // num_heads, rope_theta=None, bias='all'
    ),
    levels=(
      models.LevelConfig('mlp', keys.size('n_inner', 4 * embed_dim), mlp=mlp),
    ),
    max_length=keys.size('n_positions', 1024),
    norm=norm,
    embedding=models.EmbeddingConfig(
      scale=1.0, head='tied' if tied else 'own', positions='learned'
    ),
  )


def _write_gpt2(config: models.ModelConfig) -> dict[str, Any]:
  """Writes a config of GPT-2."""
  mixer, level = config.pattern[0], config.levels[0]
  activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  activations['gelu_tanh'] = 'gelu_new'
  return {
    'vocab_size': config.vocab_size,
    'n_embd': config.embed_dim,
    'n_layer': config.num_layers,
    'n_head': mixer.num_heads,
    'n_inner': level.mlp_dim,
    'n_positions': config.max_length,
    'layer_norm_epsilon': config.norm.epsilon,
    'activation_function': activations[level.mlp.activation],
    'tie_word_embeddings': config.embedding.head == 'tied',
  }


def _decoder(
  architecture: str, traits: _Traits, rows=tables.LLAMA, **defaults
) -> Family:
  return Family(
    architecture,
    rows,
    functools.partial(_read_decoder, traits),
    functools.partial(_write_decoder, traits),
    defaults,
  )


def _gemma(
  architecture: str,
  layer_types: Callable[..., list[str]],
  defaults: Mapping[str, Any],
  **traits,
) -> Family:
  activation = 'hidden_activation', 'gelu_pytorch_tanh'
  return _decoder(
    architecture,
    _Traits(layer_types, is_gemma=True, activation=activation, **traits),
    tables.GEMMA,
    head_dim=256,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    tie_word_embeddings=True,
    **defaults,
  )


_CAPS = {'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0}
_THETAS = {'rope_theta': 1e6, 'rope_local_base_freq': 1e4}

# By `model_type` of config.json. SmolLM2 is a Llama.
FAMILIES = {
  'llama': _decoder(
    'LlamaForCausalLM',
    _Traits(_all_full, bias='key', mlp_bias=True, window=False),
  ),
  'mistral': _decoder('MistralForCausalLM', _Traits(_all_sliding)),
  'qwen2': _decoder('Qwen2ForCausalLM', _Traits(_last_sliding, bias='qkv')),
  'qwen3': _decoder(
    'Qwen3ForCausalLM',
    _Traits(_last_sliding, bias='key', qk_norm=True),
    head_dim=128,
  ),
  'gemma2': _gemma('Gemma2ForCausalLM', _every_other, _CAPS),
  'gemma3_text': _gemma(
    'Gemma3ForCausalLM', _but_every_sixth, _THETAS, qk_norm=True
  ),
  'gpt2': Family(
    'GPT2LMHeadModel',
    tables.GPT2,
    _read_gpt2,
    _write_gpt2,
    {'tie_word_embeddings': True},
  ),
}


def find(model_type: Any) -> Family:
  """Returns a family by the `model_type` of its config.json.

  Raises:
    errors.UserError: There is no such family; it names the nearest ones.
  """
  if isinstance(model_type, str) and model_type in FAMILIES:
    return FAMILIES[model_type]
  if model_type is None:
    raise errors.UserError('config.json lacks model_type.')
  # 'gemma3' is Gemma 3 with images, whose text model is 'gemma3_text'.
  likely = [name for name in FAMILIES if name.startswith(str(model_type))]
  likely += difflib.get_close_matches(str(model_type), FAMILIES, 1, 0)
  raise errors.UserError(
    f'config.json has model_type={model_type!r}, which is not supported; the '
    f'nearest is {likely[0]}, and all are {", ".join(FAMILIES)}.'
  )
