"""RULER's needles in a haystack, as text in its exact prompts.

References:
  Hsieh et al., RULER, arXiv:2404.06654, 2024, section 3 and appendix B; its
    prompts and sizes are those of the benchmark's code.
"""

import bisect
from collections.abc import Iterator
import dataclasses
import itertools
from typing import Literal

import numpy as np

from nested_learning import errors
from nested_learning.data import tokenizers
from nested_learning.tasks import needles as needles_lib
from nested_learning.tasks import task
from nested_learning.tasks import words

_Kind = Literal['numbers', 'words', 'uuids']
_NEEDLE = 'One of the special magic {kind} for {key} is: {value}.'
_NOISE = (
  'The grass is green. The sky is blue. The sun is yellow. Here we go. There '
  'and back again.'
)
_PROMPT = (
  'Some special magic {kind} are hidden within the following text. Make sure '
  'to memorize it. I will quiz you about the {kind} afterwards.\n{context}\n'
)
_QUESTION = (
  'What are all the special magic {kind} for {query} mentioned in the provided '
  'text?'
)
_PREFIX = (
  ' The special magic {kind} for {query} mentioned in the provided text are'
)
_NUM_DEPTHS = 40  # places in an essay, equally far from each other


@dataclasses.dataclass(frozen=True)
class RulerConfig:
  """A needle task of RULER in text.

  A row is a document's mark, the prompt, the values that are asked for, a
  document's mark again, and padding; only values and mark are targets. The
  haystack is as long as the row allows. Essays come from `source`; every row
  has another part of them.
  """

  num_tokens: int = 4096  # of a row
  haystack: needles_lib.Haystack = 'noise'
  key_type: _Kind = 'words'
  value_type: _Kind = 'numbers'
  num_keys: int = 1
  num_values: int = 1  # needles of a key
  num_queries: int = 1  # keys that are asked for
  gap: int = 64  # tokens without needle before the question
  tokenizer: str = 'bytes'  # or the path of a .model or a .json
  source: str = 'stdlib'  # essays: 'stdlib', a folder, a file, or a glob

  def __post_init__(self):
    errors.check_choices(self)
    task.check_at_least(self, 1, 'num_tokens', 'num_values', 'num_queries')
    task.check_at_least(self, 0, 'gap')
    errors.check_field(
      self,
      'num_keys',
      self.num_queries <= self.num_keys <= _NUM_DEPTHS // self.num_values,
      f'at least num_queries={self.num_queries}, and at most '
      f'{_NUM_DEPTHS // self.num_values}, since there are {_NUM_DEPTHS} places '
      f'for num_values={self.num_values} needles of each',
    )

  @property
  def vocab_size(self) -> int:
    """Number of ids of the tokenizer."""
    return self.make_tokenizer().vocab_size

  @property
  def answer_tokens(self) -> int:
    """Room for the answer: twice its bytes."""
    length = {'numbers': 9, 'words': 20, 'uuids': 38}[self.value_type]
    return 2 * length * self.num_queries * self.num_values

  def make_tokenizer(self) -> tokenizers.Tokenizer:
    """Returns the tokenizer of the field."""
    return task.make_tokenizer(self.tokenizer)

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task.make_row`."""
    del evaluating
    keys = []
    while len(keys) < self.num_keys:
      key = words.draw_word(rng, self.key_type)
      keys += [key] if key not in keys else []
    values = [
      [words.draw_word(rng, self.value_type) for _ in range(self.num_values)]
      for _ in keys
    ]
    needles = [
      _NEEDLE.format(kind=self.value_type, key=key, value=value)
      for key, of_key in zip(keys, values, strict=True)
      for value in of_key
    ]
    needles = [needles[i] for i in rng.permutation(len(needles))]
    asked = rng.choice(self.num_keys, self.num_queries, replace=False)
    answers = tuple(value for key in asked for value in values[key])
    tokenizer = self.make_tokenizer()
    answer = tokenizer.encode(' ' + ', '.join(answers) + '.')
    question = self._singular(_QUESTION + _PREFIX).format(
      kind=self._kind, query=_listed([keys[key] for key in asked])
    )
    places = rng.random(len(needles))
    if self.haystack == 'essay':
      places = rng.permutation(_NUM_DEPTHS)[: len(needles)] / (_NUM_DEPTHS - 1)
    hay = self._draw_hay(rng, keys)

    def prompt(num_hay):
      context = self._hide(hay[:num_hay], needles, np.sort(places))
      intro = self._singular(_PROMPT).format(kind=self._kind, context=context)
      return tokenizer.encode(intro + question)

    room = self.num_tokens - 1 - len(answer)
    least = self._num_free(hay)
    if len(prompt(least)) > room:
      needed = len(prompt(least)) + 1 + len(answer)
      raise errors.UserError(
        f'num_tokens={self.num_tokens} has no room for the '
        f'{len(needles)} needles, gap={self.gap} and the question; raise it to '
        f'at least {needed} or so.'
      )
    more = bisect.bisect_right(
      range(least, len(hay) + 1), room, key=lambda n: len(prompt(n))
    )
    row = task.text_row(
      tokenizer, prompt(least + more - 1), answer, self.num_tokens
    )
    return row._replace(references=answers, question=question)

  def score(self, output, row):
    """Returns the share of references in the output (string_match_all)."""
    return words.string_match_all(output, row.references)

  def stretched(self, factor):
    """Returns the task with more hay and the same needles."""
    return dataclasses.replace(self, num_tokens=factor * self.num_tokens)

  @property
  def _kind(self) -> str:
    """The word for the values; singular if one is asked for."""
    one = self.num_queries * self.num_values == 1
    return self.value_type[:-1] if one else self.value_type

  def _singular(self, template: str) -> str:
    if self.num_queries * self.num_values > 1:
      return template
    for many, one in (('Some', 'A'), ('are all', 'is'), ('are', 'is')):
      template = template.replace(many, one)
    return template

  def _draw_hay(self, rng, keys) -> list[str]:
    """Draws sentences or lines, more than the row has room for."""
    # Usual tokenizers make at least one token of eight bytes of text.
    num_bytes = self.num_tokens * (1 if self.tokenizer == 'bytes' else 8)
    hay, length = [], 0
    for unit in self._units(rng, keys):
      if length > num_bytes:
        return hay
      hay.append(unit)
      length += len(unit)

  def _units(self, rng, keys) -> Iterator[str]:
    """Yields hay without end."""
    if self.haystack == 'noise':
      yield from itertools.repeat(_NOISE)
    if self.haystack == 'essay':
      sentences = words.load_sentences(self.source)
      begin = rng.integers(len(sentences))
      for number in itertools.count(begin):
        yield sentences[number % len(sentences)]
    while True:
      key = words.draw_word(rng, self.key_type)
      if key not in keys:
        value = words.draw_word(rng, self.value_type)
        yield _NEEDLE.format(kind=self.value_type, key=key, value=value)

  def _num_free(self, hay) -> int:
    """Returns how many units of hay after the last needle fill the gap."""
    lengths = [len(self.make_tokenizer().encode(u)) for u in hay]
    return int(np.searchsorted(np.cumsum(lengths), self.gap)) + 1

  def _hide(self, hay, needles, places) -> str:
    """Puts needles at sorted places of the hay before the gap."""
    num_places = len(hay) - self._num_free(hay) + 1
    places = np.minimum((places * num_places).astype(int), num_places - 1)
    units = list(hay)
    for place, needle in zip(places[::-1], needles, strict=True):
      units.insert(place, needle)
    return (' ' if self.haystack == 'essay' else '\n').join(units)


def _listed(keys: list[str]) -> str:
  """Returns the keys as in 'a, b, and c'."""
  if len(keys) == 1:
    return keys[0]
  return ', '.join(keys[:-1]) + ', and ' + keys[-1]
