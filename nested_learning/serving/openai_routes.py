"""OpenAI's routes: models, completions, chats."""

import itertools
import secrets
import time
from typing import Annotated, Any

import fastapi

from nested_learning import inference
from nested_learning.serving import app as app_lib
from nested_learning.serving import engine as engine_lib
from nested_learning.serving import limits as limits_lib
from nested_learning.serving import requests as requests_lib
from nested_learning.serving import schemas

_MAX_PROMPTS = 64  # of one request
_DEFAULT_TOKENS = 256  # of an answer, if nobody says how many
SessionId = Annotated[str | None, fastapi.Header(alias='X-Session')]


def make_router(server: app_lib.Server) -> fastapi.APIRouter:
  """Makes the routes."""
  router = fastapi.APIRouter()
  checkpoint = server.service.checkpoint

  def about_model() -> dict[str, Any]:
    return {
      'id': checkpoint.name,
      'object': 'model',
      'created': server.begun,
      'owned_by': 'nested_learning',
    }

  @router.get('/v1/models')
  async def models():
    return {'object': 'list', 'data': [about_model()]}

  @router.get('/v1/models/{name:path}')
  async def model(name: str):
    check_model(checkpoint, name)
    return about_model()

  @router.post('/v1/completions')
  async def completions(
    body: schemas.Completion, http: fastapi.Request, session: SessionId = None
  ):
    check_model(checkpoint, body.model)
    entry = await server.find(session, body.user)
    base = {
      'id': f'cmpl-{secrets.token_hex(12)}',
      'object': 'text_completion',
      'created': int(time.time()),
      'model': checkpoint.name,
    }
    requests = [
      requests_lib.Request(
        'complete',
        text=text,
        session=entry,
        document=body.document,
        draw=make_draw(server, text, body, body.max_tokens, body.logprobs or 0),
        stops=body.stops,
        **learning(body, entry),
      )
      for text in _prompts(body.prompt)
    ]
    if body.stream:
      if len(requests) > 1:
        raise limits_lib.RequestError('a stream takes one prompt; send one.')
      answer = await server.start(requests[0])
      return app_lib.stream_events(
        _stream_completion(base, body, answer, entry)
      )
    results = await _finish_all(server, requests, http)
    choices = [
      {
        'index': i,
        'text': result.text,
        'finish_reason': result.reason,
        'logprobs': _completion_logprobs(body, result.drawn),
      }
      for i, result in enumerate(results)
    ]
    return {
      **base,
      'choices': choices,
      'usage': _usage(*results),
      **about_session(entry, results[-1]),
    }

  @router.post('/v1/chat/completions')
  async def chat(
    body: schemas.Chat, http: fastapi.Request, session: SessionId = None
  ):
    check_model(checkpoint, body.model)
    entry = await server.find(session, body.user)
    num_tokens = body.max_completion_tokens or body.max_tokens
    num_top = (body.top_logprobs or 0) if body.logprobs else 0
    messages = [{'role': x.role, 'content': x.text} for x in body.messages]
    request = requests_lib.Request(
      'chat',
      messages=messages,
      session=entry,
      draw=make_draw(server, None, body, num_tokens, num_top),
      stops=body.stops + checkpoint.chat_stops,
      **learning(body, entry),
    )
    base = {
      'id': f'chatcmpl-{secrets.token_hex(12)}',
      'created': int(time.time()),
      'model': checkpoint.name,
    }
    answer = await server.start(request)
    if body.stream:
      return app_lib.stream_events(_stream_chat(base, body, answer, entry))
    result = await answer.result(http)
    message = {'role': 'assistant', 'content': result.text, 'refusal': None}
    choice = {
      'index': 0,
      'message': message,
      'finish_reason': result.reason,
      'logprobs': _chat_logprobs(body, result.drawn),
    }
    return {
      **base,
      'object': 'chat.completion',
      'choices': [choice],
      'usage': _usage(result),
      **about_session(entry, result),
    }

  return router


def check_model(checkpoint: requests_lib.Checkpoint, name: str | None) -> None:
  """Raises an error if a request asks for another model."""
  if name not in (None, '', checkpoint.name):
    raise limits_lib.RequestError(
      f'there is no model {name[:80]!r}; this server has {checkpoint.name!r}.',
      status=404,
      code='model_not_found',
    )


def make_draw(
  server: app_lib.Server,
  text: Any,
  body: Any,
  num_tokens: int | None,
  num_top: int,
) -> engine_lib.Draw | None:
  """Returns how a request is continued; None if nothing is to be drawn."""
  if num_tokens == 0:
    return None
  limits, stream = server.service.limits, server.service.engine.max_stream
  if num_tokens is None:
    num_tokens = min(_DEFAULT_TOKENS, limits.max_draw_tokens)
    if stream is not None:
      num_tokens = min(num_tokens, max(stream // 2, 1))
  temperature = 1.0 if body.temperature is None else body.temperature
  # A request without a seed draws something else every time.
  seed = secrets.randbits(63) if body.seed is None else body.seed % 2**63
  settings = inference.DrawSettings(
    seed, temperature, body.top_k, body.top_p or 1.0, num_top
  )
  return engine_lib.Draw(num_tokens, settings)


def learning(body: Any, entry: Any) -> dict[str, bool]:
  """Returns whether a request learns: by default, on a session."""
  learn = entry is not None if body.learn is None else body.learn
  return {'learn': learn, 'measure': body.measure, 'log_text': body.log_text}


def about_session(entry: Any, result: requests_lib.Result) -> dict[str, Any]:
  """Returns what the answer says about the session, beside OpenAI's fields."""
  if entry is None:
    return {}
  return {
    'session': {
      'id': entry.id,
      'tokens': entry.position,
      **result.losses,
      'steps': result.steps,
    }
  }


def _prompts(prompt: Any) -> list[Any]:
  """Returns the texts of a request, each a string or tokens."""
  is_tokens = isinstance(prompt, list) and isinstance((*prompt, '')[0], int)
  if isinstance(prompt, str) or is_tokens:
    return [prompt]
  if not 1 <= len(prompt) <= _MAX_PROMPTS:
    raise limits_lib.RequestError(
      f'{len(prompt)} prompts; send from 1 to {_MAX_PROMPTS}.'
    )
  return prompt


async def _finish_all(server, requests, http) -> list[requests_lib.Result]:
  """Serves several requests; the first error cancels the others."""
  answers = []
  try:
    for request in requests:
      answers.append(await server.start(request))
    return [await answer.result(http) for answer in answers]
  finally:
    for answer in answers:
      answer.cancel()


def _usage(*results: requests_lib.Result) -> dict[str, int]:
  read = sum(result.num_read for result in results)
  drawn = sum(len(result.drawn) for result in results)
  return {
    'prompt_tokens': read,
    'completion_tokens': drawn,
    'total_tokens': read + drawn,
  }


def _completion_logprobs(body, drawn, offset: int = 0) -> dict | None:
  if body.logprobs is None:
    return None
  lengths = [len(x.text) for x in drawn]
  offsets = itertools.accumulate(lengths, initial=offset)
  return {
    'tokens': [x.text for x in drawn],
    'token_logprobs': [x.logprob for x in drawn],
    'top_logprobs': [dict(x.top) for x in drawn],
    'text_offset': list(offsets)[:-1],
  }


def _chat_logprobs(body, drawn) -> dict | None:
  if not body.logprobs:
    return None

  def one(text, logprob):
    # A part of a character alone has no bytes that its text would show.
    known = None if '\ufffd' in text else list(text.encode())
    return {'token': text, 'logprob': logprob, 'bytes': known}

  content = [
    {**one(x.text, x.logprob), 'top_logprobs': [one(*top) for top in x.top]}
    for x in drawn
  ]
  return {'content': content, 'refusal': None}


async def _stream_completion(base, body, answer, entry):
  offset = 0

  def chunk(text, drawn, reason=None):
    choice = {
      'index': 0,
      'text': text,
      'finish_reason': reason,
      'logprobs': _completion_logprobs(body, drawn, offset),
    }
    return {**base, 'choices': [choice]}

  async for piece in answer.pieces():
    if isinstance(piece, requests_lib.Result):
      end = chunk('', [], piece.reason)
      yield {**end, **about_session(entry, piece)}
      if body.wants_usage:
        yield {**base, 'choices': [], 'usage': _usage(piece)}
    else:
      yield chunk(*piece)
      offset += len(piece[0])


async def _stream_chat(base, body, answer, entry):
  def chunk(delta, drawn=(), reason=None):
    choice = {
      'index': 0,
      'delta': delta,
      'finish_reason': reason,
      'logprobs': _chat_logprobs(body, drawn) if drawn else None,
    }
    return {**base, 'object': 'chat.completion.chunk', 'choices': [choice]}

  yield chunk({'role': 'assistant', 'content': ''})
  async for piece in answer.pieces():
    if isinstance(piece, requests_lib.Result):
      yield {**chunk({}, reason=piece.reason), **about_session(entry, piece)}
      if body.wants_usage:
        empty = {**chunk({}), 'choices': []}
        yield {**empty, 'usage': _usage(piece)}
    else:
      yield chunk({'content': piece[0]}, piece[1])
