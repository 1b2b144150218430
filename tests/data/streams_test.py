import itertools
import json
import pathlib

from absl.testing import parameterized
import numpy as np

from nested_learning import data
from nested_learning import errors
from nested_learning.data import corpus as corpus_lib
from nested_learning.data import streams


def _corpus(documents, names=None):
  """Makes a corpus of lists of ids."""
  names = names or [f'{i}.txt' for i in range(len(documents))]
  return corpus_lib.Corpus(
    tokens=np.array(list(itertools.chain(*documents)), np.uint16),
    starts=np.cumsum([0, *map(len, documents)]),
    places=np.array([corpus_lib.place(name) for name in names]),
    contents=np.array(
      [hash(tuple(document)) % 2**63 for document in documents], np.uint64
    ),
    fingerprint='',
    vocab_size=10,
    folder='FOLDER',
  )


class PackTest(parameterized.TestCase):
  def test_pack_by_hand(self):
    corpus = _corpus([[9, 1, 2], [], [9, 3], [9, 4]])
    spans = np.array([[5, 7], [0, 3], [3, 5]])
    stream = streams.make_stream([corpus], [spans], [1.0], seed=None)
    self.assertEqual(stream.length, 7)  # 9 4 | 9 1 2 | 9 3
    rows = streams.pack(stream, np.array([0, 3, 5]), length=4)
    expected = {
      'tokens': [[9, 4, 9, 1], [1, 2, 9, 3], [9, 3, 9, 4]],
      'targets': [[4, 9, 1, 2], [2, 9, 3, 9], [3, 9, 4, 9]],
      'reset': [[1, 0, 1, 0], [0, 0, 1, 0], [1, 0, 1, 0]],
      'document': [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]],
    }
    self.assertSameElements(rows, expected)
    for name, value in expected.items():
      np.testing.assert_array_equal(rows[name], value, err_msg=name)

  @parameterized.parameters(1, 2, 5, 64)
  def test_rows_put_together_are_the_documents(self, length):
    documents = [[9, *range(n)] for n in (3, 1, 4, 1, 5)]
    corpus = _corpus(documents)
    order = np.array([3, 0, 4, 2, 1])
    spans = np.stack([corpus.starts[:-1], corpus.starts[1:]], axis=1)[order]
    stream = streams.make_stream([corpus], [spans], [1.0], seed=None)
    begins = np.arange(0, stream.length, length)
    rows = streams.pack(stream, begins, length=length)
    expected = list(itertools.chain(*(documents[i] for i in order)))
    self.assertEqual(rows['tokens'].ravel()[: stream.length].tolist(), expected)
    np.testing.assert_array_equal(rows['reset'], rows['tokens'] == 9)

  def test_token_beyond_the_vocabulary(self):
    corpus = _corpus([[9, 1], [9, 65535]])
    spans = np.array([[0, 2], [2, 4]])
    stream = streams.make_stream([corpus], [spans], [1.0], seed=None)
    with self.assertRaisesRegex(
      errors.UserError, 'token 65535 is beyond the 10 of .* in FOLDER are dam'
    ):
      streams.pack(stream, np.array([0]), length=4)


class SplitTest(parameterized.TestCase):
  def split(self, *corpora, fraction=0.3):
    """Returns the documents on both sides of each corpus, as tuples."""
    found = []
    for corpus, split in zip(
      corpora, streams.split(corpora, fraction), strict=True
    ):
      parts = [
        [tuple(corpus.tokens[a:b].tolist()) for a, b in spans]
        for spans in split
      ]
      found.append(parts)
    return found

  def test_share_is_about_the_fraction(self):
    corpus = _corpus([[9, i % 9, i // 9] for i in range(2000)])
    ((train, validation),) = self.split(corpus, fraction=0.1)
    self.assertBetween(len(validation), 160, 240)
    self.assertLen(train, 2000 - len(validation))

  def test_a_document_keeps_its_side_when_others_go(self):
    documents = [[9, i // 9, i % 9] for i in range(80)]
    names = [f'{i}.txt' for i in range(80)]
    ((_, validation),) = self.split(_corpus(documents))
    ((_, fewer),) = self.split(_corpus(documents[::-2], names[::-2]))
    kept = set(map(tuple, documents[::-2]))
    self.assertEqual(set(fewer), set(validation) & kept)

  @parameterized.parameters((0.001, 1), (0.999, 9))
  def test_both_sides_have_a_document(self, fraction, expected):
    corpus = _corpus([[9, i] for i in range(9)] + [[9, 1, 1], []])
    ((_, validation),) = self.split(corpus, fraction=fraction)
    self.assertLen(validation, expected)

  def test_nothing_is_held_out_at_zero(self):
    ((train, validation),) = self.split(_corpus([[9, 1], [9, 2]]), fraction=0)
    self.assertEqual((len(train), len(validation)), (2, 0))
    ((train, validation),) = self.split(_corpus([[9, 1]]), fraction=0)
    self.assertEqual((len(train), len(validation)), (1, 0))

  @parameterized.parameters((0.3, 7), (1e-9, 9), (0.999, 1))
  def test_a_single_text_is_cut_by_position(self, fraction, num_train):
    document = [9, *range(9)]
    for documents in ([document], [[], document], [document] * 3):
      corpus = _corpus(documents)
      ((train, validation),) = self.split(corpus, fraction=fraction)
      self.assertEqual(set(train), {tuple(document[:num_train])})
      self.assertEqual(set(validation), {tuple(document[num_train:])})

  def test_equal_texts_are_on_one_side(self):
    documents = [[9, i // 2 % 7, i // 14] for i in range(60)]
    ((train, validation),) = self.split(_corpus(documents))
    self.assertNotEmpty(validation)
    self.assertNoCommonElements(train, validation)

  def test_equal_texts_of_a_mixture_are_on_one_side(self):
    rng = np.random.default_rng(0)
    for _ in range(50):
      corpora = [
        _corpus([[9, *rng.integers(3, size=2)] for _ in range(n)])
        for n in rng.integers(1, 5, size=3)
      ]
      sides = self.split(*corpora)
      for train, validation in sides:
        self.assertNotEmpty(train)
        self.assertNotEmpty(validation)
      train = [text for side in sides for text in side[0]]
      validation = [text for side in sides for text in side[1]]
      self.assertNoCommonElements(train, validation)


class MixturesTest(parameterized.TestCase):
  def test_parses_a_mixture(self):
    self.assertEqual(
      streams.parse_mixture('3*a/*.jsonl + 1.0*c++ + 4*b'),
      {'a/*.jsonl': 0.375, 'c++': 0.125, 'b': 0.5},
    )

  @parameterized.parameters('stdlib', 'a + b', '7*.txt', 'a+b', '')
  def test_parses_one_source(self, source):
    self.assertEqual(streams.parse_mixture(source), {source: 1.0})

  @parameterized.parameters('0.5*a + b', '0*a + 1*b', '1*a + 2*a', '1*a + -1*b')
  def test_refuses_bad_weights(self, source):
    with self.assertRaisesRegex(errors.UserError, 'is not WEIGHT.SOURCE with'):
      streams.parse_mixture(source)

  def test_order_keeps_the_shares(self):
    rng = np.random.default_rng(0)
    lengths = [rng.integers(1, 50, n) for n in (400, 30, 100)]
    weights = [0.5, 0.2, 0.3]
    which, numbers = streams.make_order(lengths, weights, seed=3)
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
    again = streams.make_order(lengths, weights, seed=3)
    np.testing.assert_array_equal(again, (which, numbers))
    other = streams.make_order(lengths, weights, seed=4)
    self.assertFalse(np.array_equal(other[1][:50], numbers[:50]))

  def test_refuses_endless_repetition(self):
    with self.assertRaisesRegex(errors.UserError, 'repeated 10000 times'):
      streams.make_order(
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

  def test_validation_reads_every_source_once(self):
    found = {}
    for weights in ((0.25, 0.75), (0.5, 0.5)):
      batches = self.make(weights, split='validation')
      found[weights] = [b['tokens'][b['mask']].tolist() for b in batches]
    (first, second) = found.values()
    self.assertEqual(first, second)
    tokens = list(itertools.chain(*first))
    self.assertIn(ord('a'), tokens)
    self.assertIn(ord('b'), tokens)
