"""Gradients of losses of each level's own input and output.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, sections 7.1 and 7.3.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import optimizers
from nested_learning.layers import cms
from nested_learning.memory import objectives

OBJECTIVES = ('l2', 'dot')  # of `memory.objectives`


class LocalLevel(NamedTuple):
  """The loss of one level.

  Attributes:
    objective: 'l2' or 'dot', see `apply_with_gradients`.
    dgd: Settings of Delta Gradient Descent, if the level learns by it.
  """

  objective: str
  dgd: optimizers.configs.Dgd | None = None


class LocalLoss(NamedTuple):
  """A loss of each level's own input and output.

  Attributes:
    levels: Levels whose gradients are computed, by name.
    target: [b, t, e], target of a level's output.
    counts: [b, t], weight of each token; 0 leaves it out.
  """

  levels: Mapping[str, LocalLevel]
  target: jax.Array
  counts: jax.Array


class Gradients(NamedTuple):
  """Gradients of local losses, at the paths of the levels' parameters.

  Attributes:
    gradient: Sums over rows and tokens.
    energy: The same sums of squared norms of the inputs of each matrix, of
      levels with Delta Gradient Descent.
  """

  gradient: Any
  energy: Any


class StateAndGradients(NamedTuple):
  """State of a layer that was given a `LocalLoss`.

  Attributes:
    state: State of the layer without one.
    gradients: `Gradients` of the levels that learn.
  """

  state: Any
  gradients: Gradients


def apply_with_gradients(
  levels: Sequence[cms.LevelConfig],
  params: Any,
  x: jax.Array,
  local_loss: LocalLoss,
  *,
  chain: cms.ChainConfig,
  mix: jax.Array | None = None,
) -> tuple[jax.Array, Gradients]:
  r"""Passes x through the chain and computes gradients of local losses.

  For a level's input x, output f(x) before the residual addition, and a target
  v of e numbers, the loss is the sum over tokens, weighted by `counts`, of

  .. math::
    \frac{1}{2e} |f(x_t) - v_t|^2 \quad \text{('l2')}, \qquad
    -\frac{1}{e} \langle f(x_t), v_t \rangle \quad \text{('dot')}.

  The gradient of a level is computed together with its output; none flows to
  earlier layers. 'l2' replaces the output by the target, and 'dot' moves it
  towards the target without a limit. Both are meant for models trained through
  such steps; others get worse by them. For Delta Gradient Descent, the gradient
  has the erasing term of the settings, and energies come with it.

  The papers leave a level's own key and value open (NL sections 7.1 and 7.3).
  Here the key is the level's input and the value is the caller's target, in
  `models.LanguageHead` the embedding of the next token.

  Args:
    levels: As for `cms.apply`.
    params: As for `cms.apply`.
    x: [b, t, e].
    local_loss: The levels, their objectives and the target.
    chain: As for `cms.apply`.
    mix: As for `cms.apply`.

  Returns:
    The result of `cms.apply`, and `Gradients` by level name.
  """
  gradients, energies = {}, {}

  def mlp(config, x):
    name = config.name
    if name not in local_loss.levels:
      return config.mlp.apply(params[name], x)
    level = local_loss.levels[name]
    objective = objectives.OBJECTIVES[level.objective]

    def loss(weights):
      output = config.mlp.apply(weights, x)
      # Errors and their sum are float32 at least: bfloat16 loses them.
      wide = output.astype(jnp.promote_types(output.dtype, jnp.float32))
      values = objective(wide, local_loss.target)  # [b, t]
      return jnp.sum(local_loss.counts * values) / x.shape[-1], output

    if level.dgd is None:
      gradients[name], output = jax.grad(loss, has_aux=True)(params[name])
      return output
    grad = optimizers.value_and_delta_grad(
      loss,
      target=level.dgd.target,
      erase=level.dgd.erase,
      num_samples=1,  # sums, as the gradients are
      has_aux=True,
    )
    (_, output), gradients[name], extra = grad(params[name])
    energies[name] = extra['energy']
    return output

  x = cms.connect(levels, mlp, x, chain=chain, mix=mix)
  return x, Gradients(gradients, energies)
