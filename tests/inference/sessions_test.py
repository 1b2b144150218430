"""Tests of sessions: feeding, saving, forking and rolling back are exact."""

import contextlib
import functools
import io
import pathlib
import re

from absl.testing import parameterized
import jax
import numpy as np

from nested_learning import errors
from nested_learning import inference
from nested_learning import layers
from nested_learning import levels
from nested_learning import models
from nested_learning import optimizers
from nested_learning.inference import session_files
from tests import compiling

_VOCAB, _LENGTH = 11, 24
_CONFIG = models.ModelConfig(
  vocab_size=_VOCAB,
  num_layers=1,
  embed_dim=8,
  mixer=layers.AttentionConfig(2, 2, head_dim=4, window=6),
  levels=(
    models.LevelConfig('fast', mlp_dim=6),
    models.LevelConfig('slow', mlp_dim=6),
  ),
  chain=models.ChainConfig('nested'),  # all that a state can have
  max_length=32,
)
# Two kinds of state: moments, and energies that are summed over two segments.
_INNER = levels.make_inner(
  (4, 8),
  learning_rate=(0.03, 0.1),
  optimizer=(
    optimizers.configs.AdamW(),
    optimizers.configs.Dgd(target='printed'),
  ),
)


@functools.cache
def base():
  """Returns a session without tokens; its programs are compiled once."""
  with compiling.quickly():
    model = models.make_model(_CONFIG)
    params = jax.jit(model.init_params)(jax.random.key(0))
    params = jax.tree.map(lambda x: 1.5 * x, params)
    return inference.Session(
      model, params, _INNER, tokenizer_fingerprint='letters'
    )


def draw(num_tokens=_LENGTH, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(_VOCAB, size=num_tokens).astype(np.int32)


def begin():
  return base().fork()


def assert_equal(one, two):
  np.testing.assert_array_equal(one.clock, two.clock)
  jax.tree.map(np.testing.assert_array_equal, one.state, two.state)


def learned(session):
  """Returns the state without the position in an open segment."""
  stream = session.state.stream
  return stream.levels, stream.segment.model, stream.num_segments


class SessionsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(compiling.quickly())
    self.path = pathlib.Path(self.create_tempdir().full_path, 'a.session')

  def load(self, **changes):
    settings = {'tokenizer_fingerprint': 'letters', **changes}
    model = settings.pop('model', base().model)
    params = settings.pop('params', base().params)
    return inference.Session.load(self.path, model, params, **settings)

  def test_learned_state_does_not_depend_on_how_tokens_are_cut(self):
    tokens, reset = draw(), np.arange(_LENGTH) == 13
    whole = begin()
    losses = whole.feed(tokens, reset=reset)
    self.assertTrue(np.isnan(losses[0, [0, 13]]).all())
    self.assertEqual(np.isfinite(losses).sum(), _LENGTH - 2)
    for cuts in ([5], [3, 4, 17], range(1, _LENGTH)):
      session, parts = begin(), []
      for part in np.split(np.arange(_LENGTH), cuts):
        parts.append(session.feed(tokens[part], reset=reset[part]))
      np.testing.assert_allclose(
        np.concatenate(parts, axis=1), losses, rtol=1e-4, atol=1e-5
      )
      jax.tree.map(
        np.testing.assert_array_equal, learned(session), learned(whole)
      )

  def test_equals_the_model_with_inner_levels(self):
    tokens = draw()[None]
    session = begin()
    losses = session.feed(tokens)
    learner = models.make_model(_CONFIG, _INNER)
    read = jax.jit(lambda p: learner.forward(p, None, tokens))
    logits, state = read(base().params)
    log_probability = jax.nn.log_softmax(logits[0, :-1])
    expected = -log_probability[np.arange(_LENGTH - 1), tokens[0, 1:]]
    np.testing.assert_allclose(losses[0, 1:], expected, rtol=1e-4)
    updates = session.health()['slow'].num_updates
    np.testing.assert_array_equal(updates, state.levels['slow'].num_updates)
    np.testing.assert_array_equal(updates, [_LENGTH // 8])

  def test_rows_of_different_lengths_equal_separate_sessions(self):
    one, two = draw(9, seed=1), draw(14, seed=2)
    alone = begin(), begin()
    for session, tokens in zip(alone, (one, two), strict=True):
      session.feed(tokens)
    joined = inference.join([begin(), begin()])
    tokens, mask = np.zeros((2, 14), int), np.ones((2, 14), bool)
    tokens[0, 5:], tokens[1] = one, two  # padding in front
    mask[0, :5] = False
    losses = joined.feed(tokens, mask=mask)
    self.assertTrue(np.isnan(losses[0, :6]).all())
    for session, row in zip(joined.split(), alone, strict=True):
      np.testing.assert_array_equal(session.clock, row.clock)
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        learned(session),
        learned(row),
      )

  def test_fork_rollback_and_loss_are_exact(self):
    session = begin()
    session.feed(draw(7))
    other, witness = session.fork(), session.fork()
    other.feed(draw(9, seed=3))
    assert_equal(session, witness)
    other.rollback()
    assert_equal(other, witness)
    loss = session.loss(draw(9, seed=3))
    assert_equal(session, witness)
    np.testing.assert_allclose(loss, session.feed(draw(9, seed=3)).mean())

  def test_save_and_load_round_trip(self):
    session = begin()
    session.feed(draw(10))
    session.save(self.path)
    params = jax.tree.map(np.array, base().params)
    loaded = self.load()
    assert_equal(loaded, session)
    self.assertEqual(loaded.inner, _INNER)
    more = draw(10, seed=4)
    np.testing.assert_array_equal(loaded.feed(more), session.feed(more))
    assert_equal(loaded, session)
    loaded.rollback()
    self.assertEqual(loaded.clock, [10])
    jax.tree.map(np.testing.assert_array_equal, base().params, params)

  @parameterized.parameters('memories', 'low_rank')
  def test_small_sessions_go_on_bit_for_bit(self, learns):
    config = models.ModelConfig(
      vocab_size=_VOCAB,
      num_layers=2,
      embed_dim=8,
      mixer=layers.MemoryMixerConfig(1, head_dim=4, chunk_size=4),
      levels=(models.LevelConfig('mlp', mlp_dim=32),),
      max_length=8,
    )
    inner = levels.make_inner((None,))
    if learns == 'low_rank':
      adam = optimizers.configs.AdamW()
      inner = levels.make_inner((4,), optimizer=adam, learns=learns, rank=1)
    model = models.make_model(config)
    params = compiling.jit(model.init_params)(jax.random.key(0))
    whole, cut = (inference.Session(model, params, inner) for _ in range(2))
    losses = whole.feed(draw())
    cut.feed(draw()[:5])
    sizes = cut.save(self.path)
    cut = inference.Session.load(self.path, model, params)
    found = cut.feed(draw()[5:])
    np.testing.assert_allclose(found, losses[:, 5:], rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, learned(cut), learned(whole))
    self.assertGreater(sizes['memories and caches'], 0)
    most = {'memories': 0, 'low_rank': 3 * 3 * 4 * (8 + 32) + 100}
    self.assertLessEqual(sizes['levels'], most[learns])
    self.assertEqual(list(cut.health()), ['mlp'] * (learns == 'low_rank'))

  def test_refuses_files_of_other_sessions_and_kinds(self):
    session = begin()
    session.feed(draw(5))
    session.save(self.path)
    before = self.path.read_bytes()
    params = jax.tree.map(lambda x: x.copy(), base().params)
    params['norm'] = params['norm'].at[0].add(1e-3)
    other = models.make_model(
      models.ModelConfig(**{**vars(_CONFIG), 'embed_dim': 16})
    )
    for changes, message in (
      ({'params': params}, 'belongs to another checkpoint'),
      (
        {'tokenizer_fingerprint': 'bytes'},
        "other tokens .*'letters'.* than .*'bytes'",
      ),
      (
        {'model': other, 'params': other.init_params(jax.random.key(0))},
        'another checkpoint',
      ),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        self.load(**changes)
    self.path.write_bytes(before[:-1])
    with self.assertRaisesRegex(errors.UserError, 'cut short'):
      self.load()
    self.path.write_bytes(b'notes')
    with self.assertRaisesRegex(errors.UserError, 'is not a session'):
      session.save(self.path)
    self.assertEqual(self.path.read_bytes(), b'notes')

  def test_refuses_forged_contents(self):
    session = begin()
    session.feed(draw(5))
    session.save(self.path)
    content = session_files.read(self.path)
    arrays = content.arrays
    (count,) = (name for name in arrays if 'segment/count@' in name)
    (tokens,) = (name for name in arrays if 'segment/tokens@' in name)
    for change, message in (
      ({'clock': None}, 'no clocks'),
      ({'clock': np.zeros(1)}, 'no clocks'),
      ({'clock': np.zeros(0, np.int64)}, 'no clocks'),
      ({'clock': np.zeros(10**6, np.int64)}, 'this model has'),
      ({'age': np.zeros((1, 1), np.int64)}, 'no clocks'),
      ({'age': np.array([-1])}, 'can have'),
      ({'clock': np.array([6])}, 'can have'),
      ({count: np.zeros(1, np.int64)}, 'this model has'),
      ({tokens: arrays[tokens] + 99}, 'can have'),
      ({'more': np.zeros(1)}, 'has arrays'),
    ):
      forged = {k: v for k, v in {**arrays, **change}.items() if v is not None}
      session_files.write(self.path, content._replace(arrays=forged))
      with self.assertRaisesRegex(errors.UserError, message):
        self.load()

  def test_save_refuses_to_replace_another_session(self):
    begin().save(self.path)
    one, two = self.load(), self.load()
    one.feed(draw(8))
    one.save(self.path)
    one.feed(draw(8))
    one.save(self.path)
    kept = self.path.read_bytes()
    two.feed(draw(3))
    for session, message in (
      (two, 'was changed by another program'),
      (begin(), 'already holds a session'),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        session.save(self.path)
    with (
      session_files.lock(self.path),
      self.assertRaisesRegex(errors.UserError, 'in use by process'),
    ):
      one.save(self.path)
    self.assertEqual(self.path.read_bytes(), kept)
    np.testing.assert_array_equal(self.load().clock, [16])

  def test_generate_equals_feeding_token_by_token(self):
    session = begin()
    session.feed(draw(5))
    witness = session.fork()
    prompt = draw(2, seed=5)
    written = session.generate(6, prompt=prompt, temperature=0)
    assert_equal(session, witness)
    witness.feed(prompt)
    expected = int(np.argmax(witness.state.logits[0]))
    self.assertEqual(int(written.tokens[0, 0]), expected)
    kept = session.fork()
    written = kept.generate(6, prompt=prompt, temperature=0, keep=True)
    fed = session.fork()
    fed.feed(prompt)
    fed.feed(np.asarray(written.tokens))
    assert_equal(kept, fed)

  def test_full_attention_restarts_and_levels_remember(self):
    mixer = layers.AttentionConfig(2, 2, head_dim=4)
    model = models.make_model(
      models.ModelConfig(**{**vars(_CONFIG), 'mixer': mixer, 'max_length': 12})
    )
    params = jax.jit(model.init_params)(jax.random.key(0))
    session = inference.Session(model, params, _INNER)
    losses = session.feed(draw(50))
    self.assertTrue(np.isfinite(losses[:, 1:]).all())
    np.testing.assert_array_equal(session.health()['fast'].num_updates, [12])
    position = session.state.stream.model[0].position
    self.assertEqual(int(position[0, 0]), 50 % 12)
    again = inference.Session(model, params, _INNER)
    for part in np.split(draw(50), [11, 12, 31]):
      again.feed(part)
    jax.tree.map(
      np.testing.assert_array_equal, learned(again), learned(session)
    )
    session.generate(11, prompt=draw(1))  # forgets, to have the room
    self.assertEqual(session.clock, [50])
    with self.assertRaisesRegex(errors.UserError, 'max_length=12'):
      session.generate(12, prompt=draw(1))
    with self.assertRaisesRegex(errors.UserError, 'segment of 16 tokens'):
      inference.Session(model, params, levels.make_inner((16, 16)))

  def test_a_session_with_a_frozen_level_goes_on(self):
    wild = levels.make_inner(
      (4, 8),
      learning_rate=(1e4, 0.02),
      optimizer=optimizers.configs.AdamW(),
      clip_norm=None,
    )
    session = inference.Session(base().model, base().params, wild)
    session.feed(draw())
    health = session.health()
    self.assertTrue(health['fast'].frozen.all())
    np.testing.assert_array_equal(health['slow'].num_updates, [3])
    self.assertTrue(np.isfinite(session.feed(draw())).all())
    self.assertRegex(
      levels.health_warnings(health)[0], "'fast' diverged in 1 of 1"
    )

  @parameterized.named_parameters(
    ('empty', [], 'nothing to read'),
    ('negative', [1, -1], 'token -1 is not one of the 11'),
    ('beyond', [1, 11], 'token 11 is not one of the 11'),
    ('fractions', [0.5], 'give integers'),
    ('rows', [[1], [2]], 'this session has 1 rows'),
    ('ragged', [[1], [2, 3]], 'rows of different lengths'),
  )
  def test_refuses_invalid_tokens(self, tokens, message):
    session = begin()
    with self.assertRaisesRegex(errors.UserError, message):
      session.feed(tokens)
    assert_equal(session, base())

  def test_examples_of_the_readme_run(self):
    page = pathlib.Path(inference.__file__).with_name('README.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
      exec('\n'.join(blocks), {})
    self.assertIn('[320]', output.getvalue())

  def test_refuses_sessions_that_cannot_learn_or_have_no_rows(self):
    model, params = base().model, base().params  # attention alone
    with self.assertRaisesRegex(errors.UserError, 'the model has no memories'):
      inference.Session(model, params, levels.InnerConfig())
    with self.assertRaisesRegex(errors.UserError, 'num_rows=0 must be'):
      inference.Session(model, params, _INNER, num_rows=0)
    with self.assertRaisesRegex(errors.UserError, 'no session to join'):
      inference.join([])

  def test_refuses_flags_of_other_shapes(self):
    session = begin()
    for marks, message in (
      ({'reset': [True, False]}, r'reset has shape \(1, 2\)'),
      ({'mask': np.zeros(3, bool)}, 'nothing to read'),
      ({'mask': np.zeros((1, 4), bool)}, r'mask has shape \(1, 4\)'),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        session.feed([1, 2, 3], **marks)
    assert_equal(session, base())

  def test_refuses_to_generate_without_context_or_valid_settings(self):
    with self.assertRaisesRegex(errors.UserError, 'give a prompt'):
      begin().generate(3)
    with self.assertRaisesRegex(errors.UserError, 'num_tokens=0'):
      begin().generate(0, prompt=draw(2))
    for settings, message in (
      ({'temperature': float('nan')}, 'temperature=nan'),
      ({'top_k': 0}, 'top_k=0'),
      ({'top_p': 2.0}, 'top_p=2.0'),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        begin().generate(1, prompt=draw(2), **settings)
