"""Reads GGUF files, the format of llama.cpp, as folders of Hugging Face.

Names, axes and values are turned back into those that llama.cpp's converter was
given, so that the tables of the families serve both formats. Quantised tensors
are read as float32.
"""

from collections.abc import Callable
import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from nested_learning import errors
from nested_learning import files
from nested_learning.pretrained import families
from nested_learning.pretrained import gguf_sentencepiece
from nested_learning.pretrained import gguf_tokenizer
from nested_learning.pretrained import tables
from nested_learning.pretrained import tensors as tensors_lib
from nested_learning.pretrained import translation

# Their architecture, and our family.
_ARCHITECTURES = {
  'llama': 'llama',
  'qwen2': 'qwen2',
  'qwen3': 'qwen3',
  'gemma2': 'gemma2',
  'gemma3': 'gemma3_text',
  'gpt2': 'gpt2',
}
_LLAMA3_FACTORS = (8.0, 32.0)  # of Llama 3.1 and 3.2
# Layers of the largest Gemma 2 and 3, whose scores have a scale of their own.
_LARGEST = {'gemma2': 46, 'gemma3': 62}
_LOCAL_THETA = 10_000.0  # of Gemma 3's layers with a window


def read(
  path: pathlib.Path,
) -> tuple[dict[str, Any], dict[str, tensors_lib.Tensor], dict[str, bytes]]:
  """Opens a GGUF file.

  Args:
    path: The file.

  Returns:
    The object of a config.json, the tensors under Hugging Face's names, and the
    contents of files with the tokenizer, the chat template and the tokens that
    end a text.

  Raises:
    errors.UserError: The file is missing or damaged, the package gguf is not
      installed, or the model is of an unknown kind.
  """
  reader = _open(path)
  fields = {name: field.contents() for name, field in reader.fields.items()}
  architecture = fields.get('general.architecture')
  if architecture not in _ARCHITECTURES:
    raise errors.UserError(
      f'{files.shown(path)} has general.architecture={architecture!r}, which '
      f'is not supported; {", ".join(_ARCHITECTURES)} are.'
    )
  stored = {tensor.name: tensor for tensor in reader.tensors}
  config = _config(path, architecture, fields, stored)
  return config, _tensors(architecture, config, stored), _files(fields)


def _open(path: pathlib.Path):
  try:
    import gguf
  except ImportError as error:
    raise errors.UserError(
      f'{files.shown(path)} needs the package gguf; install it with `pip '
      'install "nested-learning[gguf]"`.'
    ) from error
  try:
    return gguf.GGUFReader(path)
  except OSError as error:
    raise errors.UserError(
      f'{files.shown(path)} cannot be read ({error.strerror}); check the path.'
    ) from error
  except Exception as error:  # many types, for whatever is cut off
    raise errors.UserError(
      f'{files.shown(path)} is cut short or damaged, or no GGUF '
      f'({errors.first_line(error)}); download it again.'
    ) from error


def _config(path, architecture, fields, stored) -> dict[str, Any]:
  """Makes the object of a config.json."""

  def get(name, default=None):
    value = fields.get(f'{architecture}.{name}', default)
    if isinstance(value, float):  # float32: 1e-5 and not 9.99999975e-06
      value = float(str(np.float32(value)))
    return value

  def need(name):
    value = get(name)
    if value is None:
      raise errors.UserError(
        f'{files.shown(path)} lacks {architecture}.{name}; convert the model '
        'again.'
      )
    return value

  ids = {
    f'{name}_token_id': fields.get(f'tokenizer.ggml.{theirs}_token_id')
    for name, theirs in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding'))
  }
  family = families.find(_ARCHITECTURES[architecture])
  config = {
    'architectures': [family.architecture],
    'model_type': _ARCHITECTURES[architecture],
    'dtype': 'float32',
    'vocab_size': int(stored['token_embd.weight'].shape[1]),
    'tie_word_embeddings': 'output.weight' not in stored,
    **{name: value for name, value in ids.items() if value is not None},
  }
  if architecture == 'gpt2':
    return config | {
      'n_embd': need('embedding_length'),
      'n_layer': need('block_count'),
      'n_head': need('attention.head_count'),
      'n_inner': need('feed_forward_length'),
      'n_positions': need('context_length'),
      'layer_norm_epsilon': need('attention.layer_norm_epsilon'),
      'activation_function': 'gelu_new',
    }
  num_heads, embed_dim = need('attention.head_count'), need('embedding_length')
  head_dim = get('attention.key_length', embed_dim // num_heads)
  config |= {
    'hidden_size': embed_dim,
    'num_hidden_layers': need('block_count'),
    'num_attention_heads': num_heads,
    'num_key_value_heads': get('attention.head_count_kv', num_heads),
    'head_dim': head_dim,
    'intermediate_size': need('feed_forward_length'),
    'max_position_embeddings': need('context_length'),
    'rms_norm_eps': need('attention.layer_norm_rms_epsilon'),
    'rope_parameters': _rope(path, architecture, get, stored, head_dim),
  }
  if architecture.startswith('gemma'):
    largest = config['num_hidden_layers'] == _LARGEST[architecture]
    scalar = embed_dim // num_heads if largest else head_dim
    config |= {
      'hidden_activation': 'gelu_pytorch_tanh',
      'query_pre_attn_scalar': scalar,
      'sliding_window': need('attention.sliding_window'),
      'attn_logit_softcapping': get('attn_logit_softcapping'),
      'final_logit_softcapping': get('final_logit_softcapping'),
    }
  else:
    config['hidden_act'] = 'silu'
  if architecture == 'llama':
    config['attention_bias'] = 'blk.0.attn_q.bias' in stored
    config['mlp_bias'] = 'blk.0.ffn_up.bias' in stored
  return config


def _rope(path, architecture, get, stored, head_dim) -> dict[str, Any]:
  """Makes `rope_parameters`."""
  theta = get('rope.freq_base', 10_000.0)
  kind = get('rope.scaling.type', 'none')
  rope = {'rope_type': 'default', 'rope_theta': theta}
  if kind == 'linear':
    rope |= {'rope_type': 'linear', 'factor': get('rope.scaling.factor')}
  elif kind != 'none':
    raise errors.UserError(
      f'{files.shown(path)} has {architecture}.rope.scaling.type={kind!r}, '
      'which is not supported; linear is.'
    )
  if 'rope_freqs.weight' in stored:
    given = np.asarray(stored['rope_freqs.weight'].data)
    rope |= _find_llama3(path, given, theta, head_dim)
  if architecture == 'gemma3':
    local = {'rope_type': 'default', 'rope_theta': _LOCAL_THETA}
    return {'sliding_attention': local, 'full_attention': rope}
  return rope


def _find_llama3(path, given, theta, head_dim) -> dict[str, Any]:
  """Finds the scaling whose divisors of frequencies are the given ones."""
  frequency = theta ** (-np.arange(head_dim // 2) / (head_dim // 2))
  for factor in _LLAMA3_FACTORS:
    rope = {
      'rope_type': 'llama3',
      'factor': factor,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 8192,
    }
    turns = frequency * 8192 / (2 * np.pi)
    kept = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    divisors = 1 / (kept + (1 - kept) / factor)
    if np.shape(given) == divisors.shape and np.allclose(
      given, divisors, rtol=1e-3
    ):
      return rope
  raise errors.UserError(
    f'{files.shown(path)} scales rotary frequencies (rope_freqs.weight) in a '
    'way that is not that of Llama 3.1 or 3.2; use its safetensors.'
  )


def _tensors(architecture, config, stored) -> dict[str, tensors_lib.Tensor]:
  """Names tensors as Hugging Face does; those without a name keep theirs."""
  import gguf

  model = translation.to_model_config(config)
  number = {name: n for n, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
  names = gguf.get_tensor_name_map(number, model.num_layers)
  rows = families.find(config['model_type']).rows
  found, left = {}, dict(stored)
  left.pop('rope_freqs.weight', None)  # it is in the config
  undo = _undo(architecture, model)
  for place in tables.expand(rows, model):
    theirs = names.get_name(place.name, try_suffixes=('.weight', '.bias'))
    if theirs in left:
      found[place.name] = _tensor(place.name, left.pop(theirs), undo)
  keep = lambda name, x: x
  return found | {name: _tensor(name, x, keep) for name, x in left.items()}


def _tensor(name: str, stored, undo: Callable) -> tensors_lib.Tensor:
  """Makes a tensor that is read and turned back when it is needed."""
  import gguf

  kind = gguf.GGMLQuantizationType(stored.tensor_type)
  dtypes = {'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'F64': np.float64}
  dtype = np.dtype(dtypes.get(kind.name, np.float32))

  def read():
    try:
      x = gguf.quants.dequantize(stored.data, kind)
    except NotImplementedError as error:
      raise errors.UserError(
        f'{stored.name} is of the GGUF type {kind.name}, which the package '
        'gguf cannot read; convert the model to another one, such as Q8_0.'
      ) from error
    shape = tuple(int(n) for n in reversed(stored.shape))
    return undo(name, x.reshape(shape)).astype(dtype)

  # The shape after `undo`, which costs nothing on a broadcast zero.
  shape = tuple(int(n) for n in reversed(stored.shape))
  shape = undo(name, np.broadcast_to(np.float32(0), shape)).shape
  return tensors_lib.Tensor(shape, tensors_lib.dtype_name(dtype), read)


def _undo(architecture: str, model) -> Callable[[str, np.ndarray], np.ndarray]:
  """Makes the function that undoes what the converter did to a tensor."""
  mixer = model.pattern[0]

  def llama(name, x):
    # Rotary pairs are neighbours there, and half a head apart here.
    for part, heads in (('q', mixer.num_heads), ('k', mixer.num_kv_heads)):
      if f'.{part}_proj.' in name:
        pairs = x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:])
        return pairs.swapaxes(1, 2).reshape(x.shape)
    return x

  def gemma(name, x):
    return x - 1 if 'norm' in name else x  # 1 was added to the scale

  def gpt2(name, x):
    is_matrix = '.h.' in name and x.ndim == 2
    return x.T if is_matrix else x

  undo = {'llama': llama, 'gemma2': gemma, 'gemma3': gemma, 'gpt2': gpt2}
  return undo.get(architecture, lambda name, x: x)


def _files(fields) -> dict[str, bytes]:
  """Makes the files with the tokenizer and how texts end."""
  tokens = fields.get('tokenizer.ggml.tokens') or []
  settings, ids = {'tokenizer_class': 'PreTrainedTokenizerFast'}, {}
  for name in ('bos', 'eos'):
    i = fields.get(f'tokenizer.ggml.{name}_token_id')
    if i is not None and i < len(tokens):
      settings[f'{name}_token'], ids[f'{name}_token_id'] = tokens[i], i
  template = fields.get('tokenizer.chat_template')
  if template:
    settings['chat_template'] = template
  found = {'tokenizer_config.json': settings, 'generation_config.json': ids}
  found = {
    name: (json.dumps(value, indent=2, ensure_ascii=False) + '\n').encode()
    for name, value in found.items()
  }
  if fields.get('tokenizer.ggml.model') == 'llama':
    return found | {'tokenizer.model': gguf_sentencepiece.make(fields)}
  tokenizer = gguf_tokenizer.make(fields)
  return found if tokenizer is None else found | {'tokenizer.json': tokenizer}
