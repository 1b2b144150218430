"""Counts what an update of sharded parameters moves between devices.

  python -m experiments.benchmarks.optimizer_moves NUM_LAYERS EMBED_DIM

prints one line of JSON: a list of `Moves`. Updates are compiled for eight
virtual devices of the CPU, and not run.
"""

from collections.abc import Iterator
import json
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_learning import compilation
from nested_learning import optimizers

NUM_DEVICES = 8
_PERIOD = 16  # of the slow momentum


class Moves(NamedTuple):
  """Collectives in one update of stacks of matrices.

  Attributes:
    optimizer: 'M3' or 'Muon'.
    axes: 'auto' or 'explicit': how the mesh is set.
    side: Side of the matrices that is sharded: 'rows' or 'columns'.
    per_stack: Collectives of matrices in every step, per stack.
    per_stack_slow: The same of the slow momentum, one step in 16.
    in_loops: Collectives inside loops.
    small: Further collectives, of sums.
    sent: Bytes that a device sends per step (of the slow momentum, a
      sixteenth), over the bytes of its parameters.
  """

  optimizer: str
  axes: str
  side: str
  per_stack: float
  per_stack_slow: float
  in_loops: int
  small: int
  sent: float


def count(num_layers: int, embed_dim: int) -> list[Moves]:
  """Counts the collectives of M3 and of optax's Muon on the same tree.

  Args:
    num_layers: Matrices in each stack.
    embed_dim: Their shorter side; two of the six stacks are four times as long.

  Returns:
    `Moves` of both, for both sides. Muon does not run with explicit axes.
  """
  if jax.device_count() >= NUM_DEVICES:
    return list(_count(num_layers, embed_dim))
  # The number of devices cannot change in a process that has used one.
  output = subprocess.check_output(
    [sys.executable, '-m', __name__, str(num_layers), str(embed_dim)], text=True
  )
  return [Moves(**line) for line in json.loads(output.splitlines()[-1])]


def _count(num_layers, embed_dim) -> Iterator[Moves]:
  numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
  explicit = jax.sharding.AxisType.Explicit
  for side in ('rows', 'columns'):
    spec = jax.P(None, 'x', None) if side == 'rows' else jax.P(None, None, 'x')
    for axes in ('auto', 'explicit'):
      kind = explicit if axes == 'explicit' else jax.sharding.AxisType.Auto
      mesh = jax.make_mesh((NUM_DEVICES,), ('x',), axis_types=(kind,))
      with jax.set_mesh(mesh):
        params = _make_params(num_layers, embed_dim, mesh, spec)
        trees = jax.tree.map(lambda _: numbers, params)
        made = {
          'M3': optimizers.scale_by_m3(slow_every=_PERIOD),
          'Muon': optax.contrib.scale_by_muon(weight_dimension_numbers=trees),
        }
        if axes == 'explicit':
          del made['Muon']
        for name, tx in made.items():
          found = _compile(tx, params, mesh)
          yield _sum_up(name, axes, side, found, params)


def _make_params(num_layers, embed_dim, mesh, spec) -> Any:
  shapes = dict.fromkeys(('query', 'key', 'value', 'out'), (embed_dim,) * 2)
  shapes['up'] = embed_dim, 4 * embed_dim
  shapes['down'] = 4 * embed_dim, embed_dim
  sharding = jax.NamedSharding(mesh, spec)
  return {
    name: jax.ShapeDtypeStruct(
      (num_layers, *shape), jnp.float32, sharding=sharding
    )
    for name, shape in shapes.items()
  }


def _compile(tx, params, mesh) -> list[compilation.collectives.Collective]:
  """Compiles an update, and finds its collectives."""
  shardings = {leaf.shape: leaf.sharding for leaf in params.values()}
  state = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=shardings.get(leaf.shape)
    ),
    jax.eval_shape(tx.init, params),
  )
  update = jax.jit(tx.update).lower(params, state, params).compile()
  program = compilation.hlo.parse(update.as_text())
  return list(compilation.collectives.find(program, dict(mesh.shape)))


def _sum_up(name, axes, side, found, params) -> Moves:
  # Sums over sharded matrices send a few numbers per matrix, and a collective
  # may have those of all stacks.
  num_layers = next(iter(params.values())).shape[0]
  moves = [move for move in found if move.num_bytes > 150 * num_layers]
  slow = [move for move in moves if 'cond' in move.op_name]
  sent = sum(
    move.num_bytes * move.times / (_PERIOD if move in slow else 1)
    for move in found
  )
  num_bytes = sum(leaf.size for leaf in params.values()) * 4 / NUM_DEVICES
  return Moves(
    optimizer=name,
    axes=axes,
    side=side,
    per_stack=sum(move.times for move in moves if move not in slow)
    / len(params),
    per_stack_slow=sum(move.times for move in slow) / len(params),
    in_loops=sum(bool(move.loops) for move in moves),
    small=len(found) - len(moves),
    sent=sent / num_bytes,
  )


def main() -> None:
  """Prints the counts for the sizes in the arguments."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', NUM_DEVICES)
  num_layers, embed_dim = map(int, sys.argv[1:])
  print(json.dumps([each._asdict() for each in count(num_layers, embed_dim)]))


if __name__ == '__main__':
  main()
