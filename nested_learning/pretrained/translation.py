"""Translates a config.json into a `ModelConfig`, and back."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from nested_learning import configs
from nested_learning import errors
from nested_learning import models
from nested_learning.pretrained import families
from nested_learning.pretrained import keys as keys_lib

_LENGTHS = ('max_position_embeddings', 'n_positions')


def to_model_config(
  config: Mapping[str, Any],
  *,
  max_length: int | None = None,
  ignore: Sequence[str] = (),
) -> models.ModelConfig:
  """Translates a config.json.

  Args:
    config: Its object.
    max_length: Tokens of a call and of the state of full attention; None is the
      length that the config names. Learned positions have that length always.
    ignore: Keys to ignore that are not known.

  Returns:
    The config of a model with the same logits.

  Raises:
    errors.UserError: The family, a key or a value is not supported.
  """
  family = families.find(config.get('model_type'))
  keys = keys_lib.Keys(config, family.defaults)
  keys.only('quantization_config')
  model = family.read(keys)
  keys.finish(tuple(ignore))
  if max_length is None or model.embedding.positions == 'learned':
    return model
  return dataclasses.replace(model, max_length=max_length)


def to_hf_config(
  model: models.ModelConfig,
  base: Mapping[str, Any],
  *,
  ignore: Sequence[str] = (),
) -> dict[str, Any]:
  """Translates the config of a model.

  Args:
    model: The model.
    base: The config.json that it came from, whose other keys are kept; at least
      its `model_type`. One that still says the same is returned unchanged.
    ignore: As for `to_model_config`.

  Returns:
    The object of a config.json.

  Raises:
    errors.UserError: The family has no such model; it names what differs.
  """
  family = families.find(base.get('model_type'))
  model = _join_levels(model, base['model_type'])
  wanted = _function(model)
  if len(base) > 1:
    same = _function(to_model_config(base, ignore=ignore)) == wanted
    if same:
      return dict(base)
  if len(model.levels) != 1 or model.chain.connection == 'independent':
    raise errors.UserError(
      f'model.levels has {len(model.levels)} levels, connected as '
      f'{model.chain.connection!r}; a block of {base["model_type"]} has '
      'one MLP, and no weight for it.'
    )
  try:
    written = family.write(model)
  except (AttributeError, KeyError) as error:  # a mixer that is no attention
    raise errors.UserError(
      f'model.mixer={type(model.pattern[0]).__name__} has no form in '
      f'{base["model_type"]}, whose layers are attention.'
    ) from error
  old = ('rope_theta', 'rope_scaling', 'rope_local_base_freq')
  kept = {k: v for k, v in base.items() if k not in (*written, *old)}
  # The model's length is that of a call; the context stays as long as it was.
  lengths = {n: base[n] for n in _LENGTHS if n in base and n in written}
  if model.embedding.positions == 'none':
    written |= lengths
  new = {'architectures': [family.architecture], **kept, **written}
  found = _function(to_model_config(new, ignore=ignore))
  differing = configs.differences(wanted, found)
  if differing:
    path, (ours, theirs) = next(iter(differing.items()))
    raise errors.UserError(
      f'model.{path}={ours!r} has no form in {base["model_type"]}, which has '
      f'{theirs!r}; change it, or keep the model in this format.'
    )
  return new


def _join_levels(model: models.ModelConfig, family: str) -> models.ModelConfig:
  """Returns the model with one level, where every layer has one of them."""
  if model.placement == models.PlacementConfig():
    return model
  if model.placement.memory is not None:
    raise errors.UserError(
      'model.placement.memory: the memories of layers '
      f'{model.placement.memory_layers} have no form in {family}; keep the '
      'model in this format.'
    )
  levels = {
    dataclasses.replace(level, name='mlp', train_every=None, optimizer=None)
    for block in model.blocks
    for level in block.levels
  }
  if len(levels) > 1 or any(len(block.levels) > 1 for block in model.blocks):
    raise errors.UserError(
      f'model.placement.levels: a layer of {family} has one MLP, and all are '
      'alike; keep the model in this format.'
    )
  return dataclasses.replace(
    model, levels=tuple(levels), placement=models.PlacementConfig()
  )


def _function(model: models.ModelConfig) -> models.ModelConfig:
  """Returns the config without what does not change the logits."""
  learned = model.embedding.positions == 'learned'
  levels = tuple(
    dataclasses.replace(level, name='mlp', train_every=None, optimizer=None)
    for level in model.levels[:1]
  )
  return dataclasses.replace(
    model,
    levels=(*levels, *model.levels[1:]),
    max_length=model.max_length if learned else 1,
    dtype='float32',
    remat='none',
    chain=dataclasses.replace(model.chain, order='fastest_first'),
  )
