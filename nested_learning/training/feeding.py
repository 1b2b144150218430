"""From a subject's batches to arrays on the devices."""

from collections.abc import Iterator, Mapping
import itertools
from typing import Any

import jax
import numpy as np

from nested_learning import data as data_lib
from nested_learning import sharding
from nested_learning.training import subject as subject_lib

_ARRAYS = ('tokens', 'targets', 'mask', 'reset')  # that a step reads


def make_batches(
  subject: subject_lib.Subject, split: str, mesh: Any
) -> data_lib.Batches:
  """This process's rows of every batch of a split."""
  index, count = sharding.process_slice(mesh)
  return subject.make_batches(split, process_index=index, process_count=count)


def validation_batches(
  subject: subject_lib.Subject, num_batches: int, mesh: Any
) -> Iterator[dict[str, jax.Array]]:
  """The first batches of the validation split, always the same, on the mesh."""
  batches = make_batches(subject, 'validation', mesh)
  for batch in itertools.islice(batches, num_batches):
    yield put(batch, mesh)


def put(batch: Mapping[str, np.ndarray], mesh: Any) -> dict[str, jax.Array]:
  """Puts a process's rows of a batch on the devices that work on them."""
  rows = sharding.batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(rows, batch[name])
    for name in _ARRAYS
  }
