"""Fuzzes the routes: every answer is one of the API, and nothing breaks."""

import json
import pathlib
import urllib.parse

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
  """Draws a route, a body of which most fields are right, and a session."""
  route = draw(st.sampled_from(sorted(_OF_ROUTE)))
  names = draw(st.lists(st.sampled_from(sorted(_FIELDS)), max_size=4))
  body = {
    name: draw(_FIELDS[name] if draw(st.integers(0, 9)) else _JSON)
    for name in {*names, *_OF_ROUTE[route]}
  }
  session = draw(st.none() | st.just('ID') | st.text(max_size=5))
  return route, body if draw(st.integers(0, 9)) else draw(_JSON), session


_TEXT = st.text(st.characters(codec='utf-8'), max_size=12)
_ACTIONS = ('', *'audit export fork health reset rollback observe ask'.split())


@st.composite
def _calls(draw):
  """Draws a method and a path of a session, known or not, without a body."""
  method = draw(st.sampled_from(['GET', 'POST', 'PUT', 'DELETE', 'HEAD']))
  action = draw(st.sampled_from(_ACTIONS) | _TEXT)
  known = method != 'DELETE' and draw(st.booleans())
  id = 'ID' if known else draw(_TEXT | st.sampled_from(['..', '.lock', '%00']))
  path = '/'.join(urllib.parse.quote(x, safe='') for x in (id, action) if x)
  query = draw(
    st.just('') | st.just('?limit=') | st.integers().map('?limit={}'.format)
  )
  return method, f'/{path}{query}'


class FuzzTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    from nested_learning.serving import app

    self.enterContext(compiling.quickly())
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    limits = {'max_draw_tokens': 4, 'max_sessions': 20, 'max_resident': 2}
    self.worker = serving.Worker(
      lambda: tiny.make_service(self.folder, **limits)
    )
    self.addCleanup(self.worker.stop)
    self.client = self.enterContext(
      testclient.TestClient(app.make_app(self.worker))
    )
    self.id = self.client.post('/v1/sessions').json()['id']

  def fingerprint(self):
    store = self.worker.service.store
    find = lambda: store.load(store.find(self.id)).state_fingerprint()
    return self.worker.call(find).result()

  def check_error(self, response):
    """Checks an error; returns its status."""
    self.assertIn(response.status_code, (400, 404, 405, 409, 422, 429))
    error = response.json()['error']
    self.assertNotEmpty(error['message'])
    self.assertNotIn('\n', error['message'])
    self.assertNotIn(str(self.folder), error['message'])
    return response.status_code

  def test_no_call_of_a_session_breaks_it(self):
    observed = self.client.post(
      f'/v1/sessions/{self.id}/observe', json={'text': 'abcdefg'}
    )
    self.assertEqual(observed.status_code, 200)
    statuses = set()

    @hypothesis.settings(
      max_examples=100, deadline=None, derandomize=True, database=None
    )
    @hypothesis.given(_calls())
    def fuzz(call):
      method, path = call
      before = self.fingerprint()
      response = self.client.request(
        method, f'/v1/sessions{path.replace("ID", self.id)}'
      )
      statuses.add(response.status_code)
      if response.status_code != 200:
        if method != 'HEAD':
          self.check_error(response)
        self.assertEqual(self.fingerprint(), before)

    fuzz()
    self.assertContainsSubset({200, 400, 404, 405}, statuses)
    self.assertEqual(self.client.get('/health').json(), {'status': 'ok'})

  def test_damaged_files_of_sessions_are_refused(self):
    path = f'/v1/sessions/{self.id}'
    self.client.post(f'{path}/observe', json={'text': 'abcdefg'})
    file, before = self.client.get(f'{path}/export').content, self.fingerprint()

    @hypothesis.settings(
      max_examples=60, deadline=None, derandomize=True, database=None
    )
    @hypothesis.given(
      st.integers(0, len(file) - 1), st.integers(1, 255), st.integers(0, 9)
    )
    def fuzz(place, change, cut):
      damaged = bytearray(file)
      damaged[place] ^= change
      damaged = bytes(damaged[:place]) if not cut else bytes(damaged)
      response = self.client.post('/v1/sessions/import', content=damaged)
      self.assertEqual(self.check_error(response), 400)
      self.assertEqual(response.json()['error']['code'], 'foreign_session')

    fuzz()
    self.assertEqual(self.fingerprint(), before)
    self.assertEqual([x.name for x in self.folder.glob('.import*')], [])
    response = self.client.post('/v1/sessions/import', content=file)
    self.assertEqual(response.status_code, 200)

  def test_every_answer_is_one_of_the_api(self):
    client, id, statuses = self.client, self.id, set()

    @hypothesis.settings(
      max_examples=150, deadline=None, derandomize=True, database=None
    )
    @hypothesis.given(_requests())
    def fuzz(request):
      route, body, session = request
      headers = {'content-type': 'application/json'}
      if session is not None:
        headers['X-Session'] = session.replace('ID', id).encode()
      before = self.fingerprint()
      response = client.post(
        f'/v1/{route.replace("ID", id)}',
        content=json.dumps(body),
        headers=headers,
      )
      statuses.add(response.status_code)
      if response.status_code != 200:
        self.check_error(response)
        self.assertEqual(self.fingerprint(), before)
      elif response.headers['content-type'].startswith('text/event-stream'):
        lines = response.text.strip().split('\n\n')
        self.assertEqual(lines[-1], 'data: [DONE]')
        self.assertNotIn('server_error', response.text)
      else:
        json.dumps(response.json(), allow_nan=False)

    fuzz()
    self.assertContainsSubset({200, 400}, statuses)
    self.assertEqual(client.get('/health').json(), {'status': 'ok'})
    self.assertEqual(self.worker.service.engine.num_running, 0)
    names = {path.name for path in self.folder.iterdir()} - {'.lock'}
    for name in names:
      self.assertRegex(name, '^(sess|user)_[0-9a-f]+$')
    self.assertEqual(client.delete(f'/v1/sessions/{id}').status_code, 200)
