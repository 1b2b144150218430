"""Documents of lines with an attribute each; one value is asked for.

    Harbour: lemon river      ... other lines ...      Colour:   -> falcon

A generated stand-in for recall from web pages and forms. The number of lines
differs from row to row, as the number of pairs does in Based's mixture.

References:
  Arora et al., Based, arXiv:2402.18668, 2024 (recall from documents by the
    beginning of a line, whether the answer contains the value).
  Arora et al., Just Read Twice, arXiv:2407.05483, 2024 (the document again).
"""

from collections.abc import Iterator
import dataclasses
import functools
import itertools
from typing import Literal

import numpy as np

from nested_learning import errors
from nested_learning.data import tokenizers
from nested_learning.tasks import task
from nested_learning.tasks import words

ATTRIBUTES = tuple(
  'Age Author Brand Bridge Buyer Carrier City Class Climate Colour Cost '
  'Country Depth Emblem Grade Harbour Height Language Length Maker Material '
  'Method Model Motto Name Origin Owner Price Purpose Region Rent Route '
  'Season Seller Shape Size Source Sponsor Status Street Style Target Tax '
  'Title Topic Type Weight Width'.split()
)
_LONGEST_ATTRIBUTE = max(map(len, ATTRIBUTES))
_VALUE_WORDS = words.NOUNS[:32]
_LONGEST_WORD = max(map(len, words.NOUNS))


@dataclasses.dataclass(frozen=True)
class DocumentConfig:
  """A document, and the beginning of one of its lines, to be completed.

  A line is an attribute, a colon, and a value of one or more words; other lines
  stand between. With vocabulary='bytes' these are sentences of `source`; with
  'words' every word is a token and they are random words of their own.
  """

  num_tokens: int = 128  # of a row
  min_attributes: int = 4  # of a document
  max_attributes: int = 8
  value_words: int = 2  # most words of a value
  num_readings: int = 1  # how often the document precedes the question
  vocabulary: Literal['words', 'bytes'] = 'words'
  # Other lines, in bytes: 'stdlib', a folder, a file, or a glob.
  source: str = 'stdlib'

  def __post_init__(self):
    errors.check_choices(self)
    task.check_at_least(self, 1, 'min_attributes', 'value_words')
    task.check_at_least(self, 1, 'num_readings')
    errors.check_field(
      self,
      'max_attributes',
      self.min_attributes <= self.max_attributes <= len(ATTRIBUTES),
      f'at least min_attributes={self.min_attributes}, and at most the '
      f'{len(ATTRIBUTES)} that have a name',
    )
    needed = 1 + self._line_tokens * (
      1 + self.num_readings * self.max_attributes
    )
    errors.check_field(
      self,
      'num_tokens',
      self.num_tokens >= needed,
      f'at least {needed}: num_readings={self.num_readings} times '
      f'max_attributes={self.max_attributes} lines, question and answer',
    )

  @property
  def _line_tokens(self) -> int:
    """Length of the longest line with an attribute, in tokens."""
    if self.vocabulary == 'words':
      return 2 + self.value_words
    return _LONGEST_ATTRIBUTE + 2 + self.value_words * (1 + _LONGEST_WORD)

  @property
  def vocab_size(self) -> int:
    """Number of ids of the tokenizer."""
    return self.make_tokenizer().vocab_size

  @property
  def answer_tokens(self) -> int:
    """Room for a value and the mark after it."""
    length = 1 if self.vocabulary == 'words' else 1 + _LONGEST_WORD
    return self.value_words * length + 1

  def make_tokenizer(self) -> tokenizers.Tokenizer:
    """Returns a tokenizer of bytes, or of the words of documents."""
    if self.vocabulary == 'bytes':
      return task.make_tokenizer('bytes')
    return _make_word_tokenizer()

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task.make_row`."""
    del evaluating
    encode = self.make_tokenizer().encode
    count = rng.integers(self.min_attributes, self.max_attributes + 1)
    names = [ATTRIBUTES[i] for i in rng.permutation(len(ATTRIBUTES))[:count]]
    values = [self._draw_value(rng) for _ in names]
    asked = rng.integers(count)
    question = encode(f'{names[asked]}:')
    answer = encode(f' {values[asked]}')
    lines = [
      encode(f'{name}: {value}\n')
      for name, value in zip(names, values, strict=True)
    ]
    room = (self.num_tokens - 1 - len(question) - len(answer)) // (
      self.num_readings
    ) - sum(map(len, lines))
    units, filler = [], self._filler(rng)
    while room > 0:  # the last one loses its beginning
      units.append(encode(next(filler) + '\n')[-room:])
      room -= len(units[-1])
    places = np.sort(rng.integers(len(units) + 1, size=count))
    for place, line in zip(places[::-1], lines, strict=True):
      units.insert(place, line)
    prompt = np.concatenate([*units * self.num_readings, question])
    row = task.text_row(self.make_tokenizer(), prompt, answer, self.num_tokens)
    return row._replace(
      references=(values[asked],), question=f'{names[asked]}:'
    )

  def _draw_value(self, rng) -> str:
    count = rng.integers(1, self.value_words + 1)
    drawn = rng.integers(len(_VALUE_WORDS), size=count)
    return ' '.join(_VALUE_WORDS[i] for i in drawn)

  def _filler(self, rng) -> Iterator[str]:
    """Yields lines without an attribute, without end."""
    if self.vocabulary == 'bytes':
      sentences = words.load_sentences(self.source)
      for number in itertools.count(rng.integers(len(sentences))):
        # Only lines with an attribute have a colon.
        yield sentences[number % len(sentences)].replace(':', ',')
    while True:
      yield words.draw_filler(rng)

  def score(self, output, row):
    """Returns whether the output contains the value."""
    return words.string_match_all(output, row.references)

  def stretched(self, factor):
    """Returns the task with more other lines and as many attributes."""
    return dataclasses.replace(self, num_tokens=factor * self.num_tokens)


@functools.cache
def _make_word_tokenizer() -> tokenizers.Tokenizer:
  listed = [':', '.', *ATTRIBUTES, *_VALUE_WORDS, *words.FILLER]
  fingerprint = f'documents {len(_VALUE_WORDS)} {len(words.FILLER)}'
  return words.make_tokenizer(listed, fingerprint)
