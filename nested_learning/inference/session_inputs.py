"""What a session is fed: checked whole before anything is read."""

from typing import Any, NamedTuple

import numpy as np

from nested_learning import errors


class Inputs(NamedTuple):
  """Tokens of a call and what is marked on them, all [b, t].

  Attributes:
    tokens: int32.
    reset: bool, True at a document's first token.
    mask: bool, False for padding.
  """

  tokens: np.ndarray
  reset: np.ndarray
  mask: np.ndarray


def check(
  tokens: Any, reset: Any, mask: Any, *, num_rows: int, vocab_size: int
) -> Inputs:
  """Tokens and marks as arrays.

  Args:
    tokens: int [b, t], or [t] for one row.
    reset: bool like tokens, or None.
    mask: bool like tokens, or None.
    num_rows: Rows of the session, b.
    vocab_size: Tokens that the model has.

  Returns:
    `Inputs`.

  Raises:
    errors.UserError: There are no tokens, or some that the model does not have,
      or arrays do not fit.
  """
  add_row = lambda x: x[None] if np.ndim(x) == 1 else x
  tokens = add_row(_array('tokens', tokens))
  if tokens.ndim != 2 or len(tokens) != num_rows:
    raise errors.UserError(
      f'tokens have shape {tokens.shape}; this session has {num_rows} rows, '
      'and takes tokens [rows, tokens].'
    )

  def mark(name, x, default):
    if x is None:
      return np.full(tokens.shape, default)
    x = add_row(_array(name, x).astype(bool))
    try:
      return np.broadcast_to(x, tokens.shape)
    except ValueError as error:
      raise errors.UserError(
        f'{name} has shape {x.shape}, and the tokens have {tokens.shape}; mark '
        'every token.'
      ) from error

  reset, mask = mark('reset', reset, False), mark('mask', mask, True)
  if not mask.any():
    raise errors.UserError('there is nothing to read; give some tokens.')
  if not np.issubdtype(tokens.dtype, np.integer):
    raise errors.UserError(f'tokens are {tokens.dtype}; give whole numbers.')
  wrong = tokens[mask & ((tokens < 0) | (tokens >= vocab_size))]
  if wrong.size:
    raise errors.UserError(
      f'token {wrong[0]} is not among the {vocab_size} of the model; use the '
      'tokenizer that the model was trained with.'
    )
  return Inputs(tokens.astype(np.int32), reset, mask)


def _array(name, x):
  try:
    return np.asarray(x)
  except ValueError as error:
    raise errors.UserError(
      f'{name} are rows of different lengths; pad them, and mask the padding.'
    ) from error
