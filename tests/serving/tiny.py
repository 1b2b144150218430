"""A session on a tiny model, and engines that serve it."""

import functools

import jax
import numpy as np

from nested_learning import data
from nested_learning import inference
from nested_learning import layers
from nested_learning import levels
from nested_learning import models
from nested_learning import serving
from tests import compiling

VOCAB = 257  # bytes, and a token between documents
SEGMENT = 4


@functools.cache
def base(window: int | None = 6, max_length: int = 32) -> inference.Session:
  """Returns a session without tokens; its programs are compiled once.

  Args:
    window: Of attention; None for attention to all of max_length tokens.
    max_length: Tokens of a call, and of such a state.
  """
  config = models.ModelConfig(
    vocab_size=VOCAB + 3,  # a few more than the tokenizer has
    num_layers=1,
    embed_dim=8,
    mixer=layers.AttentionConfig(2, 2, head_dim=4, window=window),
    levels=(
      models.LevelConfig('fast', mlp_dim=6),
      models.LevelConfig('slow', mlp_dim=6),
    ),
    max_length=max_length,
  )
  with compiling.quickly():
    model = models.make_model(config)
    params = jax.jit(model.init_params)(jax.random.key(0))
    params = jax.tree.map(lambda x: 2 * x, params)
    inner = levels.make_inner((SEGMENT, 2 * SEGMENT), learning_rate=(0.1, 0.1))
    return inference.Session(
      model, params, inner, tokenizer_fingerprint='bytes'
    )


def make_engine(
  session: inference.Session | None = None, **limits: int
) -> serving.Engine:
  """Makes an engine on `base()` or another session."""
  session = base() if session is None else session
  return serving.Engine(session, serving.Limits(**limits), vocab_size=VOCAB)


def make_checkpoint(**changes) -> serving.Checkpoint:
  """Makes the checkpoint of `base()`, with bytes as tokens."""
  tokenizer = data.make_tokenizer('bytes')
  checkpoint = serving.Checkpoint(
    'tiny', base(), tokenizer, stop_tokens=(tokenizer.document_id,)
  )
  return checkpoint._replace(**changes)


def make_service(folder, render_chat=None, **limits) -> serving.Service:
  """Makes a service on `base()` with its sessions in a folder."""
  changes = {} if render_chat is None else {'render_chat': render_chat}
  return serving.Service(
    make_checkpoint(**changes), folder, serving.Limits(**limits)
  )


def draw_tokens(num_tokens: int, seed: int = 0) -> np.ndarray:
  """Draws random tokens."""
  rng = np.random.default_rng(seed)
  return rng.integers(VOCAB, size=num_tokens).astype(np.int32)


def assert_equal(one, two) -> None:
  """Asserts that two snapshots are equal, bit for bit."""
  jax.tree.map(np.testing.assert_array_equal, one, two)


def assert_close(one, two) -> None:
  """Asserts that two snapshots are equal but for rounding.

  Levels that learn carry the rounding of an array's large entries to its small
  ones, so that the bound is a share of the largest.
  """

  def near(x, y):
    largest = np.max(np.abs(y), initial=1.0)
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * largest)

  jax.tree.map(near, one, two)
