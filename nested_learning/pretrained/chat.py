"""Chat templates: from messages to the text that a model was tuned on."""

from collections.abc import Mapping, Sequence
import datetime
import json
from typing import Any

from nested_learning import errors


def render(
  template: str,
  messages: Sequence[Mapping[str, Any]],
  *,
  add_generation_prompt: bool = True,
  **names: Any,
) -> str:
  """Renders a chat template of Hugging Face.

  Args:
    template: A Jinja template, which runs in a sandbox.
    messages: Each with a 'role' and its 'content'.
    add_generation_prompt: Whether the text ends where the model answers.
    **names: Further names of the template, such as bos_token.

  Returns:
    A text for `Tokenizer.encode_marked`.

  Raises:
    errors.UserError: The package Jinja2 is missing, or the template is broken
      or refuses the messages.
  """
  try:
    import jinja2
    from jinja2 import sandbox
  except ImportError as error:
    raise errors.UserError(
      'a chat template needs the package Jinja2; install it with `pip install '
      '"nested-learning[chat]"`.'
    ) from error

  def refuse(message):
    raise jinja2.TemplateError(message)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
  )
  # Jinja's own filter escapes for HTML.
  environment.filters['tojson'] = lambda x, indent=None: json.dumps(
    x, ensure_ascii=False, indent=indent
  )
  environment.globals['raise_exception'] = refuse
  environment.globals['strftime_now'] = lambda form: (
    datetime.datetime.now().strftime(form)
  )
  try:
    return environment.from_string(template).render(
      messages=messages, add_generation_prompt=add_generation_prompt, **names
    )
  except jinja2.TemplateError as error:
    raise errors.UserError(
      f'the chat template cannot be rendered ({errors.first_line(error)}).'
    ) from error
