"""Short texts with classes: CLINC150, Banking77, DBpedia, or generated ones.

    corpus = read_intents('path/to/clinc150')
    corpus = generate_intents(seed=0)  # of the same shape, without files

References:
  Larson et al., arXiv:1909.02027, 2019 (CLINC150).
  Casanueva et al., arXiv:2003.04807, 2020 (Banking77).
"""

import csv
import json
import pathlib
from typing import NamedTuple

import numpy as np

from nested_learning import errors

# Classes of the generated corpus that share the words of a domain.
_DOMAIN_CLASSES = 15
_CLINC = 'data_full.json'
# Names of the column with the class; in DBpedia, the second of three levels.
_CLASS_COLUMNS = ('category', 'label', 'intent', 'l2')
_WAY_OUT = (
  f'Give a folder with {_CLINC} (CLINC150), or with files *train*.csv and '
  "*test*.csv that have a column 'text' and one of "
  f'{", ".join(_CLASS_COLUMNS)}, or no header and the columns class, title, '
  'text (DBpedia).'
)


class Corpus(NamedTuple):
  """Texts for training and for the test, with their classes.

  Attributes:
    train: Training texts.
    train_labels: Their classes, int [text].
    test: Test texts.
    test_labels: Their classes, int [text].
    names: Names of the classes.
  """

  train: tuple[str, ...]
  train_labels: np.ndarray
  test: tuple[str, ...]
  test_labels: np.ndarray
  names: tuple[str, ...]


def read_intents(path: str | pathlib.Path) -> Corpus:
  """Reads CLINC150, Banking77 or DBpedia from the files of their authors.

  Args:
    path: A folder with data_full.json (CLINC150, whose in-scope texts for
      training and test are read), or with one CSV file with 'train' and one
      with 'test' in its name, either with a header (Banking77; DBpedia, whose
      second level of classes is read) or without (DBpedia-14).

  Returns:
    The corpus.

  Raises:
    errors.UserError: A file is missing or has another form.
  """
  folder = pathlib.Path(path).expanduser()
  if not folder.is_dir():
    raise errors.UserError(f'{path} is no folder. {_WAY_OUT}')
  if (folder / _CLINC).is_file():
    train, test = _read_clinc(folder / _CLINC)
  else:
    train, test = (_read_csv(_find(folder, word)) for word in ('train', 'test'))
  names = sorted({label for _, label in train})
  number = {name: i for i, name in enumerate(names)}
  unknown = sorted({label for _, label in test} - set(number))
  if unknown:
    raise errors.UserError(
      f'{path} tests the class {unknown[0]!r} without training texts; add some '
      'or remove the class.'
    )
  split = lambda rows: (
    tuple(text for text, _ in rows),
    np.array([number[label] for _, label in rows], np.int64),
  )
  return Corpus(*split(train), *split(test), tuple(names))


def generate_intents(
  seed: int = 0,
  *,
  num_classes: int = 150,
  num_train: int = 100,
  num_test: int = 30,
) -> Corpus:
  """Generates a corpus of the shape of CLINC150, in invented words.

  A text has a few common words, one or two words of its domain, and one to
  three words of its class, some of which are more frequent. Every class shares
  words with another one of its domain, so that no single word is enough.

  Args:
    seed: Random seed.
    num_classes: Number of classes.
    num_train: Training texts of a class.
    num_test: Test texts of a class.

  Returns:
    The corpus.
  """
  rng = np.random.default_rng(seed)
  common = _words(rng, 60)
  domains = [_words(rng, 20) for _ in range(-(-num_classes // _DOMAIN_CLASSES))]
  own = [_words(rng, 10) for _ in range(num_classes)]
  zipf = lambda n: (p := 1 / np.arange(1, n + 1)) / p.sum()

  def text(label):
    domain = label // _DOMAIN_CLASSES
    first = domain * _DOMAIN_CLASSES
    last = min(first + _DOMAIN_CLASSES, num_classes)
    neighbour = first + (label - first + 1) % (last - first)
    pool = own[label] + own[neighbour][:4]
    words = [
      *rng.choice(common, rng.integers(2, 6), p=zipf(60)),
      *rng.choice(domains[domain], rng.integers(1, 3)),
      *rng.choice(pool, rng.integers(1, 4), p=zipf(len(pool))),
    ]
    rng.shuffle(words)
    return ' '.join(words)

  def split(count):
    labels = np.repeat(np.arange(num_classes), count)
    return tuple(text(label) for label in labels), labels

  names = tuple(f'intent_{i:03d}' for i in range(num_classes))
  return Corpus(*split(num_train), *split(num_test), names)


def _words(rng, count: int) -> list[str]:
  """Draws different words of two or three syllables."""
  words = {}
  while len(words) < count:
    word = ''.join(
      rng.choice(list('bdfgklmnprstvz')) + rng.choice(list('aeiou'))
      for _ in range(rng.integers(2, 4))
    )
    words[word] = None
  return list(words)


def _read_clinc(path):
  try:
    data = json.loads(path.read_text(encoding='utf-8'))
    return tuple(
      [(text, label) for text, label in data[split]]
      for split in ('train', 'test')
    )
  except (OSError, KeyError, TypeError, ValueError) as error:
    raise errors.UserError(
      f'{path} is not as CLINC150 is distributed ({error!r}); get it again.'
    ) from error


def _find(folder, word):
  found = [
    path
    for path in sorted(folder.iterdir())
    if path.suffix.lower() == '.csv' and word in path.name.lower()
  ]
  if not found:
    raise errors.UserError(f'{folder} has no *{word}*.csv. {_WAY_OUT}')
  return found[0]


def _read_csv(path):
  try:
    with open(path, encoding='utf-8', newline='') as file:
      rows = [row for row in csv.reader(file) if row]
  except (OSError, ValueError, csv.Error) as error:
    raise errors.UserError(f'{path} cannot be read ({error}).') from error
  head = [cell.strip().lower() for cell in rows[0]] if rows else []
  columns = [name for name in _CLASS_COLUMNS if name in head]
  if 'text' in head and columns:
    places, rows = (head.index('text'), head.index(columns[0])), rows[1:]
  elif len(head) == 3 and 'text' not in head:
    places = 2, 0
  else:
    raise errors.UserError(f'{path} has the columns {head}. {_WAY_OUT}')
  short = [i for i, row in enumerate(rows) if len(row) <= max(places)]
  if short or not rows:
    raise errors.UserError(
      f'{path}: row {short[0] + 1 if short else 1} lacks a text or its class.'
    )
  return [(row[places[0]], row[places[1]]) for row in rows]
