"""The zoo's benchmark, small, and the rule that it measures the engine by."""

import json
import pathlib

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import delta_rule
from experiments.benchmarks import zoo
from nested_learning import errors
from nested_learning import memory
from nested_learning import models
from tests import compiling


class ZooBenchmarkTest(absltest.TestCase):
  def test_the_rule_alone_equals_the_engine(self):
    self.enterContext(jax.enable_x64(True))
    rng = np.random.default_rng(0)
    shape = (2, 2, 128)
    k, v, q = (jnp.asarray(rng.normal(size=(*shape, 5))) for _ in range(3))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    inner_lr = jnp.asarray(rng.uniform(size=(*shape, 1)))
    retention = jnp.asarray(rng.uniform(0.8, 1.0, size=(*shape, 1)))
    mixer = models.zoo.FAMILIES['gated_deltanet'].mixer(
      models.zoo.Size(1, 10, 2, 1)
    )
    network = mixer.network()

    @compiling.jit
    def run(k, v, q, inner_lr, retention):
      alone = delta_rule.read_tokens(
        k, v, q, inner_lr, retention, chunk_size=64
      )
      feed = memory.WriteInputs(k, v, inner_lr, retention, query=q)
      result, _ = memory.scan_chunks(
        network,
        mixer.rule('main'),
        {'in': jnp.zeros((2, 5, 5))},
        None,
        feed,
        project=None,
      )
      return alone, result.read

    alone, read = run(k, v, q, inner_lr, retention)
    np.testing.assert_allclose(read, alone, rtol=1e-9, atol=1e-9)

  @pytest.mark.slow
  def test_writes_every_ratio(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    zoo.run(zoo.get_config('small'), str(folder), 'train')
    summary = json.loads((folder / 'summary.json').read_text(encoding='utf-8'))
    self.assertEqual(summary['transformer/training_64'], 1.0)
    for name in ('training_64', 'decode', 'state_bytes'):
      self.assertGreater(summary[f'deltanet/{name}'], 0)
    self.assertGreater(summary['gated_deltanet_over_reference'], 0)

  def test_refuses_what_the_zoo_lacks(self):
    with self.assertRaisesRegex(errors.UserError, 'mamba'):
      zoo.get_config('transformer,mamba')
    with self.assertRaisesRegex(errors.UserError, "lacks 'transformer'"):
      zoo.get_config('hope')
