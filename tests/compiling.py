"""Compilation for tests: the engine's graphs run once, so compile them fast."""

import functools
from typing import Any
from unittest import mock

import jax

_jit = jax.jit

# The same numbers in a fifth of the compile time, from slower machine code.
_OPTIONS = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
  'xla_cpu_use_fusion_emitters': False,
  'xla_cpu_parallel_codegen_split_count': 1,
}


def jit(function: Any, **kwargs: Any) -> Any:
  """`jax.jit` that compiles quickly on the CPU; elsewhere plain `jax.jit`."""
  options = _OPTIONS if jax.default_backend() == 'cpu' else None
  return _jit(function, compiler_options=options, **kwargs)


def jit_static(*names: str) -> Any:
  """A decorator: `jit` with static keyword arguments."""
  return functools.partial(jit, static_argnames=names)


def quickly() -> Any:
  """A context in which `jax.jit` is `jit`, for library code that calls it."""
  return mock.patch.object(jax, 'jit', jit)
