"""Tests of counts of right answers and rows, against a plain count."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning import evaluation
from nested_learning import models
from nested_learning import tasks
from nested_learning.evaluation import accuracy
from tests.training import tiny

_NUM_IDS = 5


class Table:
  """A model that answers token t with `t`, plus what it has read before."""

  def init_state(self, params, batch_size):
    del params
    return jnp.zeros(batch_size, jnp.int32)

  def forward(self, params, state, tokens, *, reset):
    del params, reset
    start = 0 if state is None else state[:, None]
    total = start + jnp.cumsum(tokens, axis=1)
    return jax.nn.one_hot(total % _NUM_IDS, _NUM_IDS), total[:, -1]


def _batch(seed):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(_NUM_IDS, size=(6, 12)).astype(np.int32)
  targets = np.cumsum(tokens, axis=1) % _NUM_IDS
  wrong = (rng.random(targets.shape) < 0.1) | (np.arange(6) == 0)[:, None]
  targets = np.where(wrong, rng.integers(_NUM_IDS, size=(6, 12)), targets)
  mask = rng.random(targets.shape) < 0.5
  mask[1] = False  # a row without targets is no row
  return {
    'tokens': tokens,
    'targets': targets.astype(np.int32),
    'mask': mask,
    'reset': np.arange(12) == np.zeros((6, 1)),
  }


def _cut(batch, length):
  return [
    {name: x[:, i : i + length] for name, x in batch.items()}
    for i in range(0, 12, length)
  ]


class CountTest(parameterized.TestCase):
  @parameterized.parameters(12, 4)
  def test_counts(self, length):
    batches = [_batch(0), _batch(1)]
    count = evaluation.make_count(Table())
    counts = count(None, [_cut(batch, length) for batch in batches])
    result = evaluation.TaskEvaluation(counts)

    answers, targets, row_right = [], [], []
    for batch in batches:
      said = np.cumsum(batch['tokens'], axis=1) % _NUM_IDS
      for a, t, m in zip(said, batch['targets'], batch['mask'], strict=True):
        answers += a[m].tolist()
        targets += t[m].tolist()
        row_right += [(a[m] == t[m]).all()] if m.any() else []
    answers, targets = np.array(answers), np.array(targets)
    right = answers == targets
    self.assertBetween(right.mean(), 0.5, 0.95)
    self.assertBetween(np.mean(row_right), 0.1, 0.9)
    self.assertEqual(result.num_targets, len(targets))
    self.assertAlmostEqual(result.accuracy, right.mean())
    self.assertAlmostEqual(result.all_right, np.mean(row_right))
    shares = [right[targets == i].mean() for i in range(_NUM_IDS)]
    self.assertAlmostEqual(result.macro_accuracy, np.mean(shares))
    loss = np.where(right, 0, 1) + np.log(np.e + _NUM_IDS - 1) - 1
    self.assertAlmostEqual(result.loss, loss.mean(), places=5)
    self.assertEqual(result.score, result.loss)
    self.assertIn(f'of {len(targets)} answers right', result.sentence)

  def test_macro_accuracy_counts_ids_that_are_only_answers(self):
    counts = accuracy.Counts(
      0.0,
      targets=np.array([2.0, 0, 0]),
      answers=np.array([1.0, 1, 0]),
      right=np.array([1.0, 0, 0]),
      rows=1,
      rows_right=0,
    )
    result = evaluation.TaskEvaluation(counts)
    self.assertEqual(result.macro_accuracy, 0.25)
    self.assertEqual(result.accuracy, 0.5)

  def test_refuses_targets_that_the_model_does_not_have(self):
    batch = _batch(0)
    batch['targets'][0, 0], batch['mask'][0, 0] = _NUM_IDS, True
    count = evaluation.make_count(Table())
    with self.assertRaisesRegex(
      errors.UserError, '1 ids of a batch are not among'
    ):
      count(None, [[batch]])

  def test_squared_errors_of_numbers(self):
    model = models.make_model(tiny.MODEL, head=models.RegressionHead(3))
    params = jax.jit(model.init_params)(jax.random.key(0))
    data = tasks.TaskDataConfig(
      tasks.RegressionConfig(num_dims=3, num_points=4), batch_size=2
    )
    batch = next(tasks.make_iterator(data))
    outputs, _ = jax.jit(model.forward)(params, None, batch['tokens'])
    error = (np.asarray(outputs)[..., 0] - batch['targets']) ** 2
    count = evaluation.make_count(model, evaluation.squared_error)
    result = evaluation.ErrorEvaluation(count(params, [[batch]]))
    self.assertAlmostEqual(result.loss, error[batch['mask']].mean(), places=5)
    self.assertEqual(result.numbers, {'squared_error': result.loss})


class AnswersTest(absltest.TestCase):
  def test_answers_are_greedy(self):
    task = tasks.make_config('qa1_small', num_tokens=140)
    config = dataclasses.replace(
      tiny.MODEL, vocab_size=task.vocab_size, max_length=160
    )
    model = models.make_model(config)
    params = jax.jit(model.init_params)(jax.random.key(0))
    rows = [task.make_row(np.random.default_rng(i)) for i in range(3)]
    answers = list(
      evaluation.generate_answers(model, params, task, rows, batch_size=2)
    )
    self.assertLen(answers, 3)
    forward = jax.jit(model.forward)
    tokenizer = task.make_tokenizer()
    for row, answer in zip(rows, answers, strict=True):
      tokens = row.tokens[: 1 + int(np.argmax(row.mask))].tolist()
      self.assertEqual(answer.prompt, tokenizer.decode(np.array(tokens)))
      self.assertEqual(answer.references, row.references)
      said = []
      for _ in range(task.answer_tokens):
        padded = np.zeros((1, 160), np.int32)
        padded[0, : len(tokens)] = tokens
        logits, _ = forward(params, None, padded)
        said.append(int(np.argmax(logits[0, len(tokens) - 1])))
        tokens.append(said[-1])
        if said[-1] == tokenizer.document_id:
          break
      self.assertEqual(answer.output, tokenizer.decode(np.array(said)))
      self.assertEqual(answer.score, task.score(answer.output, row))
