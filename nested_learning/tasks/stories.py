"""Stories of people and things, scattered in a long text, and a question.

The sentences are those of bAbI's tasks 1 to 3, the long text that of BABILong;
all of it is generated.

References:
  Weston et al., Towards AI-Complete Question Answering, arXiv:1502.05698, 2015
    (the stories).
  Kuratov et al., BABILong, arXiv:2406.10149, 2024 (the long text, the scoring).
"""

from collections.abc import Iterator
import dataclasses
import functools
import itertools
from typing import Literal, NamedTuple

import numpy as np

from nested_learning import errors
from nested_learning.data import tokenizers
from nested_learning.tasks import task
from nested_learning.tasks import words

PEOPLE = ('Mary', 'John', 'Sandra', 'Daniel')
PLACES = ('bathroom', 'bedroom', 'garden', 'hallway', 'kitchen', 'office')
THINGS = ('apple', 'football', 'milk')
_GO = ('moved to', 'went to', 'went back to', 'journeyed to', 'travelled to')
_TAKE = ('took', 'grabbed', 'picked up', 'got')
_DROP = ('dropped', 'discarded', 'put down', 'left')


@dataclasses.dataclass(frozen=True)
class StoryConfig:
  """Facts in a long text, and a question that they answer with one word.

  'qa1' asks where somebody is, 'qa2' where a thing is, 'qa3' where it was
  before. With vocabulary='bytes' the other sentences come from `source`; with
  'words' every word is a token and they are random words of their own.
  """

  # The answer needs 1, 2 or 3 facts.
  question: Literal['qa1', 'qa2', 'qa3'] = 'qa1'
  num_tokens: int = 256  # of a row
  num_facts: int = 6
  vocabulary: Literal['words', 'bytes'] = 'words'
  gap: int = 64  # tokens without fact before the question
  # Other sentences, in bytes: 'stdlib', a folder, a file, or a glob.
  source: str = 'stdlib'

  def __post_init__(self):
    errors.check_choices(self)
    task.check_at_least(self, 0, 'gap')
    least = {'qa1': 1, 'qa2': 2, 'qa3': 3}[self.question]
    errors.check_field(
      self,
      'num_facts',
      self.num_facts >= least,
      f'at least {least}, which the answer to {self.question} needs',
    )
    # The longest fact or question has at most 8 words, or 50 letters.
    longest = 8 if self.vocabulary == 'words' else 50
    needed = (self.num_facts + 2) * longest + self.gap
    errors.check_field(
      self,
      'num_tokens',
      self.num_tokens >= needed,
      f'at least {needed}: num_facts={self.num_facts}, gap={self.gap}, the '
      'question and the answer',
    )

  @property
  def vocab_size(self) -> int:
    """Number of ids of the tokenizer."""
    return self.make_tokenizer().vocab_size

  @property
  def answer_tokens(self) -> int:
    """Room for a sentence."""
    return 4 if self.vocabulary == 'words' else 32

  def make_tokenizer(self) -> tokenizers.Tokenizer:
    """Returns a tokenizer of bytes, or of the words of stories and filler."""
    if self.vocabulary == 'bytes':
      return task.make_tokenizer('bytes')
    return _make_word_tokenizer()

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task.make_row`."""
    del evaluating
    story = _make_story(rng, self.question, self.num_facts)
    tokenizer = self.make_tokenizer()
    encode = lambda text: tokenizer.encode(' ' + text)
    facts = [encode(fact) for fact in story.facts]
    question, answer = encode(story.question), encode(story.answer)
    room = self.num_tokens - 1 - len(question) - len(answer)
    room -= sum(len(fact) for fact in facts)
    units, filler = [], self._filler(rng)
    while room > 0:  # the last sentence is cut
      units.append(encode(next(filler))[:room])
      room -= len(units[-1])
    lengths = np.cumsum([len(unit) for unit in units[::-1]])
    num_free = int(np.searchsorted(lengths, self.gap)) + 1 if self.gap else 0
    places = rng.integers(len(units) - num_free + 1, size=len(facts))
    for place, fact in zip(np.sort(places)[::-1], facts[::-1], strict=True):
      units.insert(place, fact)
    row = task.text_row(
      tokenizer, np.concatenate([*units, question]), answer, self.num_tokens
    )
    return row._replace(references=(story.answer,), question=story.question)

  def _filler(self, rng) -> Iterator[str]:
    """Yields sentences that are not facts, without end."""
    if self.vocabulary == 'bytes':
      sentences = words.load_sentences(self.source)
      for number in itertools.count(rng.integers(len(sentences))):
        yield sentences[number % len(sentences)]
    while True:
      yield words.draw_filler(rng)

  def score(self, output, row):
    """Returns whether the first sentence names only the right place."""
    return words.names_only(
      output, row.references[0], question=row.question, labels=PLACES
    )

  def stretched(self, factor):
    """Returns the task with more other sentences and as many facts."""
    return dataclasses.replace(self, num_tokens=factor * self.num_tokens)


class _Story(NamedTuple):
  facts: list[str]
  question: str
  answer: str


def _make_story(rng, kind: str, num_facts: int) -> _Story:
  """Draws a story that has an answer."""
  while True:
    facts, at, been = _act(rng, kind, num_facts)
    asked = {
      'qa1': [name for name in PEOPLE if name in at],
      'qa2': [name for name in THINGS if name in been],
      # It was at its last place only once, so that "before" has one meaning.
      'qa3': [
        name
        for name, places in been.items()
        if len(places) > 1 and places[-1] not in places[:-1]
      ],
    }[kind]
    if not asked:
      continue
    name = asked[rng.integers(len(asked))]
    if kind == 'qa1':
      return _Story(facts, f'Where is {name}?', at[name])
    places = been[name]
    if kind == 'qa2':
      return _Story(facts, f'Where is the {name}?', places[-1])
    text = f'Where was the {name} before the {places[-1]}?'
    return _Story(facts, text, places[-2])


def _act(rng, kind: str, num_facts: int):
  """Draws facts; also returns where people are and things have been."""
  pick = lambda options: options[rng.integers(len(options))]
  facts, at, holds = [], {}, {}
  been: dict[str, list[str]] = {}
  while len(facts) < num_facts:
    name, action = (
      pick(PEOPLE),
      'go' if kind == 'qa1' else pick(('go', 'go', 'take', 'drop')),
    )
    if action == 'go':
      place = pick([place for place in PLACES if place != at.get(name)])
      facts.append(f'{name} {pick(_GO)} the {place}.')
      at[name] = place
      for thing, holder in holds.items():
        if holder == name:
          been[thing].append(place)
      continue
    if action == 'take':
      here = [
        thing
        for thing in THINGS
        if name in at
        and thing not in holds
        and been.get(thing, [at[name]])[-1] == at[name]
      ]
    else:
      here = [thing for thing, holder in holds.items() if holder == name]
    if not here:
      continue
    thing = pick(here)
    if action == 'take':
      holds[thing] = name
      been.setdefault(thing, [at[name]])
    else:
      del holds[thing]
    verb = pick(_TAKE if action == 'take' else _DROP)
    facts.append(f'{name} {verb} the {thing} there.')
  return facts, at, been


@functools.cache
def _make_word_tokenizer() -> tokenizers.Tokenizer:
  """Returns a tokenizer of the words of stories and filler."""
  said = ' '.join(
    [*PEOPLE, *PLACES, *THINGS, *_GO, *_TAKE, *_DROP]
    + ['the there Where is was before . ?']
  )
  listed = sorted(set(said.split()))
  listed += words.FILLER
  return words.make_tokenizer(listed, f'stories {len(words.FILLER)}')
