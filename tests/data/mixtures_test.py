import itertools
import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from nested_learning import data
from nested_learning import errors
from nested_learning.data import mixtures


class MixturesTest(parameterized.TestCase):
  def test_parses(self):
    self.assertEqual(
      mixtures.parse('3*a/*.jsonl + 1.0*c++ + 4*b'),
      {'a/*.jsonl': 0.375, 'c++': 0.125, 'b': 0.5},
    )

  @parameterized.parameters('stdlib', 'a + b', '7*.txt', 'a+b', '')
  def test_is_one_source(self, source):
    self.assertIsNone(mixtures.parse(source))

  @parameterized.parameters('0.5*a + b', '0*a + 1*b', '1*a + 2*a', '1*a + -1*b')
  def test_refuses(self, source):
    with self.assertRaisesRegex(errors.UserError, 'is not WEIGHT.SOURCE with'):
      mixtures.parse(source)

  def test_order_keeps_the_shares_all_along(self):
    rng = np.random.default_rng(0)
    lengths = [rng.integers(1, 50, n) for n in (400, 30, 100)]
    weights = [0.5, 0.2, 0.3]
    which, numbers = mixtures.make_order(lengths, weights, seed=3)
    tokens = np.zeros((len(which), 3))
    for i, own in enumerate(lengths):
      tokens[which == i, i] = own[numbers[which == i]]
    so_far = np.cumsum(tokens, axis=0)
    shares = weights * so_far.sum(axis=1, keepdims=True)
    # Never off by more than about a document of each source.
    self.assertLess(np.abs(so_far - shares).max(), 100)
    # The source that lasts longest is read once, the others again and again.
    repeats = [np.bincount(numbers[which == i]) for i in range(3)]
    longest = np.argmax(
      [own.sum() / w for own, w in zip(lengths, weights, strict=True)]
    )
    self.assertEqual(set(repeats[longest]), {1})
    for counts in repeats:
      self.assertLessEqual(counts.max() - counts.min(), 1)
    again = mixtures.make_order(lengths, weights, seed=3)
    np.testing.assert_array_equal(again, (which, numbers))
    other = mixtures.make_order(lengths, weights, seed=4)
    self.assertFalse(np.array_equal(other[1][:50], numbers[:50]))

  def test_refuses_endless_repetition(self):
    with self.assertRaisesRegex(errors.UserError, 'repeated 10000 times'):
      mixtures.make_order(
        [np.array([10]), np.array([100_000])], [0.5, 0.5], seed=0
      )


class MixedBatchesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    for name in ('a', 'b'):  # texts of nothing but their letter
      (self.root / name).mkdir()
    for i in range(20):
      (self.root / 'a' / f'{i}.txt').write_text('a' * (5 + i))
    with open(self.root / 'b' / 'b.jsonl', 'w') as file:
      for i in range(50):
        file.write(json.dumps({'text': 'b' * (9 + i)}) + '\n')

  def make(self, weights=(0.25, 0.75), **settings):
    others = {
      name: settings.pop(name)
      for name in ('split', 'num_epochs', 'process_index', 'process_count')
      if name in settings
    }
    source = f'{weights[0]}*{self.root}/a + {weights[1]}*{self.root}/b/*.jsonl'
    config = data.DataConfig(
      source=source,
      sequence_length=16,
      batch_size=4,
      validation_fraction=0.2,
      cache_dir=str(self.root / 'cache'),
      **settings,
    )
    return data.make_iterator(config, **others)

  @parameterized.product(reset=['document', 'never'], weight=[0.25, 0.6])
  def test_shares_of_the_tokens(self, reset, weight):
    batches = self.make((weight, 1 - weight), reset=reset, num_epochs=1)
    tokens = np.concatenate([batch['tokens'].ravel() for batch in batches])
    a, b = (int((tokens == ord(letter)).sum()) for letter in 'ab')
    self.assertGreater(b, 900)
    # A document's id is a token too, and the texts of a are shorter.
    self.assertAlmostEqual(a / (a + b), weight, delta=0.04)

  @parameterized.product(reset=['document', 'never'])
  def test_resumes_at_every_offset_on_any_number_of_processes(self, reset):
    iterator = self.make(reset=reset)
    states, batches = [], []
    for _ in range(12):
      states.append(json.dumps(iterator.get_state()))
      batches.append(next(iterator)['tokens'])
    for offset, state in enumerate(states):
      parts = []
      for index in (0, 1):
        part = self.make(reset=reset, process_index=index, process_count=2)
        part.set_state(json.loads(state))
        parts.append(next(part)['tokens'])
      np.testing.assert_array_equal(np.concatenate(parts), batches[offset])

  def test_state_of_other_weights(self):
    state = self.make().get_state()
    with self.assertRaisesRegex(errors.UserError, 'on data with text='):
      self.make((0.5, 0.5)).set_state(state)

  def test_validation_is_every_source_once(self):
    found = {}
    for weights in ((0.25, 0.75), (0.5, 0.5)):
      batches = self.make(weights, split='validation')
      found[weights] = [b['tokens'][b['mask']].tolist() for b in batches]
    (first, second) = found.values()
    self.assertEqual(first, second)
    tokens = list(itertools.chain(*first))
    self.assertIn(ord('a'), tokens)
    self.assertIn(ord('b'), tokens)


if __name__ == '__main__':
  absltest.main()
