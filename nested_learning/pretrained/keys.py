"""Reads the keys of a config.json; whatever nobody reads is refused by name."""

from collections.abc import Mapping
import math
from typing import Any

from nested_learning import errors

# Keys without effect on the logits of a decoder that is not being trained, or
# that tokenizers and generation read.
_IGNORED = frozenset(
  """
  _attn_implementation_autoset _name_or_path architectures attention_dropout
  attn_pdrop auto_map begin_suppress_tokens bos_token_id cache_implementation
  chunk_size_feed_forward classifier_dropout dtype embd_pdrop eos_token_id
  finetuning_task gradient_checkpointing hidden_dropout id2label
  initializer_range is_encoder_decoder is_llama_config label2id
  max_position_embeddings model_type output_attentions output_hidden_states
  pad_token_id pretraining_tp problem_type reorder_and_upcast_attn
  resid_pdrop return_dict summary_activation summary_first_dropout
  summary_proj_to_labels summary_type summary_use_proj task_specific_params
  torch_dtype transformers.js_config transformers_version unsloth_fixed
  unsloth_version use_cache
  """.split()
)


class Keys:
  """The keys of one config.json, with marks on those that were read."""

  def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]):
    self._config = dict(config)
    self._defaults = dict(defaults)
    self._read = set(_IGNORED)

  def get(self, name: str, default: Any = None) -> Any:
    """Returns a value; where the key is absent, the family's default.

    Args:
      name: The key.
      default: Value for null, and where the family has none.
    """
    self._read.add(name)
    value = self._config.get(name, self._defaults.get(name))
    return default if value is None else value

  def has(self, name: str) -> bool:
    """Returns whether the config names a value."""
    return self._config.get(name) is not None

  def size(self, name: str, default: int | None = None) -> int:
    """Returns a whole number above 0."""
    value = self.get(name, default)
    if value is None:
      raise errors.UserError(f'config.json lacks {name}.')
    if type(value) is not int or value < 1:
      raise _wrong(name, value, 'a whole number above 0')
    return value

  def number(self, name: str, default: float | None = None) -> float | None:
    """Returns a number above 0, or None if there is none."""
    value = self.get(name, default)
    if value is None:
      return None
    if type(value) not in (int, float) or not 0 < value < math.inf:
      raise _wrong(name, value, 'a finite number above 0')
    return float(value)

  def needed(self, name: str) -> float:
    """Returns a number above 0 that must be there."""
    value = self.number(name)
    if value is None:
      raise errors.UserError(f'config.json lacks {name}.')
    return value

  def flag(self, name: str) -> bool:
    """Returns true or false; false where the key is absent."""
    value = self.get(name, False)
    if type(value) is not bool:
      raise _wrong(name, value, 'true or false')
    return value

  def only(self, name: str, *values: Any) -> None:
    """Refuses a key with another value than these; absent passes."""
    value = self.get(name)
    if value is not None and not any(value == other for other in values):
      raise unsupported(name, value)

  def choice(self, name: str, choices: Mapping[str, str], default: str) -> str:
    """Returns our name for one of their choices."""
    value = self.get(name, default)
    if not isinstance(value, str) or value not in choices:
      known = ', '.join(sorted(choices))
      raise errors.UserError(
        f'config.json has {name}={value!r}, which is not supported; {known} '
        'are.'
      )
    return choices[value]

  def finish(self, ignored: tuple[str, ...]) -> None:
    """Refuses keys that nobody has read, unless they say nothing.

    Args:
      ignored: Keys that the user wants to ignore.
    """
    left = {
      name: value
      for name, value in self._config.items()
      if name not in self._read
      and name not in ignored
      and value not in (None, False)
    }
    if left:
      name, value = next(iter(left.items()))
      more = f' (and {len(left) - 1} more)' if len(left) > 1 else ''
      raise errors.UserError(
        f'config.json has {name}={_short(value)}{more}, which is not known '
        f'here; if it changes nothing, ignore it with --ignore={name}.'
      )


def unsupported(name: str, value: Any) -> errors.UserError:
  """Returns the error for a value that no layer has."""
  return errors.UserError(
    f'config.json has {name}={_short(value)}, which is not supported.'
  )


def _wrong(name, value, rule) -> errors.UserError:
  return errors.UserError(
    f'config.json has {name}={_short(value)}, which is not {rule}.'
  )


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + '...'
