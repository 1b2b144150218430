"""What every test needs before it runs.

Eight CPU devices, set before JAX starts its backend, so that tests of several
devices live beside the rest; and a folder of its own for `create_tempdir`.
"""

import os

from absl import flags
from absl.testing import absltest  # noqa: F401  (defines --test_tmpdir)
import jax
import pytest

jax.config.update('jax_platforms', os.environ.get('JAX_PLATFORMS') or 'cpu')
jax.config.update('jax_num_cpu_devices', 8)


@pytest.fixture(autouse=True, scope='session')
def _absl_flags(tmp_path_factory):
  """Makes absl's flags usable, as absltest.main() would."""
  flags.FLAGS.mark_as_parsed()
  flags.FLAGS.test_tmpdir = str(tmp_path_factory.mktemp('absl'))
