"""The HTTP server: OpenAI's routes, sessions, health, metrics and a page.

Needs the packages of the extra `serve`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
import contextlib
import dataclasses
import json
import pathlib
import time
from typing import Any

import fastapi
from fastapi import exceptions
from starlette import exceptions as starlette_exceptions
from starlette import responses
from starlette.middleware import trustedhost

from nested_learning import errors
from nested_learning.serving import gate
from nested_learning.serving import limits as limits_lib
from nested_learning.serving import requests as requests_lib
from nested_learning.serving import schemas
from nested_learning.serving import service as service_lib
from nested_learning.serving import worker as worker_lib

_PAGE = pathlib.Path(__file__).with_name('page.html')
# The page loads nothing from elsewhere, and nobody may frame it.
_PAGE_HEADERS = {
  'content-security-policy': "default-src 'self'; style-src 'unsafe-inline'; "
  "script-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer',
}
_LOOK_SECONDS = 0.5  # between two looks whether a client has gone


@dataclasses.dataclass(frozen=True)
class AppConfig:
  """Settings of the server."""

  key: str | None = None  # that requests must send; None for none
  max_bytes: int = 16 * 2**20  # of a body
  max_import_bytes: int = 2**30  # of the file of a session
  # Names by which it may be called. Others are refused, so that a page of
  # another site cannot reach a server on its reader's machine.
  hosts: tuple[str, ...] = ('127.0.0.1', 'localhost', '[::1]', 'testserver')


class Server:
  """Worker, metrics and settings, shared by the routes."""

  def __init__(self, worker: worker_lib.Worker, config: AppConfig):
    self.worker, self.config = worker, config
    self.service = worker.service
    self.metrics = gate.Metrics(self.service)
    self.begun = int(time.time())

  async def call(self, function: Callable[..., Any], *args, **kwargs) -> Any:
    """Returns what a function of the service or the store returns."""
    return await asyncio.wrap_future(
      self.worker.call(function, *args, **kwargs)
    )

  async def find(self, id: str | None, user: str | None = None) -> Any:
    """Returns the session of a request, None if it names none."""
    store = self.service.store
    if id is not None:
      return await self.call(store.find, id)
    return await self.call(store.of_user, user) if user else None

  async def start(self, request: requests_lib.Request) -> 'Answer':
    """Queues a request."""
    answer = Answer(self, asyncio.get_running_loop())
    await answer.start(request)
    return answer

  async def finish(
    self, request: requests_lib.Request, http: fastapi.Request
  ) -> requests_lib.Result:
    """Queues a request and waits for its end.

    A client that goes away cancels it.
    """
    answer = await self.start(request)
    return await answer.result(http)


class Answer:
  """A request in work, seen from the event loop."""

  def __init__(self, server: Server, loop: asyncio.AbstractEventLoop):
    self._server, self._loop = server, loop
    self._pieces: asyncio.Queue = asyncio.Queue()
    self._ended: asyncio.Future = loop.create_future()
    self._running: service_lib.Running | None = None

  async def start(self, request: requests_lib.Request) -> None:
    """Hands the request to the service."""
    tell = self._loop.call_soon_threadsafe

    def on_end(result):
      with contextlib.suppress(RuntimeError):  # the loop has ended
        tell(self._end, result)

    def on_text(text, drawn):
      with contextlib.suppress(RuntimeError):
        tell(self._pieces.put_nowait, (text, drawn))

    self._running = await self._server.call(
      self._server.service.start, request, on_end, on_text
    )

  @property
  def num_read(self) -> int:
    """Tokens of the text."""
    return self._running.num_read

  def cancel(self) -> None:
    """Ends the request, if it has not ended."""
    if self._running is not None and not self._ended.done():
      with contextlib.suppress(errors.UserError):  # the server is ending
        self._server.worker.call(
          self._server.service.engine.cancel, self._running.ticket
        )

  async def result(self, http: fastapi.Request) -> requests_lib.Result:
    """Waits for the result."""
    try:
      while not self._ended.done():
        await asyncio.wait({self._ended}, timeout=_LOOK_SECONDS)
        if not self._ended.done() and await http.is_disconnected():
          raise limits_lib.RequestError(
            'the client has gone.', status=499, code='cancelled'
          )
      return self._ended.result()
    finally:
      self.cancel()

  async def pieces(self) -> AsyncIterator[Any]:
    """Yields (text, drawn) as they come, and then the result."""
    try:
      while (piece := await self._pieces.get()) is not None:
        yield piece
      yield self._ended.result()
    finally:
      self.cancel()

  def _end(self, result) -> None:
    if isinstance(result, Exception):
      self._ended.set_exception(result)
      self._ended.exception()  # nobody may ask for it
    else:
      self._ended.set_result(result)
      count = self._server.metrics.tokens.labels
      count('read').inc(result.num_read)
      count('drawn').inc(len(result.drawn))
      if result.steps:
        count('learned').inc(result.num_read + len(result.drawn))
    self._pieces.put_nowait(None)


def stream_events(events: AsyncIterator[dict]) -> responses.StreamingResponse:
  """Sends objects as server-sent events; an error is the last of them."""

  async def lines():
    try:
      async for event in events:
        yield f'data: {json.dumps(event)}\n\n'
    except Exception as error:
      _, body = _describe(error)
      yield f'data: {json.dumps(body)}\n\n'
    yield 'data: [DONE]\n\n'

  return responses.StreamingResponse(
    lines(),
    media_type='text/event-stream',
    headers={'cache-control': 'no-store', 'x-accel-buffering': 'no'},
  )


def make_app(
  worker: worker_lib.Worker, config: AppConfig | None = None
) -> fastapi.FastAPI:
  """Makes the app.

  Args:
    worker: The worker; the app does not stop it.
    config: Settings.

  Returns:
    An ASGI application.
  """
  # Both import this module.
  from nested_learning.serving import openai_routes
  from nested_learning.serving import session_routes

  config = AppConfig() if config is None else config
  server = Server(worker, config)
  # The usual pages of documentation load scripts from elsewhere.
  app = fastapi.FastAPI(title='Nested Learning', docs_url=None, redoc_url=None)
  app.add_middleware(
    gate.Gate,
    metrics=server.metrics,
    key=config.key,
    max_bytes=config.max_bytes,
    max_import_bytes=config.max_import_bytes,
  )
  app.add_middleware(
    trustedhost.TrustedHostMiddleware,
    allowed_hosts=list(config.hosts),
    www_redirect=False,
  )
  _add_errors(app)
  app.include_router(openai_routes.make_router(server))
  app.include_router(session_routes.make_router(server))

  @app.get('/', include_in_schema=False)
  async def page():
    return responses.FileResponse(_PAGE, headers=_PAGE_HEADERS)

  @app.get('/health')
  async def health():
    alive = worker.is_alive
    body = {'status': 'ok' if alive else 'ending'}
    return responses.JSONResponse(body, 200 if alive else 503)

  @app.get('/metrics')
  async def metrics():
    return server.metrics.render()

  return app


def _describe(error: Exception) -> tuple[int, dict]:
  status, body = gate.describe(error)
  if status >= 500:
    gate.log(error)
  return status, body


def _add_errors(app: fastapi.FastAPI) -> None:
  """Writes all errors as OpenAI's API does."""

  @app.exception_handler(exceptions.RequestValidationError)
  async def invalid(request, error):
    # Of the types that a value may have, the one that it is nearest to.
    nearness = lambda x: (len(x['loc']), not x['type'].endswith('_type'))
    found = max(error.errors(), key=nearness)
    path = [str(x) for x in found['loc'] if x != 'body']
    place = '.'.join(path)[:80] or 'the body'
    message = f'{place}: {found["msg"]}.'
    kind = request.headers.get('content-type', '')
    if path and path[0] in schemas.UNSERVED:
      message = f'{path[0]}: this server does not serve it; leave it out.'
    elif found['type'] == 'json_invalid':
      place = 'the body'
      message = f'the body is not JSON ({found["ctx"]["error"]}).'
    elif not path and 'json' not in kind:
      message = (
        f'the body is {kind[:80] or "of no type"} and is not read as JSON; '
        'send it with the header content-type: application/json.'
      )
    body = gate.error_body(message, 400, 'invalid')
    body['error']['param'] = place
    return responses.JSONResponse(body, 400)

  @app.exception_handler(starlette_exceptions.HTTPException)
  async def http(request, error):
    message = str(error.detail)
    if error.status_code in (404, 405):
      message = (
        f'there is no {request.method} {request.url.path[:80]!r}; see '
        '/openapi.json.'
      )
    elif error.status_code == 400:
      message = 'the body is not JSON in UTF-8, or is too deep; send an object.'
    body = gate.error_body(message, error.status_code)
    return responses.JSONResponse(
      body, error.status_code, headers=error.headers
    )

  async def other(_, error):
    status, body = _describe(error)
    return responses.JSONResponse(body, status)

  app.add_exception_handler(errors.UserError, other)
  app.add_exception_handler(Exception, other)
