"""Splits of a corpus, mixtures of corpora, and rows cut out of either.

A stream is some documents in some order, end to end and around again. Rows of
a batch are slices of a stream, so a row is known by the position where it
begins.

A mixture is written '0.7*web/*.parquet + 0.3*code'. A weight is a source's
share of the tokens; the order of the documents keeps the shares from the first
token on, as closely as whole documents allow.
"""

from collections.abc import Sequence
import re
from typing import Any, NamedTuple

from absl import logging
import numpy as np

from nested_learning import errors
from nested_learning.data import corpus as corpus_lib

_TERM = re.compile(r'(\d+\.?\d*|\.\d+)\*(.+)', re.DOTALL)
# Repetitions of a source in one pass; more are taken for a mistake.
_MAX_REPEATS = 1000


class Split(NamedTuple):
  """Documents, or parts of them: int64 [n, 2], begin and end in the tokens."""

  train: np.ndarray
  validation: np.ndarray


class Stream(NamedTuple):
  """Documents in an order; position 0 follows the last one."""

  tokens: Any  # [tokens], those of the corpora
  starts: np.ndarray  # int64 [documents], of each document in `tokens`
  begins: np.ndarray  # int64 [documents], of each document in the stream
  length: int  # tokens of the stream
  vocab_size: int  # every token is below it
  folder: str  # where the tokens are, for errors


def split(corpora: Sequence[corpus_lib.Corpus], fraction: float) -> list[Split]:
  """Holds out a share of the documents of every corpus.

  Documents whose places are below `fraction` are held out, so that a document
  keeps its side when others come and go. Equal documents are on the same side,
  also of different corpora. A corpus with a single text is cut by position:
  its last `fraction` of tokens is held out. So with a fraction above 0, every
  corpus that has a token has one on both sides.

  Args:
    corpora: The corpora.
    fraction: Share to hold out, in [0, 1).

  Returns:
    The split of each corpus.
  """
  spans, places, contents = [], [], []
  for corpus in corpora:
    own = np.stack([corpus.starts[:-1], corpus.starts[1:]], axis=1)  # [n, 2]
    full = own[:, 1] > own[:, 0]
    spans.append(own[full])
    places.append(corpus.places[full])
    contents.append(corpus.contents[full])
  # Documents with the same content are one text, with the place of the first.
  _, first, which = np.unique(
    np.concatenate(contents), return_index=True, return_inverse=True
  )
  texts = np.split(which, np.cumsum([len(own) for own in spans])[:-1])
  held_out, is_cut = _choose(
    [np.unique(text) for text in texts], np.concatenate(places)[first], fraction
  )
  splits = []
  for own, text in zip(spans, texts, strict=True):
    lengths = own[:, 1] - own[:, 0]
    num_cut = np.rint(fraction * lengths).astype(np.int64)
    num_cut = np.clip(num_cut, 1, np.maximum(lengths - 1, 1))  # both sides
    num_out = np.where(held_out[text], lengths, 0)
    num_out = np.where(is_cut[text], num_cut, num_out)  # [n], the last tokens
    middle = own[:, 1] - num_out
    train = np.stack([own[:, 0], middle], axis=1)[num_out < lengths]
    validation = np.stack([middle, own[:, 1]], axis=1)[num_out > 0]
    splits.append(Split(train, validation))
  if is_cut.any():
    logging.log_first_n(
      logging.WARNING,
      'A source has a single text: its last %.3g%% of tokens are the '
      'validation split.',
      1,
      100 * fraction,
    )
  return splits


def _choose(
  texts: Sequence[np.ndarray], places: np.ndarray, fraction: float
) -> tuple[np.ndarray, np.ndarray]:
  """Decides which texts are held out whole, and which are cut.

  Args:
    texts: int [n] for each corpus, the different texts that it has.
    places: float [texts].
    fraction: Share to hold out.

  Returns:
    Two arrays bool [texts].
  """
  held_out, is_cut = places < fraction, np.zeros(len(places), bool)
  if not fraction:
    return held_out, is_cut
  for own in texts:
    if len(own) == 1:
      is_cut[own] = True
    elif len(own) and not held_out[own].any():
      held_out[own[places[own].argmin()]] = True
    elif len(own) and held_out[own].all():
      held_out[own[places[own].argmax()]] = False
  for own in texts:  # a text of two corpora may have changed sides above
    is_mixed = is_cut[own].any() or len(np.unique(held_out[own])) == 2
    if len(own) and not is_mixed:
      is_cut[own[places[own].argmin()]] = True
  return held_out, is_cut


def parse_mixture(source: str) -> dict[str, float]:
  """Returns the sources of a mixture and their weights, which add up to 1.

  Args:
    source: The config's `data.source`.

  Returns:
    From source to weight; one source with weight 1 if it is not a mixture.

  Raises:
    errors.UserError: It is a mixture in part, or a weight is 0.
  """
  terms = re.split(r'\s+\+\s+', source.strip())
  matches = [_TERM.fullmatch(term) for term in terms]
  if len(terms) < 2 or not any(matches):
    return {source: 1.0}
  weights: dict[str, float] = {}
  for term, match in zip(terms, matches, strict=True):
    weight = float(match[1]) if match else 0.0
    if not weight or match[2] in weights:
      raise errors.UserError(
        f'data.source={source!r}: {term!r} is not WEIGHT*SOURCE with a weight '
        "above 0 and a source of its own, as in '0.7*web.jsonl + 0.3*code'."
      )
    weights[match[2]] = weight
  total = sum(weights.values())
  return {name: weight / total for name, weight in weights.items()}


def make_order(
  lengths: list[np.ndarray], weights: Sequence[float], *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Orders the documents of several sources so that their shares hold.

  One pass reads the source once that lasts longest by its weight, and the
  others as often as it takes; they are shuffled anew every time around.

  Args:
    lengths: Tokens of each document, int [documents] for every source.
    weights: Share of the tokens of each source; they add up to 1.
    seed: Seed of the order.

  Returns:
    The source of each place, and which of its documents it is, both int [n].

  Raises:
    errors.UserError: A source would be repeated more than a thousand times.
  """
  totals = [int(own.sum()) for own in lengths]
  num_tokens = max(t / w for t, w in zip(totals, weights, strict=True))
  picked, keys = [], []
  for i, (own, total) in enumerate(zip(lengths, totals, strict=True)):
    repeats = int(np.ceil(num_tokens * weights[i] / total))
    if repeats > _MAX_REPEATS:
      raise errors.UserError(
        f'data.source: with a weight of {weights[i]:.3g} the {total} tokens of '
        f'source {i + 1} would be repeated {repeats} times in a pass over the '
        'others; lower its weight.'
      )
    rng = np.random.default_rng([seed, i])
    order = np.concatenate([rng.permutation(len(own)) for _ in range(repeats)])
    begins = np.cumsum(own[order]) - own[order]
    keep = begins < num_tokens * weights[i]
    picked.append(order[keep])
    keys.append(begins[keep] / weights[i])
  # The next document is always of the source that is most behind its share.
  merged = np.argsort(np.concatenate(keys), kind='stable')
  which = np.repeat(np.arange(len(picked)), [len(own) for own in picked])
  return which[merged], np.concatenate(picked)[merged]


def make_stream(
  corpora: Sequence[corpus_lib.Corpus],
  spans: Sequence[np.ndarray],
  weights: Sequence[float],
  *,
  seed: int | None,
) -> Stream:
  """Lays documents end to end.

  Args:
    corpora: The corpora.
    spans: The documents of each, or parts of them, as in `Split`.
    weights: Shares of the tokens, with a seed.
    seed: Seed of the order; None for every document once, in order.

  Returns:
    The stream.

  Raises:
    errors.UserError: A corpus has no token.
  """
  for number, own in enumerate(spans):
    if not len(own):
      raise errors.UserError(
        f'data.source: source {number + 1} of {len(spans)} has no token. Leave '
        'it out, or give more text.'
      )
  tokens, bases = corpus_lib.join_tokens(corpora)
  if seed is None:
    order = np.arange(sum(map(len, spans)))
  elif len(corpora) == 1:
    order = np.random.default_rng(seed).permutation(len(spans[0]))
  else:
    lengths = [own[:, 1] - own[:, 0] for own in spans]
    which, numbers = make_order(lengths, weights, seed=seed)
    order = np.cumsum([0, *map(len, spans)])[which] + numbers
  joined = [own + base for own, base in zip(spans, bases, strict=True)]
  joined = np.concatenate(joined)[order]
  lengths = joined[:, 1] - joined[:, 0]
  ends = np.cumsum(lengths)
  return Stream(
    tokens=tokens,
    starts=joined[:, 0],
    begins=ends - lengths,
    length=int(ends[-1]),
    vocab_size=corpora[0].vocab_size,
    folder=' or '.join(corpus.folder for corpus in corpora),
  )


def pack(
  stream: Stream, begins: np.ndarray, *, length: int
) -> dict[str, np.ndarray]:
  """Cuts rows out of a stream.

  Args:
    stream: A stream of at least one document.
    begins: int [b], position in the stream of each row's first token.
    length: Tokens per row, t.

  Returns:
    A dict of [b, t] arrays: `tokens` int32; `targets` int32, the next token of
    the stream, which after a document's last token is the document_id of the
    next; `reset` bool, True at the first token of each document; `document`
    int32, counted from 0 in each row.

  Raises:
    errors.UserError: A token is beyond the vocabulary.
  """
  positions = (begins[:, None] + np.arange(length + 1)) % stream.length
  documents = np.searchsorted(stream.begins, positions, side='right') - 1
  offsets = positions - stream.begins[documents]
  tokens = stream.tokens[stream.starts[documents] + offsets]  # [b, t + 1]
  if tokens.max() >= stream.vocab_size:
    raise errors.UserError(
      f'token {tokens.max()} is beyond the {stream.vocab_size} of the '
      f'tokenizer: the tokens in {stream.folder} are damaged. Delete that '
      'folder and make it again.'
    )
  tokens = tokens.astype(np.int32)
  reset = offsets[:, :-1] == 0
  return {
    'tokens': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'reset': reset,
    'document': np.cumsum(reset, axis=1, dtype=np.int32) - reset[:, :1],
  }
