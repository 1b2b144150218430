"""Tests of the experiment on a pretrained model and streams."""

import json
import pathlib
import shutil

from absl.testing import absltest
import jax.numpy as jnp
import numpy as np

from experiments.pretrained import ngrams
from experiments.pretrained import reading
from experiments.pretrained import streams
from experiments.pretrained import streams_report
from experiments.pretrained import texts
from nested_learning import data
from nested_learning import errors
from nested_learning import models
from nested_learning.pretrained import gguf_tokenizer
from nested_learning.pretrained import tensors as tensors_lib
from tests import compiling

_LLAMA = pathlib.Path(__file__).parents[1] / 'pretrained/data/llama'
_SIGNS = ['\u0120', '\u010a', '.', 'T', *'abcdefghijklmnopqrstuvwxyz0123456789']
_VOCAB = 3 + len(_SIGNS)
_LINE = 'a model reads what others wrote and learns from it\n'


def write_model(folder):
  """Writes a small random checkpoint whose tokens are characters."""
  shutil.copytree(_LLAMA, folder)
  config = json.loads((folder / 'config.json').read_text())
  config |= {'vocab_size': _VOCAB}
  (folder / 'config.json').write_text(json.dumps(config))
  tensors = {
    name: np.array(tensor.read())  # a copy: the file is replaced
    for name, tensor in tensors_lib.open_folder(folder).items()
  }
  (name,) = (x for x in tensors if 'embed_tokens' in x)
  embedding = np.random.default_rng(0).normal(size=(_VOCAB, 16)) / 4
  tensors[name] = embedding.astype(np.float32)
  tensors_lib.write_folder(
    folder, {n: tensors_lib.from_array(x) for n, x in tensors.items()}
  )
  tokens = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', *_SIGNS]
  types = [3, 3, 3] + [1] * len(_SIGNS)
  content = gguf_tokenizer.make(
    {
      'tokenizer.ggml.model': 'gpt2',
      'tokenizer.ggml.tokens': tokens,
      'tokenizer.ggml.token_type': types,
      'tokenizer.ggml.merges': [],
    }
  )
  (folder / 'tokenizer.json').write_bytes(content)
  return str(folder)


class StreamsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def test_runs_and_goes_on(self):
    self.enterContext(compiling.quickly())
    for name in ('one', 'two'):
      (self.root / f'{name}.txt').write_text(_LINE * 20)
    config = streams.StreamsConfig(
      source=write_model(self.root / 'llama'),
      arms=('frozen', 'low_rank_3e-3'),
      texts=(str(self.root / 'one.txt'), str(self.root / 'two.txt')),
      num_tokens=1024,
      other_tokens=16,
      window=16,
    )
    run = lambda: streams.run(config, str(self.root / 'run'), 'train')
    run()
    folder = self.root / 'run/cells' / streams_report.TASK
    found = {x.stem: json.loads(x.read_text()) for x in folder.iterdir()}
    self.assertLen(found, 4)
    frozen, learned = (
      found[f'one {arm}']['values'] for arm in ('frozen', 'low_rank_3e-3')
    )
    # The line repeats: a cache has it, and the model learns it.
    self.assertLess(
      frozen['cache_bits_per_byte'], 0.5 * frozen['plain_bits_per_byte']
    )
    self.assertLess(
      frozen['calibrated_bits_per_byte'], frozen['plain_bits_per_byte']
    )
    self.assertLess(
      learned['plain_bits_per_byte'], frozen['plain_bits_per_byte']
    )
    self.assertEqual(frozen['level_bytes'], 0)
    self.assertGreater(learned['level_bytes'], 0)
    self.assertLen(frozen['margins'], 3)
    times = [x.stat().st_mtime_ns for x in sorted(folder.iterdir())]
    run()
    self.assertEqual(
      [x.stat().st_mtime_ns for x in sorted(folder.iterdir())], times
    )
    page = (self.root / 'run/results/README.md').read_text()
    self.assertIn('low_rank_3e-3', page)
    self.assertIn('Not run yet: adam_3e-4', page)

  def test_facts_are_told_as_often_as_they_say(self):
    tokenizer = data.make_tokenizer('bytes')
    stream = texts.make_stream(_LINE * 400, tokenizer, 8192)
    text = tokenizer.decode(stream.tokens[1:])
    self.assertLen(stream.facts, 8)
    self.assertLen({tuple(fact.code) for fact in stream.facts}, 8)
    for fact in stream.facts:
      sentence = tokenizer.decode(np.concatenate([fact.question, fact.code]))
      self.assertEqual(text.count(f'{sentence}.'), fact.tellings)
      said = tokenizer.decode(stream.tokens[: fact.position])
      self.assertTrue(said.endswith(f'{sentence}.\n'))
      self.assertLess(fact.position, 0.9 * 8192)
    told = tokenizer.decode(stream.tokens[~stream.counts])
    self.assertEqual(told.count('The access code of the'), told.count('.'))
    kept = tokenizer.decode(stream.tokens[stream.counts])
    self.assertEqual(kept, (_LINE * 400)[: len(kept)])
    with self.assertRaisesRegex(errors.UserError, 'lower num_tokens'):
      texts.make_stream(_LINE, tokenizer, 8192)

  def test_texts_are_those_of_a_commit_or_files(self):
    with self.assertRaisesRegex(errors.UserError, 'name sources, pages'):
      texts.read_text(str(self.root / 'none'))

  def test_arms_are_those_of_the_page(self):
    config = streams.get_config('short')
    self.assertEqual(config.arms, tuple(streams.ARMS))
    for arm in streams.ARMS.values():
      for every in filter(None, arm.inner.update_every):
        self.assertEqual(config.piece % min(every, 512), 0)
      names = len(arm.levels) or 1
      self.assertIn(len(arm.inner.levels), (0, names))
    with self.assertRaisesRegex(errors.UserError, 'arms'):
      streams.StreamsConfig(arms=('other',))


class ControlsTest(absltest.TestCase):
  def test_a_mixture_is_about_as_good_as_the_best_of_each_part(self):
    rng = np.random.default_rng(0)
    one, two = rng.uniform(0.1, 1, (2, 400))
    one[:200] += 2
    two[200:] += 2
    mixed = ngrams.mix([one, two])
    best = two[:200].sum() + one[200:].sum()
    self.assertLess(mixed.sum(), best + 3 * np.log(256))
    np.testing.assert_allclose(ngrams.mix([one]), one)

  def test_probabilities_of_a_cache_sum_to_one(self):
    tokens = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    chances = []
    for last in range(4):
      stream = np.append(tokens, last)
      losses = np.full(len(tokens), np.log(4.0))  # of a uniform model
      chances.append(np.exp(-ngrams.with_cache(stream, losses))[-1])
    np.testing.assert_allclose(np.sum(chances), 1, rtol=1e-9)
    self.assertEqual(np.argmax(chances), 2)

  def test_other_text_is_read_with_levels_at_rest(self):
    model = _uniform()
    learned = reading.Learned(model, {}, ())
    found = reading.read_other(learned, [1, 2, 3], np.ones(4, int))
    self.assertAlmostEqual(found, 2.0, places=5)


def _uniform():
  """Returns a stand-in for a model that predicts nothing."""
  plain = models.make_model(
    models.zoo.make_config('transformer_tiny', vocab_size=4)
  )
  decode = lambda params, state, tokens, mask=None: (
    jnp.zeros((*tokens.shape, 4)),
    state,
  )
  return plain._replace(decode=decode, init_state=lambda params, rows: ())
