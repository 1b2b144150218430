import dataclasses
import inspect
import typing

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import configs
from nested_learning import errors
from nested_learning import optimizers

kinds = optimizers.configs

_FUNCTIONS = {
  kinds.M3: optimizers.m3,
  kinds.Dgd: optimizers.dgd,
  kinds.DeltaMomentum: optimizers.delta_momentum,
  kinds.PreconditionedMomentum: optimizers.preconditioned_momentum,
  kinds.DeepMomentum: optimizers.deep_momentum,
}
_ALL = typing.get_args(optimizers.OptimizerConfig)


@dataclasses.dataclass(frozen=True)
class Train:
  optimizer: optimizers.OptimizerConfig = kinds.AdamW()
  level: optimizers.OptimizerConfig | None = None


def _params():
  keys = jax.random.split(jax.random.key(0), 2)
  return {
    'kernel': jax.random.normal(keys[0], (6, 4)),
    'bias': jax.random.normal(keys[1], (4,)),
  }


def _extra(config, params):
  if not isinstance(config, kinds.Dgd):
    return {}
  return {'energy': jax.tree.map(lambda p: jnp.float32(p.ndim > 1), params)}


class ConfigsTest(parameterized.TestCase):
  @parameterized.parameters(
    'adamw',
    'ademamix',
    'deep_momentum',
    'delta_momentum',
    'dgd',
    'm3',
    'muon',
    'preconditioned_momentum',
    'sgd',
  )
  def test_is_chosen_by_its_name_and_makes_an_optimizer(self, name):
    config = configs.override(Train(), [f'optimizer={name}']).optimizer
    self.assertEqual(config.NAME, name)
    self.assertEqual(config, type(config)())
    params = _params()
    tx = kinds.make(config, 1e-2)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(
      grads, tx.init(params), params, **_extra(config, params)
    )
    for update in jax.tree.leaves(updates):
      self.assertTrue(np.all(np.isfinite(update)))
      self.assertLess(np.mean(update), 0)

  def test_every_kind_has_a_name_of_its_own(self):
    names = [kind.NAME for kind in _ALL]
    self.assertLen(set(names), len(names))
    with self.assertRaisesRegex(TypeError, 'no config of an optimiser.*AdamW'):
      kinds.make('adamw', 1e-3)

  @parameterized.parameters(*_ALL)
  def test_comes_back_from_json(self, kind):
    self.assertEqual(configs.from_json(configs.to_json(kind())), kind())

  @parameterized.parameters(*_FUNCTIONS)
  def test_defaults_are_those_of_the_function(self, kind):
    arguments = inspect.signature(_FUNCTIONS[kind]).parameters
    for field in dataclasses.fields(kind):
      # adam_b2 is 0.95 in configs of all rules, as for AdamW.
      named = field.name in arguments
      if named and field.name not in ('fallback', 'adam_b2'):
        self.assertEqual(
          field.default, arguments[field.name].default, field.name
        )

  @parameterized.parameters(
    ('optimizer=adm', 'adm does not fit.*The nearest is optimizer=adamw'),
    ('level=muoon', 'or none, now None. The nearest is level=muon'),
    ('optimizer.slow_every=8', 'optimizer is adamw. Set optimizer=m3 before'),
  )
  def test_unknown_names_the_nearest(self, assignment, message):
    with self.assertRaisesRegex(errors.UserError, message):
      configs.override(Train(), [assignment])

  @parameterized.parameters(
    ('adamw', 'b2=1', 'optimizer.b2=1.0 must be at least 0 and below 1'),
    ('adamw', 'eps=-1', 'optimizer.eps=-1.0 must be finite'),
    ('sgd', 'momentum=nan', 'optimizer.momentum=nan must be'),
    ('muon', 'beta=-0.1', 'optimizer.beta=-0.1 must be at least 0 and below'),
    ('muon', 'ns_steps=0', 'optimizer.ns_steps=0 must be at least 1'),
    ('muon', 'consistent_rms=0', 'optimizer.consistent_rms=0.0 must be above'),
    ('m3', 'slow_every=0', 'optimizer.slow_every=0 must be at least 1'),
    ('m3', 'slow_weight=-1', 'optimizer.slow_weight=-1.0 must be finite'),
    ('m3', 'second_decay=1', 'optimizer.second_decay=1.0 must be at least 0'),
    ('dgd', 'erase=-1', 'optimizer.erase=-1.0 must be finite and at least 0'),
    ('dgd', 'fallback.b1=2', 'optimizer.fallback.b1=2.0 must be at least 0'),
    ('delta_momentum', 'erase=2', 'and at most 1 . decay = 1.9'),
    ('delta_momentum', 'form=printed', 'is one of stable, paper'),
    ('preconditioned_momentum', 'decay=1', 'optimizer.decay=1.0 must be'),
    ('deep_momentum', 'inner_steps=0', 'optimizer.inner_steps=0 must be'),
    ('ademamix', 'b3=1', 'optimizer.b3=1.0 must be at least 0 and below 1'),
  )
  def test_refuses_a_setting_out_of_range(self, name, setting, message):
    with self.assertRaisesRegex(errors.UserError, message) as caught:
      configs.override(Train(), [f'optimizer={name}', f'optimizer.{setting}'])
    self.assertNotIn('\n', str(caught.exception))

  @parameterized.parameters(*_ALL)
  def test_weight_decay_is_decoupled_and_masked(self, kind):
    config, params, rate = kind(), _params(), optax.linear_schedule(0.1, 0, 9)
    mask = {'kernel': True, 'bias': False}
    grads = jax.tree.map(jnp.ones_like, params)
    extra, moved = _extra(config, params), []
    for weight_decay in (0.0, 0.5):
      tx = kinds.make(config, rate, weight_decay=weight_decay, mask=mask)
      state = tx.init(params)
      for _ in range(2):
        updates, state = tx.update(grads, state, params, **extra)
      moved.append(updates)
    plain, decayed = moved
    np.testing.assert_array_equal(plain['bias'], decayed['bias'])
    np.testing.assert_allclose(
      decayed['kernel'] - plain['kernel'],
      -rate(1) * 0.5 * params['kernel'],
      atol=1e-6,
    )

  def test_fallback_of_dgd_has_a_rate_of_its_own(self):
    params, grads = _params(), jax.tree.map(jnp.ones_like, _params())
    moved = []
    for scale in (1.0, 0.01):
      tx = kinds.make(
        kinds.Dgd(fallback_scale=scale), optax.constant_schedule(1.0)
      )
      extra = _extra(kinds.Dgd(), params)
      moved.append(tx.update(grads, tx.init(params), params, **extra)[0])
    np.testing.assert_array_equal(moved[0]['kernel'], moved[1]['kernel'])
    np.testing.assert_allclose(
      0.01 * moved[0]['bias'], moved[1]['bias'], rtol=1e-5
    )

  def test_adamw_is_that_of_optax_and_has_a_derivative_at_zero(self):
    params = _params()
    ours = kinds.make(kinds.AdamW(), 1e-2, weight_decay=0.1)
    theirs = optax.adamw(1e-2, 0.9, 0.95, weight_decay=0.1)
    states = ours.init(params), theirs.init(params)
    for step in range(4):
      grads = jax.tree.map(lambda p, s=step: p * 10.0 ** (-9 * s), params)
      left, ours_state = ours.update(grads, states[0], params)
      right, theirs_state = theirs.update(grads, states[1], params)
      states = ours_state, theirs_state
      jax.tree.map(np.testing.assert_array_equal, left, right)

    def norm(grads):
      updates, _ = ours.update(grads, ours.init(params), params)
      return optax.tree.norm(updates)

    slopes = jax.grad(norm)(jax.tree.map(jnp.zeros_like, params))
    for slope in jax.tree.leaves(slopes):
      self.assertTrue(np.all(np.isfinite(slope)))
