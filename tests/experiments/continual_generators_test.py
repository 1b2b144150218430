"""Tests of the streams, tasks and scores of continual learning."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from experiments.continual import class_tasks
from experiments.continual import classes
from experiments.continual import classifier
from experiments.continual import closed_book
from experiments.continual import facts
from experiments.continual import fine_tuning
from experiments.continual import frequencies
from experiments.continual import grammar
from experiments.continual import horizon
from experiments.continual import languages
from nested_learning import errors
from tests import compiling


class ClosedBookTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.config = closed_book.get_config()
    self.stream = closed_book.Stream(
      self.config.stream,
      np.random.default_rng(0),
      num_changed=8,
      num_unknown=16,
    )

  def test_some_facts_change_and_some_names_are_never_said(self):
    sentences = self.stream.plant().reshape(-1, 4)
    self.assertLen(sentences, 16 * 64)
    asked = self.stream.questions().reshape(-1, 4)
    self.assertLen({tuple(x[1:3]) for x in asked}, 32)
    first = self.config.stream.first_value
    for i, question in enumerate(asked):
      said = sentences[(sentences[:, 1:3] == question[1:3]).all(1), 3] - first
      value, outdated = self.stream.values[i], self.stream.outdated[i]
      if i < 8:
        self.assertNotEqual(value, outdated)
        self.assertEqual(said.tolist(), [outdated] * 32 + [value] * 32)
      elif i < 16:
        self.assertEqual(said.tolist(), [value] * 64)
        self.assertEqual(outdated, -1)
      else:
        self.assertEmpty(said)
        self.assertEqual((value, outdated), (-1, -1))
    names = self.stream.documents(2**14).reshape(-1, 4)[:, 1:3]
    self.assertEmpty(set(map(tuple, names)) & {tuple(x[1:3]) for x in asked})

  def test_the_threshold_is_where_most_reactions_are_good(self):
    answers = np.array([3, 4, 7, 5, 6])
    values = np.array([3, 4, 7, -1, 0])
    confidences = np.array([0.9, 0.6, 0.5, 0.7, 0.8])
    for share in (0.5, 0.9):  # three right answers and one made up, or one
      chosen = closed_book.choose_threshold(answers, confidences, values)
      self.assertEqual(chosen, share)
      values[1] = 0
    self.assertEqual(
      closed_book.choose_threshold(answers, confidences, np.full(5, -1)),
      float('inf'),
    )

  def test_reactions(self):
    values, outdated = np.array([1, 1, 1, -1, 1]), np.array([2, 2, -1, -1, -1])
    answers, confidences = np.array([1, 2, 2, 2, 1]), np.ones(5)
    confidences[-1] = 0.4
    found = closed_book.react(answers, confidences, values, outdated, 0.5)
    names = [closed_book.REACTIONS[i] for i in found]
    expected = ['right', 'outdated', 'made up', 'made up', 'none']
    self.assertEqual(names, expected)

  def test_separation(self):
    known, unknown = np.array([0.9, 0.5]), np.array([0.5, 0.1])
    self.assertEqual(closed_book.separation(known, unknown), 3.5 / 4)

  def test_a_learner_that_knows_all_makes_nothing_up(self):
    values, _ = closed_book.truth(self.config)
    shape = (len(self.config.gaps), *values.shape)
    sure = np.broadcast_to(np.where(values < 0, 0.2, 0.9), shape)
    answers = np.broadcast_to(np.maximum(values, 0), shape)
    found = {'answers': answers, 'confidences': sure}
    scores = closed_book.score(self.config, found)
    good = [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(scores['reactions'][0], good)
    np.testing.assert_array_equal(scores['made_up'], 0)
    np.testing.assert_array_equal(scores['separation'], 1)

  @parameterized.parameters(
    ('num_changed', 16), ('num_unknown', 60), ('num_streams', 1)
  )
  def test_refuses(self, name, value):
    with self.assertRaisesRegex(errors.UserError, f'{name}={value}'):
      closed_book.ClosedBookConfig(**{name: value})


class FactsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.config = facts.StreamConfig()
    self.stream = facts.Stream(self.config, np.random.default_rng(0))

  def _sentences(self, tokens):
    return tokens.reshape(-1, 4)

  def test_a_fact_has_one_value_wherever_it_is_said(self):
    said = {}
    for tokens in (self.stream.plant(), self.stream.questions()):
      for _, first, second, value in self._sentences(tokens):
        self.assertEqual(said.setdefault((first, second), value), value)
    self.assertLen(said, self.config.num_facts)

  def test_documents_leave_facts_alone_and_answer_from_themselves(self):
    told = {tuple(s[1:3]) for s in self._sentences(self.stream.plant())}
    documents = self.stream.documents(64 * 50)
    for document in documents.reshape(-1, self.config.document_tokens):
      sentences = self._sentences(document)
      own = {}
      for mark, *name, value in sentences:
        self.assertNotIn(tuple(name), told)
        if mark == 0:
          own[tuple(name)] = value
        else:
          self.assertEqual(own[tuple(name)], value)
      self.assertLen(own, self.config.document_facts)

  def test_rows_weigh_the_end_as_much_as_the_rest(self):
    tokens, weights = facts.make_row(
      self.config,
      np.random.default_rng(0),
      tellings=16,
      gap=512,
      multiple_of=256,
    )
    self.assertEqual(len(tokens) % 256, 0)
    end = len(tokens) - 4 * self.config.num_facts
    self.assertAlmostEqual(weights[end:].sum(), weights[:end].sum())
    asked = np.arange(len(tokens)) % 4 == 3
    asked &= np.roll(tokens, 3) == 1
    self.assertGreater(weights[asked].min(), weights[~asked].max())

  def test_tokens_are_in_the_vocabulary(self):
    tokens, _ = facts.make_row(
      self.config, np.random.default_rng(0), tellings=16, gap=512
    )
    self.assertLess(tokens.max(), self.config.vocab_size)
    values = tokens[3::4]
    self.assertGreaterEqual(values.min(), self.config.first_value)


class GrammarTest(parameterized.TestCase):
  def test_a_sentence_by_hand(self):
    language = grammar.Language(
      words=tuple(range(22)),
      is_suffix=(True, False),
      order='OVS',
      adjective_first=False,
    )
    meaning = grammar.Meaning(
      subject=grammar.Phrase(0, None, False),  # dog
      verb=10,  # watch
      target=grammar.Phrase(1, 16, True),  # big cats
      is_past=True,
    )
    words = [1, 20, 16, 21, 10, 0]  # cat, plural, big; past, watch; dog
    self.assertEqual(grammar.gloss(language, meaning), words)
    tokens = grammar.sentence(language, meaning)
    self.assertEqual(grammar.to_text(tokens), 'cat -s big -ed watch dog')
    foreign, english = grammar.VOCAB_SIZE - 64, 1
    self.assertEqual(tokens[:4].tolist(), [grammar.PAD] * 4)
    self.assertEqual(tokens[4::2].tolist(), [foreign + w for w in words])
    self.assertEqual(tokens[5::2].tolist(), [english + w for w in words])

  def test_sentences_fit_and_languages_share_no_word(self):
    rng = np.random.default_rng(0)
    one, other = grammar.make_languages(rng, 2)
    self.assertEmpty(set(one.words) & set(other.words))
    self.assertLen(set(one.words), len(grammar.ENGLISH))
    longest = 0
    for meaning in grammar.make_meanings(rng, 300):
      tokens = grammar.sentence(one, meaning)
      self.assertLen(tokens, grammar.SENTENCE)
      self.assertLess(tokens.max(), grammar.VOCAB_SIZE)
      longest = max(longest, np.sum(tokens != grammar.PAD))
    self.assertEqual(longest, grammar.SENTENCE)

  def test_only_what_words_mean_weighs(self):
    config = languages.get_config('small')
    tokens, weights = languages.make_row(config, np.random.default_rng(0))
    tokens = tokens.reshape(-1, grammar.SENTENCE)
    weights = weights.reshape(tokens.shape)
    english = grammar.is_english(tokens)
    self.assertGreater(weights[english].min(), 10 * weights[~english].max())
    review = config.review_sentences
    self.assertAlmostEqual(weights[-review:].sum() / weights.sum(), 0.5)


class HorizonTest(absltest.TestCase):
  def test_text_follows_its_topic(self):
    config = horizon.HorizonConfig(noise=0.0)
    rng = np.random.default_rng(0)
    topics = np.stack([horizon.make_topic(config, rng) for _ in range(2)])
    np.testing.assert_allclose(topics[..., -1], 1)
    text = horizon.write_text(topics, 500, rng)
    for topic, words in zip(topics, text, strict=True):
      chances = np.diff(topic, axis=1, prepend=0)
      self.assertTrue((chances[words[:-1], words[1:]] > 1e-12).all())


class FrequenciesTest(parameterized.TestCase):
  @parameterized.parameters(
    (0, (None,)),
    (1, (256,)),
    (2, (16, 256)),
    (3, (16, 64, 256)),
    (4, (16, 32, 128, 256)),
  )
  def test_clocks_are_even_in_the_logarithm(self, number, sizes):
    self.assertEqual(frequencies.update_every(number, 16, 256), sizes)

  def test_refuses_what_has_no_common_segment(self):
    with self.assertRaisesRegex(errors.UserError, 'slowest=100'):
      frequencies.update_every(2, 16, 100)


class ClassesTest(absltest.TestCase):
  def test_every_class_is_in_one_task(self):
    config = classes.get_config('small')
    tasks = classes.make_tasks(config)
    self.assertLen(tasks.train, 16)
    self.assertLen(tasks.test, 8)
    for seed in range(config.num_seeds):
      parts = [tasks.part(seed, task) for task in range(config.num_tasks)]
      np.testing.assert_array_equal(np.sort(np.concatenate(parts)), range(16))

  def test_candidates_are_what_came(self):
    tasks = classes.make_tasks(classes.get_config('small'))
    labels = tasks.test[:, -1]
    asked = []

    def perfect(allowed):
      asked.append(allowed.sum(axis=1).tolist())
      return np.stack([labels] * len(allowed))

    np.testing.assert_array_equal(tasks.score(perfect, 0), np.ones((2, 2)))
    self.assertEqual(asked, [[4, 4], [2, 2]])  # all classes, then the first two

  def test_texts_become_words_a_mark_and_a_class(self):
    words = classifier.Words(num_classes=4, num_words=64)
    tokens = words.encode(['Pay my bill!', 'pay ' * 20])
    self.assertEqual(tokens.shape, (2, classifier.EXAMPLE))
    self.assertTrue((tokens[:, -2] == words.question).all())
    self.assertTrue((tokens[0, :-5] == words.pad).all())
    self.assertEqual(tokens[0, -5], tokens[1, 0])
    self.assertTrue((tokens[1, :-2] >= 6).all())

  def test_in_batch_names_of_other_classes_stay(self):
    config = classes.get_config('small')
    tasks = classes.make_tasks(config)
    model = classifier.make_classifier(config.learner, tasks.words, ('fast',))
    start = compiling.jit(model.init_params)(jax.random.key(0))
    params = jax.tree.map(lambda x: x[None], start)
    batch = tasks.train[tasks.train[:, -1] < 2][None]
    for in_batch in (True, False):
      tuner = fine_tuning.make_tuning(
        model, tasks.words, 0.1, 0.0, in_batch=in_batch
      )
      copy = jax.tree.map(jnp.copy, params)
      after, _ = tuner.step(copy, tuner.init(params), batch, None)
      moved = np.abs(after['embedding'][0] - start['embedding']).max(axis=1)
      self.assertTrue((moved[:2] > 0).all())
      self.assertEqual((moved[2:4] > 0).all(), not in_batch)

  def test_refuses_tasks_of_unequal_size(self):
    config = classes.ClassesConfig(num_classes=10, num_tasks=3)
    with self.assertRaisesRegex(errors.UserError, 'no multiple of num_tasks=3'):
      classes.make_tasks(config)


class ContinualScoresTest(absltest.TestCase):
  def test_by_hand(self):
    scores = [[0.8, 0.1, 0.0], [0.9, 0.7, 0.2], [0.3, 0.5, 0.6]]
    got = class_tasks.continual_scores(scores, untrained=[0.0, 0.05, 0.1])
    self.assertAlmostEqual(got.final, 1.4 / 3)
    self.assertAlmostEqual(got.average, (0.8 + 0.8 + 1.4 / 3) / 3)
    # The first task was best after the second one, before it was forgotten.
    self.assertAlmostEqual(got.forgetting, ((0.9 - 0.3) + (0.7 - 0.5)) / 2)
    self.assertAlmostEqual(got.backward, ((0.3 - 0.8) + (0.5 - 0.7)) / 2)
    self.assertAlmostEqual(got.forward, ((0.1 - 0.05) + (0.2 - 0.1)) / 2)

  def test_nothing_to_forget(self):
    got = class_tasks.continual_scores([[0.5]], [0.1])
    self.assertEqual(got, (0.5, 0.5, 0, 0, 0))

  def test_no_forward_transfer_without_a_start(self):
    self.assertTrue(np.isnan(class_tasks.continual_scores(np.eye(3)).forward))

  def test_refuses_what_is_no_matrix_of_tasks(self):
    with self.assertRaisesRegex(errors.UserError, 'square'):
      class_tasks.continual_scores(np.zeros((2, 3)))
    with self.assertRaisesRegex(errors.UserError, 'each of 2 tasks'):
      class_tasks.continual_scores(np.zeros((2, 2)), [0.0])
