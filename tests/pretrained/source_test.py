"""Files of pretrained models: exact round trips, and one line per mistake."""

import copy
import dataclasses
import importlib.util
import json
import pathlib
import shutil
from unittest import mock

from absl.testing import parameterized
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from nested_learning import errors
from nested_learning import layers
from nested_learning import models
from nested_learning import pretrained
from nested_learning.pretrained import axes
from nested_learning.pretrained import families
from nested_learning.pretrained import source as source_lib
from nested_learning.pretrained import tensors as tensors_lib

_DATA = pathlib.Path(__file__).parent / 'data'
_NAMES = sorted(path.name for path in _DATA.iterdir())


class SourceTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def copy(self, name='llama', **changes):
    """Copies a model; changes keys of its config.json, None removes them."""
    folder = self.folder / 'model'
    shutil.copytree(_DATA / name, folder)
    config = json.loads((folder / 'config.json').read_text())
    config = {k: v for k, v in (config | changes).items() if v is not None}
    (folder / 'config.json').write_text(json.dumps(config))
    return folder

  def rewrite(self, folder, change=lambda tensors: tensors, **settings):
    """Writes the tensors of a folder again, after `change(tensors)`."""
    tensors = {
      name: tensors_lib.from_array(np.array(tensor.read()))
      for name, tensor in tensors_lib.open_folder(folder).items()
    }
    (folder / 'model.safetensors').unlink()
    tensors_lib.write_folder(folder, change(tensors), **settings)

  @parameterized.product(name=_NAMES, dtype=[None, ml_dtypes.bfloat16, 'f2'])
  def test_import_and_export_keep_every_bit(self, name, dtype):
    folder = self.copy(name)
    cast = lambda tensors: {
      n: tensors_lib.from_array(x.read().astype(dtype or x.read().dtype))
      for n, x in tensors.items()
    }
    self.rewrite(folder, cast)
    source = pretrained.open_source(folder)
    config = pretrained.to_model_config(source.config)
    wide = jnp.float32 if dtype is not None else None
    params = source_lib.load_params(source, config, dtype=wide)
    dtypes = {n: tensor.dtype for n, tensor in source.tensors.items()}
    out = self.folder / 'out'
    source_lib.write(
      out,
      pretrained.to_hf_config(config, source.config),
      source_lib.make_map(source.config, config).dump(params, dtypes),
      source.files,
      max_bytes=2500,  # several files
    )
    again = pretrained.open_source(out)
    self.assertEqual(again.config, source.config)
    self.assertEqual(set(again.tensors), set(source.tensors))
    self.assertGreater(len(list(out.glob('*.safetensors'))), 2)
    for n, tensor in source.tensors.items():
      self.assertEqual(again.tensors[n].dtype, tensor.dtype)
      self.assertEqual(
        again.tensors[n].read().tobytes(), tensor.read().tobytes(), n
      )

  @parameterized.parameters(_NAMES)
  def test_configs_are_translated_both_ways(self, name):
    source = pretrained.open_source(_DATA / name)
    config = pretrained.to_model_config(source.config)
    bare = {'model_type': source.config['model_type']}
    written = pretrained.to_hf_config(config, bare)
    self.assertEqual(pretrained.to_model_config(written), config)
    free = 'head_dim', 'n_inner', 'rope_parameters', 'max_window_layers'
    for key, value in written.items():
      if key not in free:
        self.assertEqual(source.config.get(key), value, key)
    # Settings of training and of calls are none of the model.
    other = dataclasses.replace(config, dtype='bfloat16', remat='layer')
    if config.embedding.positions == 'none':
      other = dataclasses.replace(other, max_length=7)
    self.assertEqual(
      pretrained.to_hf_config(other, source.config), source.config
    )

  def test_reads_rotary_positions_of_transformers_4(self):
    new = pretrained.open_source(_DATA / 'llama3').config
    old = copy.deepcopy(new)
    rope = old.pop('rope_parameters')
    old['rope_theta'] = rope.pop('rope_theta')
    rope['type'] = rope.pop('rope_type')
    self.assertEqual(
      pretrained.to_model_config(old | {'rope_scaling': rope}),
      pretrained.to_model_config(new),
    )
    gemma = pretrained.open_source(_DATA / 'gemma3').config
    old = dict(gemma)
    full = old.pop('rope_parameters')['full_attention']
    old |= {
      'rope_theta': full['rope_theta'],
      'rope_local_base_freq': 100.0,
      'rope_scaling': {'rope_type': 'linear', 'factor': 8.0},
    }
    self.assertEqual(
      pretrained.to_model_config(old), pretrained.to_model_config(gemma)
    )

  def test_absent_keys_have_the_defaults_of_transformers(self):
    sizes = {
      'vocab_size': 9,
      'hidden_size': 8,
      'intermediate_size': 8,
      'num_hidden_layers': 6,
      'num_attention_heads': 2,
    }
    read = lambda **keys: pretrained.to_model_config(sizes | keys)
    gemma = read(model_type='gemma2')
    first, second = gemma.pattern
    self.assertEqual((first.window, second.window), (4096, None))
    self.assertEqual((first.score_cap, first.score_scale), (50.0, 1 / 16))
    self.assertEqual(gemma.embedding.logit_cap, 30.0)
    none = read(model_type='gemma2', final_logit_softcapping=None)
    self.assertIsNone(none.embedding.logit_cap)
    gemma = read(model_type='gemma3_text')
    thetas = [mixer.rope_theta for mixer in gemma.pattern]
    self.assertEqual(thetas, [1e4] * 5 + [1e6])
    self.assertEqual(read(model_type='qwen3').mixer.head_dim, 128)
    llama = read(model_type='llama')
    self.assertEqual(llama.mixer.num_kv_heads, 2)
    self.assertEqual(llama.embedding.head, 'own')

  @parameterized.parameters(
    ('gemma2', 26, 2), ('gemma3', 12, 6), ('gemma3', 26, 26), ('gemma3', 2, 1)
  )
  def test_layer_types_that_no_config_lists(self, name, num_layers, period):
    config = dict(pretrained.open_source(_DATA / name).config)
    del config['layer_types']
    config['num_hidden_layers'] = num_layers
    model = pretrained.to_model_config(config)
    self.assertLen(model.pattern, period)
    full = [i for i, m in enumerate(model.pattern) if m.window is None]
    every = 2 if name == 'gemma2' else 6
    self.assertEqual(full, list(range(every - 1, len(model.pattern), every)))

  def test_other_settings_are_written_or_refused(self):
    source = pretrained.open_source(_DATA / 'mistral')
    config = pretrained.to_model_config(source.config)
    wider = dataclasses.replace(config.mixer, window=9)
    written = pretrained.to_hf_config(
      dataclasses.replace(config, mixer=wider), source.config
    )
    self.assertEqual(written, source.config | {'sliding_window': 9})
    sinks = dataclasses.replace(config.mixer, num_sinks=2)
    with self.assertRaisesRegex(
      errors.UserError, r'model.mixer.num_sinks=2 has no form in mistral'
    ):
      pretrained.to_hf_config(
        dataclasses.replace(config, mixer=sinks), source.config
      )
    levels = (*config.levels, models.LevelConfig('slow', 8))
    with self.assertRaisesRegex(errors.UserError, 'model.levels has 2 levels'):
      pretrained.to_hf_config(
        dataclasses.replace(config, levels=levels), source.config
      )
    memory = layers.MemoryMixerConfig(num_heads=2, head_dim=8)
    with self.assertRaisesRegex(errors.UserError, 'MemoryMixerConfig has no'):
      pretrained.to_hf_config(
        dataclasses.replace(config, mixer=memory), source.config
      )

  @parameterized.parameters(
    (
      {'model_type': 'lama'},
      "'lama', which is not supported; the nearest is ll",
    ),
    ({'model_type': 'gemma3'}, 'the nearest is gemma3_text'),
    ({'hidden_act': 'relu'}, "hidden_act='relu', which is not supported"),
    ({'hidden_size': 16.5}, 'hidden_size=16.5, which is not a whole number'),
    ({'rms_norm_eps': 'x'}, "rms_norm_eps='x', which is not a finite number"),
    ({'quantization_config': {'bits': 4}}, "quantization_config={'bits': 4}"),
    ({'num_experts': 8}, 'num_experts=8, which is not known here'),
    ({'rope_parameters': {'rope_type': 'yarn'}}, "rope_type='yarn'"),
    ({'rope_parameters': {'rope_type': 'default', 'beta': 2}}, 'beta=2'),
    ({'vocab_size': 38}, r'embed_tokens.weight has the shape \[37, 16\]'),
    ({'num_hidden_layers': 3}, 'lacks model.layers.2.self_attn.q_proj.weight'),
    ({'num_hidden_layers': 1}, 'holds model.layers.1.* and 6 more, which have'),
    ({'tie_word_embeddings': False}, 'lacks lm_head.weight;'),
    ({'attention_bias': True}, 'lacks .*q_proj.bias, .* and 5 more;'),
  )
  def test_refuses_configs(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message) as caught:
      pretrained.load(self.copy(**changes))
    self.assertNotIn('\n', str(caught.exception))

  @parameterized.parameters(_NAMES)
  def test_any_value_is_taken_or_refused_in_one_line(self, name):
    config = pretrained.open_source(_DATA / name).config
    values = (
      'x',
      -1,
      0,
      1,
      7,
      0.5,
      float('inf'),
      True,
      [],
      [['x']],
      {},
      {'x': 1},
    )
    places = [(config, key) for key in config]
    rope = config.get('rope_parameters', {})
    places += [(rope, key) for key in rope]
    for inner in (r for r in rope.values() if isinstance(r, dict)):
      places += [(inner, key) for key in inner]
    refused = 0
    for place, key in places:
      kept = place[key]
      for value in values:
        place[key] = value
        try:
          pretrained.to_model_config(config)
        except errors.UserError as error:
          refused += 1
          self.assertNotIn('\n', str(error))
      del place[key]
      try:
        pretrained.to_model_config(config)
      except errors.UserError as error:
        self.assertNotIn('\n', str(error))
      place[key] = kept
    self.assertGreater(refused, 50)

  def test_says_how_to_install_smollm2(self):
    with (
      mock.patch.object(importlib.util, 'find_spec', return_value=None),
      self.assertRaisesRegex(errors.UserError, r'nested-learning\[smollm2\]'),
    ):
      pretrained.open_source('smollm2')

  def test_ignores_keys_that_the_user_knows(self):
    folder = self.copy(num_experts=8)
    found = pretrained.load(folder, ignore=['num_experts'])
    self.assertEqual(found.config, pretrained.load(_DATA / 'llama').config)

  def test_a_tied_head_may_be_there_twice(self):
    embedding = 'model.embed_tokens.weight'
    folder = self.copy()
    self.rewrite(folder, lambda t: t | {'lm_head.weight': t[embedding]})
    pretrained.load(folder)
    other = tensors_lib.from_array(np.zeros((37, 16), np.float32))
    self.rewrite(folder, lambda t: t | {'lm_head.weight': other})
    with self.assertRaisesRegex(errors.UserError, 'holds lm_head.weight'):
      pretrained.load(folder)

  def test_names_of_gpt2_without_its_head(self):
    folder = self.copy('gpt2')
    cut = lambda n: n.removeprefix('transformer.')
    buffer = tensors_lib.from_array(np.ones((1, 1), np.float32))
    self.rewrite(
      folder,
      lambda t: {cut(n): x for n, x in t.items()} | {'h.0.attn.bias': buffer},
    )
    pretrained.load(folder)

  def test_refuses_folders(self):
    for path, message in (
      ('missing', 'no such folder'),
      (__file__, 'it is a file'),
      (self.folder, 'has no config.json; check the path'),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        pretrained.open_source(path)
    (self.folder / 'm.gguf').touch()
    with self.assertRaisesRegex(errors.UserError, 'name the file .*m.gguf'):
      pretrained.open_source(self.folder)
    folder = self.copy()
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    with self.assertRaisesRegex(
      errors.UserError, 'no model.safetensors, but pytorch_model.bin; convert'
    ):
      pretrained.open_source(folder)
    (folder / 'config.json').write_text('{"model_type": ')
    with self.assertRaisesRegex(errors.UserError, 'cannot be read as JSON'):
      pretrained.open_source(folder)

  def test_refuses_shards(self):
    folder = self.copy()
    self.rewrite(folder, max_bytes=5000)
    shard = sorted(folder.glob('*.safetensors'))[1]
    content = shard.read_bytes()
    for cut in (content[:-1], content[:4], content[:40], content + b'x'):
      shard.write_bytes(cut)
      with self.assertRaisesRegex(errors.UserError, 'is cut short or damaged'):
        pretrained.open_source(folder)
    shard.unlink()
    with self.assertRaisesRegex(errors.UserError, f'lacks {shard.name}, one'):
      pretrained.open_source(folder)
    shutil.copy(sorted(folder.glob('model-00001*'))[0], shard)
    with self.assertRaisesRegex(errors.UserError, 'which .*index.json places'):
      pretrained.open_source(folder)

  def test_refuses_types_that_no_parameter_has(self):
    folder = self.copy()
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
    with self.assertRaisesRegex(errors.UserError, 'is I32, and F64, F32'):
      pretrained.load(folder)

  @parameterized.parameters(
    {'dtype': []},
    {'dtype': 'F16'},  # half the bytes
    {'shape': [37, 17]},
    {'shape': [-1, 16]},
    {'shape': 5},
    {'data_offsets': [0]},
    {'data_offsets': [8, 0]},
    {'data_offsets': None},
  )
  def test_refuses_headers(self, **changes):
    folder = self.copy()
    path = folder / 'model.safetensors'
    content = path.read_bytes()
    length = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8 : 8 + length])
    header['model.embed_tokens.weight'] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(
      len(text).to_bytes(8, 'little') + text + content[8 + length :]
    )
    with self.assertRaisesRegex(errors.UserError, 'is cut short or damaged'):
      pretrained.open_source(folder)

  def test_writes_nothing_by_halves(self):
    out = self.folder / 'out'
    source = pretrained.open_source(_DATA / 'llama')

    def fail():
      raise OSError(28, 'No space left on device')

    name = next(iter(source.tensors))
    broken = source.tensors[name]._replace(read=fail)
    with self.assertRaisesRegex(errors.Retryable, 'No space left'):
      source_lib.write(
        out, source.config, source.tensors | {name: broken}, source.files
      )
    self.assertEmpty(list(self.folder.iterdir()))
    out.mkdir()
    (out / 'mine').touch()
    with self.assertRaisesRegex(errors.UserError, 'is not an empty folder'):
      source_lib.write(out, source.config, source.tensors, source.files)

  def test_companions_come_along(self):
    folder = self.copy()
    (folder / 'tokenizer_config.json').write_text(
      json.dumps({'chat_template': 'of the config'})
    )
    source = pretrained.open_source(folder)
    self.assertEqual(source.chat_template, 'of the config')
    self.assertEqual(source.generation['eos_token_id'], 2)
    (folder / 'chat_template.jinja').write_text('{{ of_its_own }}')
    source = pretrained.open_source(folder)
    self.assertEqual(source.chat_template, '{{ of_its_own }}')

  @parameterized.parameters(
    '(h d) e -> e h d', 'e (h d) -> h d e', 'e (s h d) -> s e h d', 'e -> e'
  )
  def test_axes_turn_and_turn_back(self, text):
    turn = axes.parse(text)
    sizes = {'h': 2, 'd': 3, 'e': 5, 's': 3}
    x = np.random.default_rng(0).normal(size=turn.shape(sizes))
    ours = turn.to_ours(x, sizes)
    self.assertEqual(ours.shape, tuple(sizes[a] for a in turn.ours))
    np.testing.assert_array_equal(turn.to_theirs(ours), x)

  def test_every_family_was_recorded(self):
    recorded = {
      json.loads((_DATA / name / 'config.json').read_text())['model_type']
      for name in _NAMES
    }
    self.assertEqual(recorded, set(families.FAMILIES))
