"""Which experiments can share the tokens of a row among devices."""

from typing import Any

from nested_learning import errors


def check(config: Any) -> None:
  """Refuses a mesh whose axis 'context' the rows or the model do not allow.

  Args:
    config: An `ExperimentConfig`.

  Raises:
    errors.UserError: Tokens do not divide over the axis, or only in the middle
      of chunks; or what a row does cannot begin in its middle.
  """
  context, num_tokens = config.mesh.context, config.data.sequence_length
  if context == 1:
    return
  if config.inner.is_on:
    raise errors.UserError(
      f'levels that learn inside a row (inner.update_every='
      f'{config.inner.update_every}) read it in one piece; set mesh.context='
      f'{context} to 1.'
    )
  if config.carries_state:
    raise errors.UserError(
      "with data.reset='never' a row begins where another stopped, which "
      f'mesh.context={context} cannot share among devices; set it to 1, or '
      "use data.reset='document'."
    )
  for mixer in config.model.pattern:
    together = mixer.granularity
    if num_tokens % (context * together):
      of_chunks = '' if together == 1 else f' chunks of {together} tokens on'
      raise errors.UserError(
        f'data.sequence_length={num_tokens} does not divide into{of_chunks} '
        f'mesh.context={context} devices; set it to a multiple of '
        f'{context * together}, or change mesh.context.'
      )
