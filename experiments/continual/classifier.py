"""Texts as tokens, and a model that says their class.

An example is 16 tokens: words, a question mark, the class. The model reads two
things of it: the sum of what its words are embedded as, one vector for a text,
and then its class. So a text is at once what a level sees of it: where a mixer
had to gather the words, what came before got in with them. Nothing but classes
is predicted: where none comes next, logits are constants, which teach nothing.
"""

from collections.abc import Sequence
import dataclasses
import re
from typing import NamedTuple
import zlib

import jax.numpy as jnp
import numpy as np

from experiments.continual import reading
from nested_learning import models
from nested_learning import parameters
from nested_learning.layers import base
from nested_learning.layers import norm

EXAMPLE = 16  # tokens
_NEVER = -30.0  # logit of what is no class


class Words(NamedTuple):
  """How texts become tokens: classes first, two marks, then hashed words."""

  num_classes: int
  num_words: int  # places that words are hashed to

  @property
  def pad(self) -> int:
    """The mark of no word, and of a class that is not told."""
    return self.num_classes

  @property
  def question(self) -> int:
    """The mark that a class comes next."""
    return self.num_classes + 1

  @property
  def vocab_size(self) -> int:
    """Tokens that there are."""
    return self.num_classes + 2 + self.num_words

  def encode(self, texts: Sequence[str]) -> np.ndarray:
    """Examples [text, EXAMPLE] whose class is not told."""
    out = np.full((len(texts), EXAMPLE), self.pad, np.int32)
    out[:, -2] = self.question
    for row, text in zip(out, texts, strict=True):
      words = re.findall(r"[\w']+", text.lower())[: EXAMPLE - 2]
      ids = [zlib.crc32(word.encode()) % self.num_words for word in words]
      end = EXAMPLE - 2
      row[end - len(ids) : end] = [self.num_classes + 2 + i for i in ids]
    return out


@dataclasses.dataclass(frozen=True)
class ClassifierHead:
  """Reads one vector per text, and predicts nothing but its class."""

  words: Words

  predicts_tokens = True

  def make(self, config, trunk):
    """See `models.Head.make`."""
    words, width = self.words, config.embed_dim
    table = {
      'embedding': parameters.Param(
        (words.vocab_size, width),
        ('vocab', 'embed'),
        parameters.fan_in(width),
        decay=False,
      ),
      **trunk.table,
    }
    num_rest = words.vocab_size - words.num_classes
    constant = np.pad(
      np.zeros(words.num_classes), (0, num_rest), constant_values=_NEVER
    )

    def forward(params, state, tokens, *, reset=None, mask=None, write=True):
      batch = tokens.shape[0]
      examples = tokens.reshape(batch, -1, EXAMPLE)
      vectors = jnp.asarray(params['embedding'])[examples]
      is_word = examples[..., :-2, None] > words.question
      text = norm.l2_normalize(jnp.sum(vectors[..., :-2, :] * is_word, axis=-2))
      x = jnp.stack([text, vectors[..., -1, :]], axis=2)
      x = x.reshape(batch, -1, width)
      in_pairs = lambda marks: (
        None
        if marks is None
        else marks.reshape(batch, -1, EXAMPLE)[..., -2:].reshape(batch, -1)
      )
      marks = base.TokenInfo(in_pairs(reset), in_pairs(mask), write)
      x, state = trunk.apply(params, state, x * width**0.5, marks)
      names = params['embedding'][: words.num_classes]
      logits = jnp.pad(
        jnp.einsum('bne,ve->bnv', x[:, ::2], names),
        ((0, 0), (0, 0), (0, num_rest)),
        constant_values=_NEVER,
      )
      is_asked = jnp.arange(EXAMPLE)[:, None] == EXAMPLE - 2
      logits = jnp.where(is_asked, logits[:, :, None], constant)
      return logits.reshape(*tokens.shape, -1), state

    return table, forward


def make_classifier(
  config: reading.LearnerConfig, words: Words, level_names: Sequence[str]
) -> models.Model:
  """Makes a model that predicts nothing but classes.

  Args:
    config: Its sizes.
    words: Its tokens.
    level_names: Names of the levels of the chain, fastest first.

  Returns:
    A `models.Model`.
  """
  return models.make_model(
    reading.make_config(config, words.vocab_size, level_names),
    head=ClassifierHead(words),
  )


@dataclasses.dataclass(frozen=True)
class RowConfig:
  """What a row of training is: tasks in turn, and then all of them again."""

  num_tasks: int = 10
  classes: int = 6  # of a task
  examples: int = 36  # of a task
  review: int = 120  # examples of any of its classes, at the end


def make_row(
  words: Words, rng: np.random.Generator, config: RowConfig
) -> tuple[np.ndarray, np.ndarray]:
  """Examples of some invented classes, as one row, and their weights [t].

  Args:
    words: What tokens are.
    rng: Random numbers.
    config: How many of what.

  Returns:
    Tokens and weights; a class counts where it was seen before, and most in the
    review.
  """
  classes = config.num_tasks * config.classes
  names = rng.choice(words.num_classes, classes, replace=False)
  first, own = words.num_classes + 2, 5  # words of a class's own
  drawn = rng.permutation(words.num_words)[: own * classes + 30] + first
  common, pools = drawn[:30], drawn[30:].reshape(classes, -1)
  labels = (
    rng.integers(config.classes, size=(config.num_tasks, config.examples))
    + config.classes * np.arange(config.num_tasks)[:, None]
  )
  num_taught = labels.size
  review = rng.integers(classes, size=config.review)
  labels = np.concatenate([labels.ravel(), review])
  tokens = np.full((len(labels), EXAMPLE), words.pad)
  weights = np.zeros((len(labels), EXAMPLE))
  seen = set()
  for i, label in enumerate(labels):
    count = rng.integers(3, 9)
    is_own = rng.random(count) < 0.4
    is_own[rng.integers(count)] = True
    text = np.where(
      is_own, rng.choice(pools[label], count), rng.choice(common, count)
    )
    tokens[i, EXAMPLE - 2 - count : EXAMPLE - 2] = text
    tokens[i, -2:] = words.question, names[label]
    weights[i, -1] = 1.0 if i >= num_taught else 0.3
    if label not in seen:
      weights[i, -1] = 0.02
    seen.add(label)
  return tokens.ravel(), weights.ravel()
