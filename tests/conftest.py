"""What every test needs before it runs.

Eight CPU devices, set before JAX starts its backend, so that tests of several
devices live beside the rest; and a folder of its own for `create_tempdir`.
"""

import os

from absl import flags
from absl.testing import absltest  # noqa: F401  (defines --test_tmpdir)
import jax
import pytest

# Most tests compile more than they compute. These flags give the same numbers
# from slower machine code that is compiled faster, also in the programs that
# tests start; XLA_FLAGS='' tests what users run.
os.environ.setdefault(
  'XLA_FLAGS',
  '--xla_backend_optimization_level=0 '
  '--xla_llvm_disable_expensive_passes=true '
  '--xla_cpu_use_fusion_emitters=false '
  '--xla_cpu_parallel_codegen_split_count=1',
)
jax.config.update('jax_platforms', os.environ.get('JAX_PLATFORMS') or 'cpu')
jax.config.update('jax_num_cpu_devices', 8)


@pytest.fixture(autouse=True, scope='session')
def _absl_flags(tmp_path_factory):
  """Makes absl's flags usable, as absltest.main() would."""
  flags.FLAGS.mark_as_parsed()
  flags.FLAGS.test_tmpdir = str(tmp_path_factory.mktemp('absl'))
