"""Pretrained models with memories and levels that their files lack."""

import dataclasses
import pathlib

from absl.testing import parameterized
import jax
import numpy as np

from nested_learning import errors
from nested_learning import layers
from nested_learning import models
from nested_learning import pretrained
from nested_learning import subtrees
from nested_learning.pretrained import source as source_lib

_DATA = pathlib.Path(__file__).parent / 'data'
_MEMORY = layers.MemoryMixerConfig(2, 4, adaptive=())


def place(config, **settings):
  placement = models.PlacementConfig(**settings)
  return dataclasses.replace(config, placement=placement)


class AdditionsTest(parameterized.TestCase):
  @parameterized.parameters('llama', 'gpt2', 'gemma3')
  def test_files_are_read_into_models_with_more(self, name):
    found = pretrained.load(_DATA / name)
    last = found.config.num_layers - 1
    level = found.config.levels[0]
    more = dataclasses.replace(level, name='more')
    config = place(
      dataclasses.replace(found.config, levels=(level, more)),
      memory=_MEMORY,
      memory_layers=(last,),
    )
    params = source_lib.load_params(found.source, config)
    self.assertFalse([p for p in subtrees.paths(params) if '/memory/' in p])
    params = models.complete(config, params, jax.random.key(0))
    both = models.add_level(found.config, found.params, name='more')
    _, expected = models.add_memory(*both, _MEMORY, layers=(last,))
    self.assertEqual(subtrees.paths(params), subtrees.paths(expected))
    jax.tree.map(np.testing.assert_array_equal, params, expected)

  @parameterized.parameters('llama', 'gemma3')
  def test_stacked_levels_are_exported_with_every_bit(self, name):
    found = pretrained.load(_DATA / name)
    config, params = models.stack_levels(
      found.config, found.params, ('fast', 'slow'), placement='last_quarter'
    )
    again = source_lib.load_params(found.source, config)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    written = pretrained.to_hf_config(config, found.source.config)
    self.assertEqual(written, found.source.config)
    tensors = found.source.tensors
    dtypes = {n: tensor.dtype for n, tensor in tensors.items()}
    places = source_lib.make_map(written, config)
    for n, tensor in places.dump(params, dtypes).items():
      np.testing.assert_array_equal(tensor.read(), tensors[n].read())

  def test_memories_and_more_levels_have_no_form_elsewhere(self):
    found = pretrained.load(_DATA / 'llama')
    base = found.source.config
    config = place(found.config, memory=_MEMORY, memory_layers=(0,))
    with self.assertRaisesRegex(errors.UserError, r'layers \(0,\) have no f'):
      pretrained.to_hf_config(config, base)
    both = models.stack_levels(found.config, found.params, ('fast', 'slow'))
    config, _ = models.add_level(*both, name='slower')
    with self.assertRaisesRegex(errors.UserError, 'of llama has one MLP'):
      pretrained.to_hf_config(config, base)
