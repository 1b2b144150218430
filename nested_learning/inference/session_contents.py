"""What of a session is in its file, and whether a file is of a session."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import configs
from nested_learning import errors
from nested_learning import models
from nested_learning import parameters
from nested_learning.inference import session_files

_FORMAT = 'nested_learning session'


def pack(header: dict[str, Any], clocks: Any, state: Any):
  """The content of a session's file.

  Args:
    header: What says which session it is, JSON-able.
    clocks: From name to int64 [b].
    state: A `session_programs.SessionState`.

  Returns:
    A `session_files.Content`.
  """
  arrays = dict(clocks)
  for name, x in _leaves(state):
    arrays[f'state/{name}'] = np.asarray(x)
  return session_files.Content({'format': _FORMAT, **header}, arrays)


def read(path: str | pathlib.Path, *, tokens_are: str) -> session_files.Content:
  """Reads a file, if it is of a session on these tokens.

  Args:
    path: The file.
    tokens_are: Fingerprint of what the tokens stand for.

  Returns:
    What it holds.

  Raises:
    errors.UserError: It is damaged, of another version, or of something else.
  """
  content = session_files.read(path)
  header = content.header
  if header.get('format') != _FORMAT:
    raise errors.UserError(f'{path} is no session; give another path.')
  if header['tokens_are'] != tokens_are:
    raise errors.UserError(
      f'the session {path} was fed other tokens (fingerprint '
      f'{header["tokens_are"]!r}) than these ({tokens_are!r}); use the '
      'tokenizer that it was begun with, or another path.'
    )
  return content


def unpack(path: str | pathlib.Path, content, like: Any) -> Any:
  """The state in a file.

  Args:
    path: The file, for the words of an error.
    content: What it holds.
    like: A state of the same session at its beginning.

  Returns:
    A tree like `like`.

  Raises:
    errors.UserError: Something is missing or of another shape.
  """
  restored = []
  for name, x in _leaves(like):
    found = content.arrays.get(f'state/{name}')
    if found is None or (found.shape, found.dtype) != (x.shape, x.dtype):
      got = 'nothing' if found is None else f'{found.dtype}{found.shape}'
      raise errors.UserError(
        f'the session {path} has {got} for {name}, and this model has '
        f'{x.dtype}{x.shape}; use the model that it was begun with '
        '(model.max_length counts, where attention holds all tokens).'
      )
    restored.append(jnp.asarray(found))
  return jax.tree.structure(like).unflatten(restored)


def check_model(path: str | pathlib.Path, content, found: str) -> None:
  """Refuses a file of another checkpoint.

  Args:
    path: The file, for the words of an error.
    content: What it holds.
    found: The `fingerprint` of the checkpoint at hand.

  Raises:
    errors.UserError: They differ.
  """
  expected = content.header['model']
  if expected != found:
    raise errors.UserError(
      f'the session {path} belongs to another checkpoint (fingerprint '
      f'{expected[:12]}, this one {found[:12]}); use the checkpoint that it '
      'was begun with, or another path.'
    )


def fingerprint(model: models.Model, params: Any) -> str:
  """SHA-256 of a model's config and all its parameters."""
  config = dataclasses.replace(model.config, max_length=1, remat='none')
  digest = hashlib.sha256(configs.to_json(config).encode())
  for name, x in _leaves(params):
    array = np.ascontiguousarray(x)
    digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
    digest.update(array.astype(array.dtype.newbyteorder('<')).tobytes())
  return digest.hexdigest()


def _leaves(tree):
  return [
    (parameters.path_name(path), x)
    for path, x in jax.tree.leaves_with_path(tree)
  ]
