"""Bodies of requests, as OpenAI's API and its extensions here define them.

Fields that are unknown, or of which only one value is served, are refused by
name rather than ignored.
"""

from typing import Annotated, Any, Literal

import pydantic

Field = pydantic.Field
# Fields of OpenAI's API with one value that is served, which changes nothing.
UNSERVED = frozenset(
  'best_of echo frequency_penalty logit_bias n presence_penalty '
  'response_format suffix tools'.split()
)
_Stop = str | list[str] | None
_Token = Annotated[int, Field(ge=0, lt=2**31)]


class Body(pydantic.BaseModel):
  """A body of JSON: no other fields, no conversion of types."""

  model_config = pydantic.ConfigDict(extra='forbid', strict=True)

  @pydantic.model_validator(mode='before')
  @classmethod
  def _check_unicode(cls, data: Any) -> Any:
    _check_unicode(data)
    return data


class Drawing(Body):
  """How an answer is drawn, and on which session."""

  model: str | None = None
  temperature: Annotated[float, Field(ge=0, le=100)] | None = None
  top_p: Annotated[float, Field(gt=0, le=1)] | None = None
  top_k: Annotated[int, Field(ge=1)] | None = None  # not of OpenAI
  seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
  stop: _Stop = None
  stream: bool | None = None
  stream_options: dict[str, Any] | None = None
  user: str | None = None
  learn: bool | None = None  # not of OpenAI; by default on a session
  measure: bool = True  # not of OpenAI; losses after the levels have learned
  log_text: bool = False  # not of OpenAI; the audit log keeps the text
  # Of these, and of others below, `UNSERVED` has the names.
  n: Literal[1] | None = None
  presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
  frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
  logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
  # What clients send for the records of the provider.
  metadata: dict[str, Any] | None = None
  store: bool | None = None
  service_tier: str | None = None
  safety_identifier: str | None = None
  prompt_cache_key: str | None = None

  @pydantic.field_validator('stop')
  @classmethod
  def _check_stop(cls, stop: _Stop) -> _Stop:
    if isinstance(stop, list) and len(stop) > 16:
      raise ValueError('at most 16 strings')
    return stop

  @property
  def stops(self) -> tuple[str, ...]:
    """The strings that end the text."""
    stop = [self.stop] if isinstance(self.stop, str) else self.stop
    return tuple(stop or ())

  @property
  def wants_usage(self) -> bool:
    """Whether a stream ends with the numbers of tokens."""
    return bool((self.stream_options or {}).get('include_usage'))


class Completion(Drawing):
  """A body of /v1/completions."""

  prompt: str | list[str] | list[_Token] | list[list[_Token]] = ''
  max_tokens: Annotated[int, Field(ge=0)] | None = None
  logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
  document: bool = True  # not of OpenAI; False goes on with the text before
  best_of: Literal[1] | None = None
  echo: Literal[False] | None = None
  suffix: Literal[''] | None = None


class Part(Body):
  """A part of the content of a message."""

  type: Literal['text']
  text: str


class Message(pydantic.BaseModel):
  """A message of a chat; fields for tools and names are not read."""

  model_config = pydantic.ConfigDict(strict=True)
  role: Annotated[str, Field(min_length=1, max_length=40, pattern=r'^\w+$')]
  content: str | list[Part] | None = None

  @property
  def text(self) -> str:
    """Its text."""
    if isinstance(self.content, list):
      return ''.join(part.text for part in self.content)
    return self.content or ''


class Chat(Drawing):
  """A body of /v1/chat/completions."""

  messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
  max_tokens: Annotated[int, Field(ge=1)] | None = None
  max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
  logprobs: bool | None = None
  top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
  response_format: dict[Literal['type'], Literal['text']] | None = None
  tools: Annotated[list[Any], Field(max_length=0)] | None = None


class Create(Body):
  """A body of /v1/sessions and of .../fork."""

  name: Annotated[str, Field(max_length=80)] = ''


class Observe(Body):
  """A body of .../observe."""

  text: str
  learn: bool = True
  document: bool = True
  measure: bool = True
  log_text: bool = False


class Ask(Body):
  """A body of .../ask."""

  text: str = ''
  learn: bool = True
  document: bool = True
  max_tokens: Annotated[int, Field(ge=1)] | None = None
  temperature: Annotated[float, Field(ge=0, le=100)] = 0.8
  top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
  top_k: Annotated[int, Field(ge=1)] | None = None
  seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
  stop: Annotated[list[str], Field(max_length=16)] = []
  measure: bool = True
  log_text: bool = False


def _check_unicode(data: Any) -> None:
  """Refuses halves of escaped pairs, which are no text and no UTF-8."""
  if isinstance(data, str):
    try:
      data.encode()
    except UnicodeEncodeError as error:
      raise ValueError('a string is not Unicode text') from error
  elif isinstance(data, dict):
    _check_unicode([*data, *data.values()])
  elif isinstance(data, list):
    for item in data:
      _check_unicode(item)
