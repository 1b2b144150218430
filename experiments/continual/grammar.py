"""Artificial languages: a seed is a lexicon, affixes and an order of words.

A language says what English sentences of a small grammar mean. It has a word of
its own for each noun, verb and adjective; plural and past are marked by a word
before or after; subject, object and verb come in one of four orders, adjectives
before or after their noun. A sentence is taught with its gloss, as linguists
write it: after every word what it means. So that a language can be learned from
glossed sentences alone, and only so.
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
  """What a sentence says."""

  subject: Phrase
  verb: int
  target: Phrase
  is_past: bool


@dataclasses.dataclass(frozen=True)
class Language:
  """How a language says it; its words are numbers."""

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
  """Draws sentences, of which each group of ten has every noun as subject."""

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
  """What the words of the sentence mean, in its order; indices of `ENGLISH`."""

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
  """A sentence, each word followed by what it means, int [SENTENCE]."""
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
  """Which tokens are of English, as a gloss is."""
  return (tokens >= _FIRST_ENGLISH) & (tokens < _FIRST_FOREIGN)


def to_text(tokens: np.ndarray) -> str:
  """What the tokens of English among others say, as text."""
  words = [ENGLISH[t - _FIRST_ENGLISH] for t in tokens if is_english(t)]
  return ' '.join(words)
