"""Fuzzes the routes: every answer is one of the API, and nothing breaks."""

import json
import pathlib

from absl.testing import absltest
import pytest

from nested_learning import serving
from tests import compiling
from tests.serving import tiny

pytestmark = pytest.mark.extra
pytest.importorskip('fastapi', reason='pip install nested-learning[serve]')
testclient = pytest.importorskip('starlette.testclient')
hypothesis = pytest.importorskip('hypothesis')
st = pytest.importorskip('hypothesis.strategies')

_LEAVES = (
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | st.text(max_size=20)
  | st.sampled_from(
    ['user', 'text', 'tiny', '\ud800', '\x00', '../..', '[DONE]']
  )
)
_JSON = st.recursive(
  _LEAVES,
  lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3),
  max_leaves=6,
)
_MESSAGES = st.lists(
  st.fixed_dictionaries(
    {'role': _LEAVES | st.just('user'), 'content': _JSON | st.text()}
  ),
  max_size=3,
)
_FIELDS = {
  'prompt': st.text(max_size=30) | st.lists(st.integers(-2, 300), max_size=9),
  'messages': _MESSAGES,
  'text': st.text(max_size=30),
  'max_tokens': st.integers(-1, 5),
  'temperature': st.floats(0, 2),
  'top_p': st.floats(0, 1),
  'top_k': st.integers(-1, 400),
  'seed': st.integers(),
  'stop': st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
  'logprobs': st.integers(-1, 21) | st.booleans(),
  'top_logprobs': st.integers(-1, 21),
  'n': st.integers(0, 2),
  'stream': st.booleans(),
  'learn': st.booleans(),
  'document': st.booleans(),
  'measure': st.booleans(),
  'log_text': st.booleans(),
  'user': st.text(max_size=5),
  'name': st.text(max_size=90),
}
_OF_ROUTE = {
  'completions': ['prompt'],
  'chat/completions': ['messages'],
  'sessions': [],
  'sessions/ID/observe': ['text'],
  'sessions/ID/ask': ['text'],
  'sessions/ID/fork': [],
  'sessions/ID/rollback': [],
  'sessions/ID/reset': [],
  'sessions/import': [],
}


@st.composite
def _requests(draw):
  """Draws a route and a body, of which most fields are right."""
  route = draw(st.sampled_from(sorted(_OF_ROUTE)))
  names = draw(st.lists(st.sampled_from(sorted(_FIELDS)), max_size=4))
  body = {
    name: draw(_FIELDS[name] if draw(st.integers(0, 9)) else _JSON)
    for name in {*names, *_OF_ROUTE[route]}
  }
  return route, body if draw(st.integers(0, 9)) else draw(_JSON)


class FuzzTest(absltest.TestCase):
  def test_every_answer_is_one_of_the_api(self):
    from nested_learning.serving import app

    self.enterContext(compiling.quickly())
    folder = pathlib.Path(self.create_tempdir().full_path)
    limits = {'max_draw_tokens': 4, 'max_sessions': 20, 'max_resident': 2}
    worker = serving.Worker(lambda: tiny.make_service(folder, **limits))
    self.addCleanup(worker.stop)
    client = self.enterContext(testclient.TestClient(app.make_app(worker)))
    id = client.post('/v1/sessions').json()['id']
    statuses = set()

    @hypothesis.settings(
      max_examples=150, deadline=None, derandomize=True, database=None
    )
    @hypothesis.given(_requests())
    def fuzz(request):
      route, body = request
      response = client.post(
        f'/v1/{route.replace("ID", id)}',
        content=json.dumps(body),
        headers={'content-type': 'application/json'},
      )
      statuses.add(response.status_code)
      self.assertIn(response.status_code, (200, 400, 404, 409, 422, 429))
      if response.status_code != 200:
        error = response.json()['error']
        self.assertNotEmpty(error['message'])
        self.assertNotIn('\n', error['message'])
        self.assertNotIn(str(folder), error['message'])
      elif response.headers['content-type'].startswith('text/event-stream'):
        lines = response.text.strip().split('\n\n')
        self.assertEqual(lines[-1], 'data: [DONE]')
        self.assertNotIn('server_error', response.text)
      else:
        json.dumps(response.json(), allow_nan=False)

    fuzz()
    self.assertContainsSubset({200, 400}, statuses)
    self.assertEqual(client.get('/health').json(), {'status': 'ok'})
    self.assertEqual(worker.service.engine.num_running, 0)
    names = {path.name for path in folder.iterdir()} - {'.lock'}
    for name in names:
      self.assertRegex(name, '^(sess|user)_[0-9a-f]+$')
    self.assertEqual(client.delete(f'/v1/sessions/{id}').status_code, 200)


if __name__ == '__main__':
  absltest.main()
