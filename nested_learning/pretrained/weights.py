"""Parameters from a checkpoint's tensors, and tensors from parameters."""

from collections.abc import Callable, Mapping
import re
from typing import Any

import jax
import numpy as np

from nested_learning import errors
from nested_learning import models
from nested_learning import parameters
from nested_learning import subtrees
from nested_learning.pretrained import axes
from nested_learning.pretrained import tables
from nested_learning.pretrained import tensors as tensors_lib

_TIED = 'lm_head.weight'  # some checkpoints hold a tied head a second time


class Map:
  """The places of a checkpoint's tensors in the parameters of a model.

  Attributes:
    table: Declarations of the parameters.
    places: Every tensor that the model has, in the order of the table's rows.
  """

  def __init__(self, rows: tuple[tables.Row, ...], config: models.ModelConfig):
    self.table = models.make_model(config).table
    leaves = jax.tree_util.tree_flatten_with_path(
      self.table, is_leaf=lambda x: isinstance(x, parameters.Param)
    )[0]
    self._params = {parameters.path_name(path): p for path, p in leaves}
    self.places = {
      place.name: place
      for place in tables.expand(rows, config)
      if set(place.paths) <= set(self._params)
    }
    self._sources = {}  # of each path: layer, place and index along axis 's'
    for place in self.places.values():
      for i, path in enumerate(place.paths):
        self._sources.setdefault(path, {})[place.layer] = place, i
    missing = sorted(
      path
      for path in set(self._params) - set(self._sources)
      if not tables.is_added(config, path)
    )
    if missing:
      raise errors.UserError(
        f'this family has no tensor for {tensors_lib.all_tensors(missing)} of '
        'the model; it cannot be imported or exported.'
      )

  def sizes(self, place: tables.Place) -> dict[str, int]:
    """Returns the size of every axis of a tensor."""
    shape = self._params[place.paths[0]].shape
    shape = shape if place.layer is None else shape[1:]
    if place.turn.ours[0] == 's':
      shape = len(place.paths), *shape
    return dict(zip(place.turn.ours, shape, strict=True))

  def check(self, tensors: Mapping[str, tensors_lib.Tensor]) -> None:
    """Checks that tensors and parameters fit, without reading a weight.

    Args:
      tensors: The tensors of a checkpoint.

    Raises:
      errors.UserError: Tensors are missing, have no place, a wrong shape, or a
        type that cannot be read.
    """
    missing = [name for name in self.places if name not in tensors]
    extra = [
      name
      for name in tensors
      if name not in self.places and not self._is_spare(name, tensors)
    ]
    if missing or extra:
      said = []
      if missing:
        said.append(f'lacks {tensors_lib.all_tensors(missing)}')
      if extra:
        listed = tensors_lib.all_tensors(sorted(extra))
        said.append(f'holds {listed}, which have no place in the model')
      raise errors.UserError(
        f'the checkpoint {" and ".join(said)}; check that config.json is of '
        'the same model.'
      )
    for name, place in self.places.items():
      tensor, expected = tensors[name], place.turn.shape(self.sizes(place))
      tensors_lib.dtype_of(name, tensor)
      if tensor.shape != expected:
        raise errors.UserError(
          f'{name} has the shape {list(tensor.shape)}, and config.json gives '
          f'{list(expected)}; check that both are of the same model.'
        )

  def load(
    self,
    tensors: Mapping[str, tensors_lib.Tensor],
    *,
    dtype: Any = None,
    keep: Callable[[str], bool] = lambda path: False,
    shardings: Any = None,
  ) -> Any:
    """Reads parameters, no more than one of them in memory beside the result.

    Args:
      tensors: Tensors that `check` has passed.
      dtype: Type of the parameters; None keeps that of each tensor.
      keep: `keep(path)` says which parameters keep the type of their tensor
        whatever `dtype` is.
      shardings: A tree like the table; None places all on one device. A process
        reads only the parts that its devices hold.

    Returns:
      A tree of arrays like the table, without what pretrained models lack, see
      `models.complete`.
    """
    there = lambda path: path in self._sources
    is_leaf = lambda x: isinstance(x, parameters.Param)
    table = subtrees.select(self.table, there)

    def leaf(path, param, sharding=None):
      name = parameters.path_name(path)
      own = None if keep(name) else dtype
      if sharding is None:
        return jax.device_put(self._part(tensors, name, own, None))
      part = lambda index: self._part(tensors, name, own, index)
      return jax.make_array_from_callback(param.shape, sharding, part)

    more = [] if shardings is None else [subtrees.select(shardings, there)]
    return jax.tree_util.tree_map_with_path(leaf, table, *more, is_leaf=is_leaf)

  def dtypes(self, tensors: Mapping[str, tensors_lib.Tensor]) -> dict[str, Any]:
    """Returns the type of each parameter that keeps that of its tensors."""
    found = {}
    for path, sources in self._sources.items():
      place, _ = sources[min(sources, key=lambda layer: layer or 0)]
      found[path] = tensors_lib.dtype_of(place.name, tensors[place.name])
    return found

  def dump(
    self, params: Any, dtypes: Mapping[str, str]
  ) -> dict[str, tensors_lib.Tensor]:
    """Returns the tensors of parameters, which are computed when they are read.

    Args:
      params: A tree of arrays like the table.
      dtypes: Type of every tensor, by name.

    Returns:
      The tensors by name, in the order of the table's rows.
    """
    leaves = {
      parameters.path_name(path): x
      for path, x in jax.tree.leaves_with_path(params)
    }

    def make(name, place):
      def read():
        parts = [leaves[path] for path in place.paths]
        if place.layer is not None:
          parts = [x[place.layer] for x in parts]
        parts = [np.asarray(x) for x in parts]
        ours = np.stack(parts) if place.turn.ours[0] == 's' else parts[0]
        return place.turn.to_theirs(ours)

      shape = place.turn.shape(self.sizes(place))
      own = tensors_lib.dtype_name(leaves[place.paths[0]].dtype)
      return tensors_lib.cast(
        tensors_lib.Tensor(shape, own, read), dtypes[name]
      )

    return {name: make(name, place) for name, place in self.places.items()}

  def _part(self, tensors, path, dtype, index) -> np.ndarray:
    """Reads the part `index` (slices, or None for all) of a parameter."""
    shape, sources = self._params[path].shape, self._sources[path]
    index = (slice(None),) * len(shape) if index is None else index
    if None in sources:
      return np.array(self._read(tensors, *sources[None])[index], dtype)
    layers = range(shape[0])[index[0]]
    out = None
    for i, layer in enumerate(layers):
      x = self._read(tensors, *sources[layer])[index[1:]]
      if out is None:
        out = np.empty((len(layers), *x.shape), dtype or x.dtype)
      out[i] = x
    return out

  def _read(self, tensors, place: tables.Place, part: int) -> np.ndarray:
    turn: axes.Turn = place.turn
    ours = turn.to_ours(tensors[place.name].read(), self.sizes(place))
    return ours[part] if turn.ours[0] == 's' else ours

  def _is_spare(self, name, tensors) -> bool:
    """Returns whether a tensor without a place may be left out."""
    if re.fullmatch(tables.BUFFERS, name):
      return True
    if name != _TIED:
      return False
    embedding = next(
      n for n, place in self.places.items() if place.paths == ('embedding',)
    )
    other = tensors.get(embedding)
    return other is not None and np.array_equal(
      tensors[name].read(), other.read()
    )
