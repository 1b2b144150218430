"""Eight CPU devices for every test, set before JAX starts its backend."""

import os

import jax

jax.config.update('jax_platforms', os.environ.get('JAX_PLATFORMS') or 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
