"""Huge pages for what a process allocates.

XLA takes the buffers of a step from malloc and gives them back after it, and
the kernel maps them anew for the next one, by default in pages of 4 KB. In
pages of 2 MB that is a five-hundredth of the work: on two CPU cores a training
step of Transformer++ takes two thirds of the time, one of Hope six sevenths
(`experiments/benchmarks/engine.py`, with and without).

glibc reads the setting when a process starts, so that a process has to start
again to have it. Where there is no glibc, or one before 2.35, nothing changes.
"""

import os
import sys

_VARIABLE = 'GLIBC_TUNABLES'
# Asks for them: many kernels give them to those alone that ask.
_SETTING = 'glibc.malloc.hugetlb=1'


def start_again() -> None:
  """Starts this program again with the setting, unless there is one already."""
  if not sys.platform.startswith('linux') or _VARIABLE in os.environ:
    return
  os.environ[_VARIABLE] = _SETTING
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
