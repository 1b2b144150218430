"""Texts as tokens, and a model that predicts their class.

An example has 16 tokens: words, a question mark, the class. The model embeds it
as two vectors: the sum of its words, one vector for the text, and its class. A
level thus sees a text at once; a mixer that had to gather the words also let
earlier examples in. The model predicts only classes: at other places logits are
constant and teach nothing.
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
_NEVER = -30.0  # logit of tokens that are no class


class Words(NamedTuple):
  """The vocabulary: classes first, then two marks, then hashed words."""

  num_classes: int
  num_words: int  # number of places that words are hashed to

  @property
  def pad(self) -> int:
    """The token for no word, and for an unknown class."""
    return self.num_classes

  @property
  def question(self) -> int:
    """The token before a class."""
    return self.num_classes + 1

  @property
  def vocab_size(self) -> int:
    """Number of tokens."""
    return self.num_classes + 2 + self.num_words

  def encode(self, texts: Sequence[str]) -> np.ndarray:
    """Returns examples int [text, EXAMPLE] without their classes."""
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
  """A head that embeds a text as one vector, and predicts only classes."""

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
      examples = tokens.reshape(batch, -1, EXAMPLE)  # [b, n, EXAMPLE]
      vectors = jnp.asarray(params['embedding'])[examples]
      is_word = examples[..., :-2, None] > words.question
      # The sum of 14 words grows with their number: normalised, [b, n, e].
      text = norm.l2_normalize(jnp.sum(vectors[..., :-2, :] * is_word, axis=-2))
      # The trunk reads pairs: the text, and then its class.
      x = jnp.stack([text, vectors[..., -1, :]], axis=2)
      x = x.reshape(batch, -1, width)  # [b, 2 n, e]
      in_pairs = lambda marks: (
        None
        if marks is None
        else marks.reshape(batch, -1, EXAMPLE)[..., -2:].reshape(batch, -1)
      )
      marks = base.TokenInfo(in_pairs(reset), in_pairs(mask), write)
      # Embeddings have norm 1; the trunk expects entries of size 1.
      x, state = trunk.apply(params, state, x * width**0.5, marks)
      names = params['embedding'][: words.num_classes]
      logits = jnp.pad(
        jnp.einsum('bne,ve->bnv', x[:, ::2], names),
        ((0, 0), (0, 0), (0, num_rest)),
        constant_values=_NEVER,
      )
      # Only the token before the class predicts it, [b, n, EXAMPLE, v].
      is_asked = jnp.arange(EXAMPLE)[:, None] == EXAMPLE - 2
      logits = jnp.where(is_asked, logits[:, :, None], constant)
      return logits.reshape(*tokens.shape, -1), state

    return table, forward


def make_classifier(
  config: reading.LearnerConfig, words: Words, level_names: Sequence[str]
) -> models.Model:
  """Makes a model that predicts only classes.

  Args:
    config: Sizes of the model.
    words: The vocabulary.
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
  """A row of training: tasks in turn, and then a review of all of them."""

  num_tasks: int = 10
  classes: int = 6  # of a task
  examples: int = 36  # of a task
  review: int = 120  # examples of all classes, at the end


def make_row(
  words: Words, rng: np.random.Generator, config: RowConfig
) -> tuple[np.ndarray, np.ndarray]:
  """Makes a row of examples of invented classes.

  Args:
    words: The vocabulary.
    rng: Random numbers.
    config: Numbers of tasks, classes and examples.

  Returns:
    Tokens int [t] and weights [t] of their losses. A class counts if it was
    seen before in the row, and most in the review.
  """
  classes = config.num_tasks * config.classes
  names = rng.choice(words.num_classes, classes, replace=False)
  first, own = words.num_classes + 2, 5  # own: words of a class
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
