"""Writes a GGUF as llama.cpp's converter does, from a folder of safetensors."""

import pathlib

import gguf
import numpy as np

from nested_learning import pretrained

_NAMES = {'gemma3_text': 'gemma3'}


def permute(x, heads):
  """Makes rotary pairs neighbours."""
  halves = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
  return halves.swapaxes(1, 2).reshape(x.shape)


def write(folder: pathlib.Path, path: pathlib.Path, **metadata):
  """Writes the model of a folder, with further fields of metadata."""
  source = pretrained.open_source(folder)
  config = source.config
  name = _NAMES.get(config['model_type'], config['model_type'])
  name = 'llama' if name == 'mistral' else name
  writer = gguf.GGUFWriter(path, name)
  add_config(writer, name, config)
  for key, value in metadata.items():
    key = key.replace('__', '.')
    if isinstance(value, list):
      writer.add_array(key, value)
    elif isinstance(value, str):
      writer.add_string(key, value)
    else:
      writer.add_uint32(key, value)
  arch = {n: i for i, n in gguf.MODEL_ARCH_NAMES.items()}[name]
  layers = config.get('num_hidden_layers', config.get('n_layer'))
  names = gguf.get_tensor_name_map(arch, layers)
  for key, tensor in source.tensors.items():
    x = np.array(tensor.read())
    if name == 'llama' and '.q_proj.' in key:
      x = permute(x, config['num_attention_heads'])
    if name == 'llama' and '.k_proj.' in key:
      x = permute(x, config['num_key_value_heads'])
    if name.startswith('gemma') and 'norm' in key:
      x = x + 1
    if name == 'gpt2' and '.h.' in key and x.ndim == 2:
      x = x.T
    theirs = names.get_name(key, try_suffixes=('.weight', '.bias'))
    writer.add_tensor(theirs, np.ascontiguousarray(x))
  rope = config.get('rope_parameters') or {}
  if rope.get('rope_type') == 'llama3':
    writer.add_tensor('rope_freqs.weight', llama3_divisors(config))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def add_config(writer, name, config):
  if name == 'gpt2':
    writer.add_block_count(config['n_layer'])
    writer.add_embedding_length(config['n_embd'])
    writer.add_feed_forward_length(4 * config['n_embd'])
    writer.add_head_count(config['n_head'])
    writer.add_context_length(config['n_positions'])
    writer.add_layer_norm_eps(config['layer_norm_epsilon'])
    return
  writer.add_block_count(config['num_hidden_layers'])
  writer.add_embedding_length(config['hidden_size'])
  writer.add_feed_forward_length(config['intermediate_size'])
  writer.add_head_count(config['num_attention_heads'])
  writer.add_head_count_kv(config['num_key_value_heads'])
  writer.add_context_length(config['max_position_embeddings'])
  writer.add_layer_norm_rms_eps(config['rms_norm_eps'])
  if 'head_dim' in config:
    writer.add_key_length(config['head_dim'])
    writer.add_value_length(config['head_dim'])
  rope = config['rope_parameters']
  rope = rope.get('full_attention', rope)
  writer.add_rope_freq_base(rope['rope_theta'])
  if rope['rope_type'] == 'linear':
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(rope['factor'])
  if name.startswith('gemma'):
    writer.add_sliding_window(config['sliding_window'])
    if config.get('attn_logit_softcapping'):
      writer.add_attn_logit_softcapping(config['attn_logit_softcapping'])
      writer.add_final_logit_softcapping(config['final_logit_softcapping'])


def llama3_divisors(config):
  """Returns what llama.cpp divides the frequencies by."""
  rope, dim = config['rope_parameters'], config['head_dim']
  out = []
  for f in rope['rope_theta'] ** (-np.arange(0, dim, 2) / dim):
    length = rope['original_max_position_embeddings']
    low, high = rope['low_freq_factor'], rope['high_freq_factor']
    wavelength = 2 * np.pi / f
    if wavelength < length / high:
      out.append(1.0)
    elif wavelength > length / low:
      out.append(rope['factor'])
    else:
      smooth = (length / wavelength - low) / (high - low)
      out.append(1 / ((1 - smooth) / rope['factor'] + smooth))
  return np.array(out, np.float32)
