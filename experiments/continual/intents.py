"""Short texts with a class each: CLINC150, Banking77, DBpedia, or generated.

    corpus = read_intents('path/to/clinc150')  # a folder that you have
    corpus = generate_intents(seed=0)  # of the same shape, from no file

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

_CLINC = 'data_full.json'
# What a column with the class is called; DBpedia's second of three levels.
_CLASS_COLUMNS = ('category', 'label', 'intent', 'l2')
_WAY_OUT = (
  f'Give a folder with {_CLINC} (CLINC150), or with files *train*.csv and '
  "*test*.csv that have a column 'text' and one of "
  f'{", ".join(_CLASS_COLUMNS)}, or no header and the columns class, title, '
  'text (DBpedia).'
)


class Corpus(NamedTuple):
  """Texts to learn from and to be asked, each with its class.

  Attributes:
    train: Texts.
    train_labels: int [text], their classes.
    test: Texts.
    test_labels: int [text].
    names: Of the classes.
  """

  train: tuple[str, ...]
  train_labels: np.ndarray
  test: tuple[str, ...]
  test_labels: np.ndarray
  names: tuple[str, ...]


def read_intents(path: str | pathlib.Path) -> Corpus:
  """Reads CLINC150, Banking77 or DBpedia as they are distributed.

  Args:
    path: A folder. With data_full.json, CLINC150: its in-scope texts, those for
      validation left out. Otherwise CSV files, one with 'train' and one with
      'test' in its name, with a header (Banking77; DBpedia with classes of
      three levels, of which the second counts) or with none (DBpedia-14).

  Returns:
    The corpus.

  Raises:
    errors.UserError: The folder or a file is not there or not like that.
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
      f'{path} tests the class {unknown[0]!r}, of which it has no text to '
      'learn from; add some or take it out.'
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
  classes_per_domain: int = 15,
  num_train: int = 100,
  num_test: int = 30,
) -> Corpus:
  """Makes a corpus of the shape of CLINC150, in words of no language.

  A text is a few common words, one or two of its domain and one to three of the
  words of its class, some of which are more frequent. Every class shares some
  of its words with another of its domain, so that no single word is enough.

  Args:
    seed: Of everything.
    num_classes: Classes.
    classes_per_domain: Classes that share a domain's words.
    num_train: Texts of a class to learn from.
    num_test: Texts of a class to be asked.

  Returns:
    The corpus.
  """
  rng = np.random.default_rng(seed)
  common = _words(rng, 60)
  domains = [
    _words(rng, 20) for _ in range(-(-num_classes // classes_per_domain))
  ]
  own = [_words(rng, 10) for _ in range(num_classes)]
  zipf = lambda n: (p := 1 / np.arange(1, n + 1)) / p.sum()

  def text(label):
    domain = label // classes_per_domain
    first = domain * classes_per_domain
    last = min(first + classes_per_domain, num_classes)
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
  """Words of two or three syllables, all different."""
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
