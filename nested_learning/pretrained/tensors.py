"""Reads and writes safetensors, tensor by tensor, through a memory map.

The `safetensors` package has no bfloat16 in NumPy. The format is eight bytes
with the length of a header, the header in JSON, and the tensors end to end.
"""

from collections.abc import Callable, Iterable, Mapping
import json
import math
import os
import pathlib
from typing import NamedTuple

import ml_dtypes
import numpy as np

from nested_learning import errors
from nested_learning import files

_DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SINGLE, _INDEX = 'model.safetensors', 'model.safetensors.index.json'
_MAX_HEADER = 100 << 20  # bytes, as in the package
_MAX_SHARD = 4 << 30  # bytes of a file that is written


class Tensor(NamedTuple):
  """A tensor that is read when it is needed.

  Attributes:
    shape: Its shape.
    dtype: Its type, as a name of the format ('BF16'); others cannot be read.
    read: `read()` returns it as an array, a view of a memory map if it is one.
  """

  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]


def open_folder(folder: pathlib.Path) -> dict[str, Tensor]:
  """Opens all tensors of a folder; reads the headers of its files only.

  Args:
    folder: A folder with model.safetensors, or its shards and their index.

  Returns:
    The tensors by name.

  Raises:
    errors.UserError: A file is missing, cut short or damaged.
  """
  index = folder / _INDEX
  if not index.is_file():
    if not (folder / _SINGLE).is_file():
      raise errors.UserError(_no_weights(folder))
    return open_file(folder / _SINGLE)
  places = read_json(index).get('weight_map')
  if not isinstance(places, dict) or not places:
    raise errors.UserError(f'{index} has no weight_map; download it again.')
  found = {}
  for name in sorted(set(map(str, places.values()))):
    if pathlib.PurePath(name).name != name:
      raise errors.UserError(f'{index} names {name!r}, which is no file of it.')
    if not (folder / name).is_file():
      raise errors.UserError(
        f'{folder} lacks {name}, one of the {len(set(places.values()))} files '
        f'that {_INDEX} names; download it again.'
      )
    found |= open_file(folder / name)
  lost = sorted(set(places) - set(found))
  if lost:
    raise errors.UserError(
      f'{folder / places[lost[0]]} lacks {lost[0]}, which {_INDEX} places in '
      'it; download both again.'
    )
  return found


def open_file(path: pathlib.Path) -> dict[str, Tensor]:
  """Opens the tensors of one file; see `open_folder`."""
  size = path.stat().st_size
  with open(path, 'rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
      raise _damaged(path, f'{size:,} bytes')
    text = file.read(length)
  try:
    header = json.loads(text)
    header.pop('__metadata__', None)
    entries = {name: _entry(entry) for name, entry in header.items()}
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise _damaged(path, 'its header') from error
  end = 8 + length + max((e[3] for e in entries.values()), default=0)
  if end != size:
    raise _damaged(path, f'{size:,} bytes of {end:,}')
  data = np.memmap(path, np.uint8, 'r', offset=8 + length)

  def make(shape, dtype, first, last):
    def read():
      return data[first:last].view(_DTYPES[dtype]).reshape(shape)

    return Tensor(shape, dtype, read)

  return {name: make(*entry) for name, entry in entries.items()}


def dtype_of(name: str, tensor: Tensor) -> np.dtype:
  """Returns the type of a tensor.

  Raises:
    errors.UserError: No parameter has this type.
  """
  if tensor.dtype not in _DTYPES:
    raise errors.UserError(
      f'{name} is {tensor.dtype}, and {", ".join(_DTYPES)} can be read; '
      'convert it.'
    )
  return _DTYPES[tensor.dtype]


def write_folder(
  folder: pathlib.Path,
  tensors: Mapping[str, Tensor],
  *,
  max_bytes: int = _MAX_SHARD,
) -> None:
  """Writes tensors into files of a folder, one tensor in memory at a time.

  Args:
    folder: The folder, which exists.
    tensors: The tensors by name.
    max_bytes: Bytes of a file, unless one tensor is larger.
  """
  shards, filled = [{}], 0
  for name, tensor in tensors.items():
    size = math.prod(tensor.shape) * _DTYPES[tensor.dtype].itemsize
    if shards[-1] and filled + size > max_bytes:
      shards.append({})
      filled = 0
    shards[-1][name] = tensor
    filled += size
  if len(shards) == 1:
    _write_file(folder / _SINGLE, tensors)
    return
  places, total = {}, 0
  for i, shard in enumerate(shards, 1):
    name = f'model-{i:05d}-of-{len(shards):05d}.safetensors'
    total += _write_file(folder / name, shard)
    places |= dict.fromkeys(shard, name)
  index = {'metadata': {'total_size': total}, 'weight_map': places}
  (folder / _INDEX).write_text(json.dumps(index, indent=2) + '\n')


def _write_file(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> int:
  """Writes one file; returns the bytes of its tensors."""
  header, end = {'__metadata__': {'format': 'pt'}}, 0
  for name, tensor in tensors.items():
    first, kind = end, _DTYPES[tensor.dtype]
    end += math.prod(tensor.shape) * kind.itemsize
    header[name] = {
      'dtype': tensor.dtype,
      'shape': list(tensor.shape),
      'data_offsets': [first, end],
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # the tensors begin at a multiple of 8
  with open(path, 'wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for name, tensor in tensors.items():
      array = np.ascontiguousarray(tensor.read())
      if array.shape != tensor.shape or _NAMES[array.dtype] != tensor.dtype:
        raise ValueError(f'{name} is {array.dtype}{array.shape}.')
      file.write(array.reshape(-1).view(np.uint8))
    file.flush()
    os.fsync(file.fileno())
  return end


def from_array(array: np.ndarray) -> Tensor:
  """Returns the tensor of an array."""
  return Tensor(array.shape, _NAMES[array.dtype], lambda: array)


def cast(tensor: Tensor, dtype: str) -> Tensor:
  """Returns a tensor in another type, which is converted when it is read."""
  if tensor.dtype == dtype:
    return tensor
  read = lambda: tensor.read().astype(_DTYPES[dtype])
  return Tensor(tensor.shape, dtype, read)


def dtype_name(dtype: np.dtype) -> str:
  """Returns the name of a type in the format."""
  return _NAMES[np.dtype(dtype)]


def read_json(path: pathlib.Path) -> dict:
  """Reads a file that holds a JSON object.

  Raises:
    errors.UserError: It does not.
  """
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError) as error:
    raise errors.UserError(
      f'{files.shown(path)} cannot be read as JSON '
      f'({errors.first_line(error)}); download it again.'
    ) from error
  if not isinstance(value, dict):
    raise errors.UserError(f'{files.shown(path)} holds no JSON object.')
  return value


def _entry(entry) -> tuple[tuple[int, ...], str, int, int]:
  shape = tuple(entry['shape'])
  first, last = entry['data_offsets']
  fine = all(type(n) is int and n >= 0 for n in (*shape, first, last))
  dtype = entry['dtype']
  if not fine or first > last or not isinstance(dtype, str):
    raise ValueError(entry)
  if dtype in _DTYPES:
    size = math.prod(shape) * _DTYPES[dtype].itemsize
    if last - first != size:
      raise ValueError(entry)
  return shape, dtype, first, last


def _damaged(path: pathlib.Path, found: str) -> errors.UserError:
  return errors.UserError(
    f'{files.shown(path)} is cut short or damaged ({found}); download it again.'
  )


def _no_weights(folder: pathlib.Path) -> str:
  other = sorted(
    path.name
    for pattern in ('*.bin', '*.pth', '*.h5', '*.msgpack', '*.gguf')
    for path in folder.glob(pattern)
  )
  if other and other[0].endswith('.gguf'):
    return f'{folder} has no {_SINGLE}; name the file {folder / other[0]}.'
  has = f', but {other[0]}; convert it' if other else '; check the path'
  return f'{files.shown(folder)} has no {_SINGLE}{has}.'


def all_tensors(names: Iterable[str]) -> str:
  """Writes a list of names for a message: the first three, then a count."""
  names = list(names)
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return ', '.join(names[:3]) + more
