"""Routes of sessions: begin them, teach them, ask, copy and undo."""

from typing import Annotated, Any

import fastapi
from starlette import responses

from nested_learning.serving import app as app_lib
from nested_learning.serving import openai_routes
from nested_learning.serving import requests as requests_lib
from nested_learning.serving import schemas

_BINARY = 'application/octet-stream'


def make_router(server: app_lib.Server) -> fastapi.APIRouter:
  """Makes the routes."""
  router = fastapi.APIRouter(prefix='/v1/sessions')
  store = server.service.store

  async def describe(function, *args, **kwargs) -> dict[str, Any]:
    entry = await server.call(function, *args, **kwargs)
    return entry.describe()

  @router.get('')
  async def list_all():
    entries = await server.call(store.all)
    return {'object': 'list', 'data': [entry.describe() for entry in entries]}

  @router.post('')
  async def create(body: schemas.Create | None = None):
    return await describe(store.create, body.name if body else '')

  @router.post('/import')
  async def import_file(http: fastapi.Request, name: str = ''):
    content = await http.body()
    return await describe(store.import_file, content, name[:80])

  @router.get('/{id}')
  async def get(id: str):
    return await describe(store.find, id)

  @router.delete('/{id}')
  async def delete(id: str):
    await server.call(store.delete, id)
    return {'id': id, 'object': 'session', 'deleted': True}

  @router.post('/{id}/observe')
  async def observe(id: str, body: schemas.Observe, http: fastapi.Request):
    entry = await server.find(id)
    request = requests_lib.Request(
      'observe',
      text=body.text or None,
      session=entry,
      document=body.document,
      **openai_routes.learning(body, entry),
    )
    result = await server.finish(request, http)
    return {
      'object': 'session.observation',
      'read': result.num_read,
      **openai_routes.about_session(entry, result)['session'],
    }

  @router.post('/{id}/ask')
  async def ask(id: str, body: schemas.Ask, http: fastapi.Request):
    entry = await server.find(id)
    request = requests_lib.Request(
      'ask',
      text=body.text or None,
      session=entry,
      document=body.document,
      draw=openai_routes.make_draw(server, body.text, body, body.max_tokens, 0),
      stops=tuple(body.stop),
      **openai_routes.learning(body, entry),
    )
    result = await server.finish(request, http)
    return {
      'object': 'session.answer',
      'text': result.text,
      'reason': result.reason,
      'read': result.num_read,
      'drawn': len(result.drawn),
      **openai_routes.about_session(entry, result)['session'],
    }

  @router.post('/{id}/fork')
  async def fork(id: str, body: schemas.Create | None = None):
    return await describe(store.fork, id, body.name if body else '')

  @router.post('/{id}/rollback')
  async def rollback(id: str):
    return await describe(store.rollback, id)

  @router.post('/{id}/reset')
  async def reset(id: str):
    await server.call(store.reset, id)
    return await server.call(store.health, id)

  @router.get('/{id}/health')
  async def health(id: str):
    return await server.call(store.health, id)

  @router.get('/{id}/export')
  async def export(id: str):
    content = await server.call(store.export, id)
    return responses.Response(
      content,
      media_type=_BINARY,
      headers={'content-disposition': 'attachment; filename="me.session"'},
    )

  @router.get('/{id}/audit')
  async def audit(
    id: str, limit: Annotated[int, fastapi.Query(ge=1, le=10_000)] = 1000
  ):
    lines = await server.call(store.audit, id)
    return {'object': 'list', 'data': lines[-limit:]}

  return router
