"""Artificial languages: a seed is a lexicon, affixes and an order of words.

A language says what English sentences of a small grammar mean. Its words are of
two syllables, which all languages share; plural, past and object are marked by
a syllable before or after the word; subject, object and verb come in one of
four orders, and adjectives before or after their noun. So that a language can
be learned from pairs of sentences alone, and only so.
"""

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np

PAD, TO_ENGLISH, END = range(3)
_NOUNS = tuple('dog cat bird boat king farmer horse river stone tree'.split())
_VERBS = tuple('watch want follow call paint help'.split())
_ADJECTIVES = tuple('big old red quiet'.split())
_PLURAL, _PAST = '-s', '-ed'
ENGLISH = (*_NOUNS, *_VERBS, *_ADJECTIVES, _PLURAL, _PAST)
_ORDERS = ('SOV', 'SVO', 'VSO', 'OVS')
_SYLLABLES = tuple(c + v for c, v in itertools.product('bdgklmnprst', 'aiu'))[
  :24
]
_FIRST_ENGLISH = 3
_FIRST_SYLLABLE = _FIRST_ENGLISH + len(ENGLISH)
VOCAB_SIZE = _FIRST_SYLLABLE + len(_SYLLABLES)
PAIR = 24  # tokens of a sentence, its translation and the marks, padded
MAX_ENGLISH = 9  # tokens of a translation with the mark of its end


class Phrase(NamedTuple):
  """A noun with or without an adjective, indices of English words."""

  noun: int
  adjective: int | None
  is_plural: bool


class Meaning(NamedTuple):
  """What a sentence says."""

  subject: Phrase
  verb: int
  target: Phrase
  is_past: bool


@dataclasses.dataclass(frozen=True)
class Language:
  """How a language says it; syllables are numbers."""

  words: tuple[tuple[int, int], ...]  # of nouns, verbs, adjectives
  affixes: tuple[int, int, int]  # of plural, past and object
  is_suffix: tuple[bool, bool, bool]
  order: str
  adjective_first: bool


def make_language(rng: np.random.Generator) -> Language:
  """Draws a language whose words all differ."""
  count = len(_NOUNS) + len(_VERBS) + len(_ADJECTIVES)
  num = len(_SYLLABLES)
  affixes = rng.choice(num, 3, replace=False)
  words = rng.choice(num * num, count, replace=False)
  return Language(
    words=tuple(divmod(int(word), num) for word in words),
    affixes=tuple(map(int, affixes)),
    is_suffix=tuple(bool(x) for x in rng.integers(2, size=3)),
    order=str(rng.choice(_ORDERS)),
    adjective_first=bool(rng.integers(2)),
  )


def make_meanings(rng: np.random.Generator, count: int) -> list[Meaning]:
  """Draws sentences, of which each group of ten has every noun as subject."""

  def phrase(noun):
    adjective = None
    if rng.random() < 0.4:
      adjective = len(_NOUNS) + len(_VERBS) + int(rng.integers(4))
    return Phrase(int(noun), adjective, bool(rng.random() < 0.3))

  nouns = np.concatenate(
    [rng.permutation(len(_NOUNS)) for _ in range(-(-count // len(_NOUNS)))]
  )
  meanings = []
  for i in range(count):
    verb = len(_NOUNS) + int(rng.integers(len(_VERBS)))
    subject, target = phrase(nouns[i]), phrase(rng.integers(len(_NOUNS)))
    meanings.append(Meaning(subject, verb, target, bool(rng.random() < 0.4)))
  return meanings


def to_english(meaning: Meaning) -> list[int]:
  """The English sentence as tokens, with the mark of its end."""
  first = _FIRST_ENGLISH
  plural, past = (first + ENGLISH.index(x) for x in (_PLURAL, _PAST))

  def phrase(part):
    before = [] if part.adjective is None else [first + part.adjective]
    return [*before, first + part.noun, *([plural] if part.is_plural else [])]

  verb = [first + meaning.verb, *([past] if meaning.is_past else [])]
  return [*phrase(meaning.subject), *verb, *phrase(meaning.target), END]


def say(language: Language, meaning: Meaning) -> list[int]:
  """The sentence in a language, as tokens."""

  def affix(word, which):
    mark = [language.affixes[which]]
    return word + mark if language.is_suffix[which] else mark + word

  def phrase(part, is_object):
    noun = list(language.words[part.noun])
    if part.is_plural:
      noun = affix(noun, 0)
    if is_object:
      noun = affix(noun, 2)
    if part.adjective is None:
      return noun
    adjective = list(language.words[part.adjective])
    return adjective + noun if language.adjective_first else noun + adjective

  verb = list(language.words[meaning.verb])
  parts = {
    'S': phrase(meaning.subject, False),
    'O': phrase(meaning.target, True),
    'V': affix(verb, 1) if meaning.is_past else verb,
  }
  return [_FIRST_SYLLABLE + x for role in language.order for x in parts[role]]


def pair(language: Language, meaning: Meaning) -> tuple[np.ndarray, int]:
  """A sentence, its translation and padding, int [PAIR].

  Returns:
    The tokens, and the place of the first token of the translation.
  """
  foreign = [*say(language, meaning), TO_ENGLISH]
  tokens = [*foreign, *to_english(meaning)]
  return np.array(tokens + [PAD] * (PAIR - len(tokens))), len(foreign)


def is_english(tokens: np.ndarray) -> np.ndarray:
  """Which tokens a translation may have: words and the mark of its end."""
  return (tokens == END) | (
    (tokens >= _FIRST_ENGLISH) & (tokens < _FIRST_SYLLABLE)
  )


def to_text(tokens) -> str:
  """English tokens up to the end, as text; what is no English is a '?'."""
  text = ''
  for token in tokens:
    if token == END:
      break
    index = int(token) - _FIRST_ENGLISH
    word = ENGLISH[index] if 0 <= index < len(ENGLISH) else '?'
    text += word[1:] if word in (_PLURAL, _PAST) else ' ' + word
  return text.strip()
