"""Artificial languages: a seed gives a lexicon, affixes and a word order.

A language expresses the meanings of a small English grammar. It has a word of
its own for each noun, verb and adjective. Words before or after mark plural and
past. Subject, object and verb come in one of four orders, and adjectives before
or after their noun. Sentences are taught with a gloss, as linguists write it:
every word is followed by its meaning. A language can therefore be learned from
glossed sentences, and only from these.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

PAD = 0
_NOUNS = tuple('dog cat bird boat king farmer horse river stone tree'.split())
_VERBS = tuple('watch want follow call paint help'.split())
_ADJECTIVES = tuple('big old red quiet'.split())
_PLURAL, _PAST = '-s', '-ed'
ENGLISH = (*_NOUNS, *_VERBS, *_ADJECTIVES, _PLURAL, _PAST)
_ORDERS = ('SOV', 'SVO', 'VSO', 'OVS')
_NUM_FOREIGN = 64  # words of all languages
_FIRST_ENGLISH = 1
_FIRST_FOREIGN = _FIRST_ENGLISH + len(ENGLISH)
VOCAB_SIZE = _FIRST_FOREIGN + _NUM_FOREIGN
SENTENCE = 16  # tokens of a sentence with its gloss, padded in front


class Phrase(NamedTuple):
  """A noun with or without an adjective, indices of English words."""

  noun: int
  adjective: int | None
  is_plural: bool


class Meaning(NamedTuple):
  """The meaning of a sentence; indices of English words."""

  subject: Phrase
  verb: int
  target: Phrase
  is_past: bool


@dataclasses.dataclass(frozen=True)
class Language:
  """A language; its words are numbers."""

  words: tuple[int, ...]  # for each of `ENGLISH`
  is_suffix: tuple[bool, bool]  # the marks of plural and past
  order: str
  adjective_first: bool


def make_languages(rng: np.random.Generator, count: int) -> list[Language]:
  """Draws languages that have no word in common."""
  words = rng.permutation(_NUM_FOREIGN)[: count * len(ENGLISH)]
  return [
    Language(
      words=tuple(map(int, own)),
      is_suffix=tuple(bool(x) for x in rng.integers(2, size=2)),
      order=str(rng.choice(_ORDERS)),
      adjective_first=bool(rng.integers(2)),
    )
    for own in words.reshape(count, len(ENGLISH))
  ]


def make_meanings(rng: np.random.Generator, count: int) -> list[Meaning]:
  """Draws meanings; each group of ten has every noun as subject once."""

  def phrase(noun):
    adjective = None
    if rng.random() < 0.4:
      which = int(rng.integers(len(_ADJECTIVES)))
      adjective = len(_NOUNS) + len(_VERBS) + which
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


def gloss(language: Language, meaning: Meaning) -> list[int]:
  """Returns the gloss in the language's word order, as indices of `ENGLISH`."""

  def affix(word, mark, is_marked):
    if not is_marked:
      return [word]
    part = [ENGLISH.index(mark)]
    is_suffix = language.is_suffix[mark == _PAST]
    return [word, *part] if is_suffix else [*part, word]

  def phrase(part):
    noun = affix(part.noun, _PLURAL, part.is_plural)
    if part.adjective is None:
      return noun
    adjective = [part.adjective]
    return adjective + noun if language.adjective_first else noun + adjective

  parts = {
    'S': phrase(meaning.subject),
    'O': phrase(meaning.target),
    'V': affix(meaning.verb, _PAST, meaning.is_past),
  }
  return [word for role in language.order for word in parts[role]]


def sentence(language: Language, meaning: Meaning) -> np.ndarray:
  """Returns a sentence, each word followed by its gloss, int [SENTENCE]."""
  meant = gloss(language, meaning)
  tokens = [
    token
    for word in meant
    for token in (
      _FIRST_FOREIGN + language.words[word],
      _FIRST_ENGLISH + word,
    )
  ]
  return np.array([PAD] * (SENTENCE - len(tokens)) + tokens)


def is_english(tokens: np.ndarray) -> np.ndarray:
  """Returns which tokens are English."""
  return (tokens >= _FIRST_ENGLISH) & (tokens < _FIRST_FOREIGN)


def to_text(tokens: np.ndarray) -> str:
  """Returns the English tokens as text."""
  words = [ENGLISH[t - _FIRST_ENGLISH] for t in tokens if is_english(t)]
  return ' '.join(words)
