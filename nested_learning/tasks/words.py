"""Parts of tasks in text: words, sentences of text files, and scores.

References:
  Hsieh et al., RULER, arXiv:2404.06654, 2024 (string_match_all).
  Kuratov et al., BABILong, arXiv:2406.10149, 2024 (the one label named).
"""

import ast
from collections.abc import Sequence
import functools
import re
import uuid

import numpy as np

from nested_learning import errors
from nested_learning.data import sources
from nested_learning.data import tokenizers

ADJECTIVES = tuple(
  'able amber ample ancient bitter blue bold brave brief bright brisk broad '
  'calm careful cheap chilly clean clever cloudy coarse cold crisp curly damp '
  'dark deep dim distant dry dull eager early easy empty even faint fair false '
  'famous fancy fast fierce fine firm flat fond fresh full gentle giant glad '
  'golden grand grave gray green grim happy harsh hasty heavy hidden hollow '
  'honest humble icy idle inner jolly keen kind large late lazy lean light '
  'little lively lonely long loose loud loyal lucky mellow mild modest narrow '
  'neat noble odd old open pale patient plain polite proud pure quick quiet '
  'rapid rare raw red rich ripe rough round royal rusty sad salty sharp shiny '
  'short shy silent silver simple sleepy slim slow smart smooth soft solid '
  'sour spare stable steady steep stiff strange strict strong sudden sunny '
  'sweet swift tall tame tender thick thin tidy tiny tired tough true vague '
  'vast violet vivid warm weak weary wet white whole wide wild wise wooden '
  'yellow young'.split()
)
NOUNS = tuple(
  'acorn anchor apple arrow badge badger ball barrel basin basket beach bean '
  'bell bench berry bird blanket boat bottle bowl branch bread brick bridge '
  'broom brush bucket button cabin cable cake camel candle canoe canvas '
  'carpet carrot castle cave chain chair chalk cherry chest circle clock '
  'cloud coast coat coin comb copper coral corner cotton crane crow crown cup '
  'curtain dagger daisy deer desk dish donkey door dove dragon drawer drum '
  'duck eagle engine fabric falcon farm feather fence fern field finch flag '
  'flame flask flower flute forest fork fountain fox frog garden gate glass '
  'glove goat grape hammer harbor harp hawk hedge helmet heron hill hook horn '
  'horse house island ivory jacket jar jungle kettle key kite ladder lake '
  'lamp lantern leaf lemon lens lily lion lizard lock magnet maple marble '
  'mask meadow melon mirror monkey moon moose moss mountain needle nest '
  'nickel oak ocean olive onion orange orchid otter owl paddle palace panda '
  'paper peach pearl pebble pencil pepper piano pillow pine pipe plum pocket '
  'pond pony pumpkin quilt rabbit raft raven ribbon ring river robin rocket '
  'root rope rose saddle sail salmon scarf seal shell shield ship shovel silk '
  'sleeve spider spoon squirrel star statue stone stool stove sugar swan '
  'table tent thorn thread tiger toad torch tower train tree trumpet tulip '
  'tunnel turtle valley vase velvet village violin wagon wall walnut wave '
  'well whale wheel whistle willow window wolf wool wren'.split()
)
FILLER = tuple(f'w{i}' for i in range(64))  # words of other sentences
_MAX_CHARACTERS = 400_000  # read of a source of sentences


def draw_word(rng: np.random.Generator, kind: str) -> str:
  """Draws a value or key of a needle.

  Args:
    rng: The random generator.
    kind: 'numbers' (seven digits), 'words' (adjective-noun) or 'uuids'.

  Returns:
    The text.
  """
  if kind == 'numbers':
    return str(rng.integers(10**6, 10**7))
  if kind == 'words':
    adjective = ADJECTIVES[rng.integers(len(ADJECTIVES))]
    return f'{adjective}-{NOUNS[rng.integers(len(NOUNS))]}'
  return str(uuid.UUID(bytes=rng.bytes(16)))


def draw_filler(rng: np.random.Generator) -> str:
  """Draws a sentence of 4 to 8 words of `FILLER`."""
  drawn = rng.integers(len(FILLER), size=rng.integers(4, 9))
  return ' '.join(FILLER[i] for i in drawn) + '.'


def make_tokenizer(
  listed: Sequence[str], fingerprint: str
) -> tokenizers.Tokenizer:
  """Makes a tokenizer of whole words; 0 stands before each document.

  Args:
    listed: Words and punctuation marks, the tokens from 1. White space is not
      a token.
    fingerprint: The fingerprint of the tokenizer.

  Returns:
    The tokenizer. Decoding puts a space between any two words.
  """
  listed = ['', *listed]
  number = {word: i for i, word in enumerate(listed)}

  def encode(text):
    found = re.findall(r'\w+|[^\w\s]', text)
    return np.array([number[word] for word in found], np.int32)

  def decode(ids):
    return ' '.join(listed[i] for i in np.asarray(ids) if i)

  byte_lengths = np.array([len(word) for word in listed], np.int32)
  return tokenizers.Tokenizer(
    len(listed), 0, byte_lengths, fingerprint, encode, decode
  )


@functools.cache
def load_sentences(source: str) -> tuple[str, ...]:
  """Reads the sentences of a source, with single spaces.

  Args:
    source: 'stdlib', the prose of the docstrings of the Python standard
      library; or a folder, a file or a glob pattern of text files.

  Returns:
    Its sentences in order, as many as there are in about 400,000 characters.

  Raises:
    errors.UserError: The source cannot be used.
  """
  sentences, length = [], 0
  for file in sources.find_files(source):
    text = sources.read_text(file.path)
    if source == 'stdlib':
      text = '\n\n'.join(_docstrings(text))
    for part in _split(text):
      sentences.append(part)
      length += len(part)
    if length > _MAX_CHARACTERS:
      break
  if len(sentences) < 2:
    raise errors.UserError(
      f'source={source!r} has no sentences to make a text of; give a '
      "folder of text files, or 'stdlib'."
    )
  return tuple(sentences)


def _docstrings(code):
  """Yields paragraphs of prose from the docstrings of a module."""
  kinds = ast.Module | ast.ClassDef | ast.FunctionDef
  for node in ast.walk(ast.parse(code)):
    if isinstance(node, kinds) and (text := ast.get_docstring(node)):
      # Keep paragraphs of words; skip tables and examples.
      for paragraph in text.split('\n\n'):
        words = paragraph.split()
        plain = sum(word.strip('.,;:()\'"').isalpha() for word in words)
        if (
          len(words) > 5 and plain > 0.9 * len(words) and '>>>' not in paragraph
        ):
          yield paragraph


def _split(text):
  """Yields sentences: up to a full stop and a space before a capital."""
  for paragraph in re.split(r'\n\s*\n', text):
    flat = ' '.join(paragraph.split())
    for sentence in re.split(r'(?<=[.!?]) (?=[A-Z"\'(])', flat):
      if sentence:
        yield sentence


def string_match_all(output: str, references: Sequence[str]) -> float:
  """Returns the share of references that the output contains, in any case."""
  output = output.lower()
  return sum(r.lower() in output for r in references) / len(references)


def names_only(
  output: str, reference: str, *, question: str, labels: Sequence[str]
) -> float:
  """Returns whether the first sentence of an output names only one label.

  Args:
    output: The model's answer.
    reference: The right label.
    question: The question; labels in it are ignored in the output.
    labels: Every label of the task.

  Returns:
    1.0 or 0.0.
  """
  first = re.split(r'[.\n]', output.strip(), maxsplit=1)[0]
  others = set(labels) - _lower_words(question)
  named = _lower_words(first) & others
  return float(named == {reference})


def _lower_words(text: str) -> set[str]:
  return set(re.findall(r'[a-z]+', text.lower()))
