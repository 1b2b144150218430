"""ASGI middleware: size of bodies, the API key, metrics of every request."""

import secrets
import time

from absl import logging
import fastapi
import prometheus_client
from starlette import responses

from nested_learning import errors
from nested_learning.serving import limits as limits_lib
from nested_learning.serving import service as service_lib

_OPEN = ('/', '/health')  # without the key
_NO_KEY = 'the API key is missing or wrong; send Authorization: Bearer KEY.'
_FOREIGN = (
  'pages of other sites cannot call this server; call it from its own page or '
  'from a program.'
)
_TYPES = {401: 'authentication_error', 429: 'rate_limit_error'}


def error_body(message: str, status: int, code: str | None = None) -> dict:
  """Returns an error as OpenAI's API writes it, in one line."""
  kind = 'server_error' if status >= 500 else 'invalid_request_error'
  return {
    'error': {
      'message': ' '.join(message.split()),
      'type': _TYPES.get(status, kind),
      'param': None,
      'code': code,
    }
  }


def describe(error: Exception) -> tuple[int, dict]:
  """Returns status and body of an error; bugs do not show their text."""
  if isinstance(error, limits_lib.RequestError):
    return error.status, error_body(str(error), error.status, error.code)
  if isinstance(error, errors.Retryable):
    return 503, error_body(str(error), 503, 'disk')
  if isinstance(error, errors.UserError):
    return 400, error_body(str(error), 400, 'invalid')
  name = type(error).__name__
  return 500, error_body(f'{name}; the log of the server has more.', 500)


def log(error: Exception) -> None:
  """Logs an error that is no request's fault; bugs with their place."""
  if not isinstance(error, limits_lib.RequestError):
    place = error if errors.is_bug(error) else None
    logging.error('%s', error, exc_info=place)


class Metrics:
  """Prometheus metrics of a server, in a registry of their own."""

  def __init__(self, service: service_lib.Service):
    self.registry = prometheus_client.CollectorRegistry()
    add = {'registry': self.registry}
    self.requests = prometheus_client.Counter(
      'http_requests', 'Requests.', ['route', 'status'], **add
    )
    self.seconds = prometheus_client.Histogram(
      'http_request_seconds', 'Seconds to the end.', ['route'], **add
    )
    self.tokens = prometheus_client.Counter(
      'tokens', 'Tokens that were read, drawn or learned.', ['what'], **add
    )
    engine, store = service.engine, service.store
    for name, text, read in (
      ('requests_running', 'In a slot.', lambda: engine.num_running),
      ('requests_waiting', 'Without a slot.', lambda: engine.num_waiting),
      ('sessions', 'In memory or files.', lambda: len(store)),
      ('sessions_resident', 'In memory.', lambda: store.num_resident),
    ):
      prometheus_client.Gauge(name, text, **add).set_function(read)

  def render(self) -> fastapi.Response:
    """Returns the page that Prometheus reads."""
    content = prometheus_client.generate_latest(self.registry)
    kind = prometheus_client.CONTENT_TYPE_LATEST
    return fastapi.Response(content, media_type=kind)


class Gate:
  """Checks every request before the routes see it, and counts it."""

  def __init__(
    self,
    app,
    *,
    metrics: Metrics,
    key: str | None,
    max_bytes: int,
    max_import_bytes: int,
  ):
    self._app, self._metrics, self._key = app, metrics, key
    self._max_bytes, self._max_import_bytes = max_bytes, max_import_bytes

  async def __call__(self, scope, receive, send):
    """Serves a request of ASGI."""
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    is_import = scope['path'] == '/v1/sessions/import'
    most = self._max_import_bytes if is_import else self._max_bytes
    begin, status, left = time.perf_counter(), 500, most
    is_begun = is_refused = False
    headers = {k.lower(): v for k, v in scope['headers']}

    async def count(message):
      nonlocal status, is_begun
      if left < 0 and not is_refused and not is_begun:
        return  # the routes know no better than that the body is broken
      if message['type'] == 'http.response.start':
        status, is_begun = message['status'], True
      await send(message)

    async def limit():
      nonlocal left
      message = await receive()
      left -= len(message.get('body', b''))
      return {'type': 'http.disconnect'} if left < 0 else message

    async def refuse(code, message, name):
      nonlocal is_refused
      is_refused = True
      response = responses.JSONResponse(error_body(message, code, name), code)
      await response(scope, receive, count)

    too_large = (
      f'the body is longer than the {most} bytes that this server '
      'takes; send it in parts.'
    )
    length = headers.get(b'content-length', b'0')
    try:
      if _is_foreign(headers):
        await refuse(403, _FOREIGN, 'foreign_origin')
      elif scope['path'] not in _OPEN and not self._knows(headers):
        await refuse(401, _NO_KEY, 'invalid_api_key')
      elif length.isdigit() and int(length) > most:
        await refuse(413, too_large, 'body_too_large')
      else:
        await self._app(scope, limit, count)
        if left < 0 and not is_begun:
          await refuse(413, too_large, 'body_too_large')
    finally:
      route = scope.get('route')
      name = getattr(route, 'path', None) or 'other'
      self._metrics.requests.labels(name, str(status)).inc()
      self._metrics.seconds.labels(name).observe(time.perf_counter() - begin)

  def _knows(self, headers) -> bool:
    if self._key is None:
      return True
    given = headers.get(b'authorization', b'')
    expected = f'Bearer {self._key}'.encode()
    return secrets.compare_digest(given, expected)


def _is_foreign(headers) -> bool:
  """Returns whether a browser sent this for a page of another site."""
  origin, host = headers.get(b'origin'), headers.get(b'host', b'')
  return origin is not None and origin.partition(b'://')[2] != host
