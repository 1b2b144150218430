"""Models whose inputs or outputs are no tokens."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from nested_learning import models
from nested_learning import parameters
from tests.training import tiny


class HeadsTest(parameterized.TestCase):
  def test_a_regressor_is_causal_and_carries_its_state(self):
    model = models.make_model(tiny.MODEL, head=models.RegressionHead(3))
    params = jax.jit(model.init_params)(jax.random.key(0))
    inputs = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    whole, _ = model.forward(params, None, inputs)
    self.assertEqual(whole.shape, (2, 6, 1))
    first, state = model.forward(params, None, inputs[:, :4])
    second, _ = model.forward(params, state, inputs[:, 4:])
    np.testing.assert_allclose(first, whole[:, :4], atol=1e-5)
    np.testing.assert_allclose(second, whole[:, 4:], atol=1e-5)
    changed, _ = model.forward(params, None, inputs * [[[2]], [[1]]])
    self.assertTrue((changed[0] != whole[0]).all())
    np.testing.assert_array_equal(changed[1], whole[1])

  def test_a_compressor_sees_a_row_through_its_last_output(self):
    model = models.make_model(tiny.MODEL, head=models.CompressionHead())
    params = jax.jit(model.init_params)(jax.random.key(0))
    forward = jax.jit(model.forward)
    tokens = np.arange(8)[None] % 5
    logits, _ = forward(params, None, tokens)
    self.assertEqual(logits.shape, (1, 8, tiny.MODEL.vocab_size))
    other = tokens.copy()
    other[0, 2] = 9
    changed, _ = forward(params, None, other)
    self.assertTrue((np.abs(changed - logits).max(axis=-1) > 1e-6).all())

  @parameterized.product(
    family=('transformer', 'hope', 'titans_mac'),
    head=(models.LanguageHead(), models.CompressionHead()),
  )
  def test_a_jit_may_close_over_numpy_parameters(self, family, head):
    config = models.zoo.make_config(f'{family}_tiny', num_layers=2)
    model = models.make_model(config, head=head)
    params = jax.tree.map(
      lambda x: np.zeros(x.shape, x.dtype), parameters.abstract(model.table)
    )
    read = lambda tokens: model.forward(params, None, tokens)[0]
    logits = jax.eval_shape(read, np.arange(8)[None])
    self.assertEqual(logits.shape, (1, 8, config.vocab_size))

  def test_labels_and_counts_follow_the_table(self):
    for model in (
      models.make_model(tiny.MODEL, head=models.RegressionHead(3)),
      models.make_model(tiny.MODEL, head=models.CompressionHead()),
    ):
      labels = models.level_labels(tiny.MODEL, model.table)
      params = jax.eval_shape(model.init_params, jax.random.key(0))
      self.assertEqual(jax.tree.structure(labels), jax.tree.structure(params))
      self.assertEqual(set(jax.tree.leaves(labels)), {'base', 'slow'})
      self.assertEqual(
        parameters.count(model.table),
        sum(x.size for x in jax.tree.leaves(params)),
      )


if __name__ == '__main__':
  absltest.main()
