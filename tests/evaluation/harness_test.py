"""Tests of the lm-eval adapter (`make test-harness` installs it)."""

import dataclasses
import functools
import importlib.util
import sys
import unittest
from unittest import mock

from absl import logging
from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import pytest

from nested_learning import data
from nested_learning import errors
from nested_learning import models
from nested_learning.evaluation import continuation
from nested_learning.evaluation import harness
from nested_learning.evaluation import scoring
from tests import compiling
from tests.training import tiny

_BYTES = data.make_tokenizer('bytes')
# Draws only ASCII, so that encoding the text gives the tokens drawn.
_ASCII = dataclasses.replace(_BYTES, vocab_size=127)
_PAIRS = (
  ('two and two', ' is four'),
  ('', 'is four'),
  ('Answer: ', 'four'),
  ('one ' * 40, 'two'),  # longer than attention holds
)


@functools.cache
def make_parts():
  model = models.make_model(tiny.MODEL)
  return model, jax.jit(model.init_params)(jax.random.key(1))


class MissingPackageTest(absltest.TestCase):
  def test_says_how_to_install_it(self):
    with (
      mock.patch.dict(sys.modules, {'lm_eval': None}),
      self.assertRaisesRegex(errors.UserError, 'make harness'),
    ):
      harness.make_lm(models.make_model(tiny.MODEL), None, _BYTES)


@pytest.mark.extra
@unittest.skipUnless(
  importlib.util.find_spec('lm_eval'), 'needs lm_eval: make test-harness'
)
class HarnessTest(absltest.TestCase):
  def make_lm(self, tokenizer=_BYTES):
    with compiling.quickly():
      return harness.make_lm(
        *make_parts(), tokenizer, batch_size=2, progress=False
      )

  def requests(self, kind, arguments):
    from lm_eval.api import instance

    return [
      instance.Instance(kind, {}, args, i) for i, args in enumerate(arguments)
    ]

  def test_is_a_model_of_the_harness(self):
    from lm_eval.api import model

    self.assertIsInstance(self.make_lm(), model.LM)
    self.assertEqual(self.make_lm().tokenizer_name, 'bytes')

  def test_loglikelihood_in_order(self):
    found = self.make_lm().loglikelihood(self.requests('loglikelihood', _PAIRS))
    model, params = make_parts()
    score = scoring.make_score(model, vocab_size=257)
    wanted = score(
      params, [scoring.encode_pair(_BYTES, *pair) for pair in _PAIRS]
    )
    for (log, greedy), one in zip(found, wanted, strict=True):
      self.assertIsInstance(log, float)
      self.assertIsInstance(greedy, bool)
      self.assertAlmostEqual(log, one.log_likelihood, delta=1e-4)
      self.assertEqual(greedy, one.is_greedy)

  def test_rolling_is_the_likelihood_of_a_whole_text(self):
    lm = self.make_lm()
    texts = ['a text', 'words and words ' * 20, '']
    found = lm.loglikelihood_rolling(
      self.requests('loglikelihood_rolling', [(text,) for text in texts])
    )
    wanted = lm.loglikelihood(
      self.requests('loglikelihood', [('', text) for text in texts])
    )
    np.testing.assert_array_equal(found, [log for log, _ in wanted])
    self.assertEqual(found[2], 0)
    self.assertLess(found[1], found[0])

  def test_generate_until_with_settings_of_each_request(self):
    settings = [
      {'until': ['\n'], 'max_gen_toks': 5},
      {'until': [], 'max_gen_toks': 9, 'do_sample': True, 'temperature': 2.0},
      {'until': ['\n'], 'max_gen_toks': 5},
    ]
    arguments = list(zip(('one', 'two', 'three'), settings, strict=True))
    lm = self.make_lm(_ASCII)
    texts = lm.generate_until(self.requests('generate_until', arguments))
    self.assertEqual(
      texts[::-1],
      lm.generate_until(self.requests('generate_until', arguments[::-1])),
    )
    self.assertLessEqual(len(texts[0]), 5)
    greedy = lm.loglikelihood(
      self.requests('loglikelihood', [('one', texts[0])])
    )
    self.assertTrue(greedy[0][1])


class ParseSettingsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({}, {}),
    ({'until': '\n'}, {'until': ('\n',)}),
    ({'until': ['a', '', 'b']}, {'until': ('a', 'b')}),
    ({'until': None, 'max_gen_toks': 7}, {'max_tokens': 7}),
    ({'max_new_tokens': 9, 'max_gen_toks': 7}, {'max_tokens': 7}),
    ({'max_new_tokens': 9}, {'max_tokens': 9}),
    ({'do_sample': False, 'temperature': 0.7}, {'temperature': 0.0}),
    ({'temperature': 0.7}, {'temperature': 0.7}),
    ({'do_sample': True}, {'temperature': 1.0}),
    (
      {'do_sample': True, 'top_k': 5, 'top_p': 0.9},
      {'temperature': 1.0, 'top_k': 5, 'top_p': 0.9},
    ),
    ({'top_k': 0, 'temperature': 0.0}, {}),
  )
  def test_reads(self, settings, fields):
    self.assertEqual(
      harness.parse_settings(settings),
      continuation.GenerateUntilConfig(**fields),
    )

  def test_warns_of_ignored_settings(self):
    with self.assertLogs(logging.get_absl_logger(), 'WARNING') as logs:
      harness.parse_settings({'num_beams': 4})
    self.assertIn('num_beams', logs.output[0])

  def test_refuses_settings_out_of_range(self):
    with self.assertRaisesRegex(errors.UserError, 'max_tokens=0'):
      harness.parse_settings({'max_gen_toks': 0})
    with self.assertRaisesRegex(errors.UserError, 'top_p=2.0'):
      harness.parse_settings({'top_p': 2})
