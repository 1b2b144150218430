"""Tests of the routes, by a client in this process and by OpenAI's own."""

import contextlib
import json
import pathlib
import socket
import threading
import time
from unittest import mock

from absl.testing import parameterized
import jax
import numpy as np
import pytest

from nested_learning import serving
from tests import compiling
from tests.serving import tiny

pytestmark = pytest.mark.extra
pytest.importorskip('fastapi', reason='pip install nested-learning[serve]')
openai = pytest.importorskip('openai')
testclient = pytest.importorskip('starlette.testclient')
uvicorn = pytest.importorskip('uvicorn')


def make_app(worker, **config):
  from nested_learning.serving import app

  return app.make_app(worker, app.AppConfig(**config))


class AppTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(compiling.quickly())
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.worker = serving.Worker(
      lambda: tiny.make_service(self.folder, **self.limits())
    )
    self.addCleanup(self.stop)
    self.client = self.connect()

  def limits(self):
    return {}

  def stop(self):
    if self.worker.is_alive:
      self.worker.stop()

  def connect(self, **config):
    return self.enterContext(
      testclient.TestClient(make_app(self.worker, **config))
    )

  def post(self, path, status=200, **body):
    response = self.client.post(path, json=body)
    self.assertEqual(response.status_code, status, response.text)
    return response.json()

  def create(self, **body):
    return self.post('/v1/sessions', **body)['id']

  def position(self, id):
    return self.client.get(f'/v1/sessions/{id}').json()['tokens']

  def stream(self, path, **body):
    """Returns the events of a stream."""
    with self.client.stream('POST', path, json=body) as response:
      self.assertEqual(response.status_code, 200)
      lines = [line for line in response.iter_lines() if line]
    self.assertEqual(lines[-1], 'data: [DONE]')
    return [json.loads(line.removeprefix('data: ')) for line in lines[:-1]]


class OpenAIRoutesTest(AppTest):
  def test_completions(self):
    body = {'prompt': 'ab', 'max_tokens': 6, 'seed': 3, 'logprobs': 2}
    one = self.post('/v1/completions', **body)
    (choice,) = one['choices']
    self.assertEqual(choice['finish_reason'], 'length')
    self.assertEqual(one['usage']['prompt_tokens'], 3)
    self.assertEqual(one['usage']['completion_tokens'], 6)
    self.assertLen(choice['logprobs']['token_logprobs'], 6)
    self.assertLessEqual(max(map(len, choice['logprobs']['top_logprobs'])), 2)
    again = self.post('/v1/completions', **body)
    self.assertEqual(again['choices'], one['choices'])
    several = self.post('/v1/completions', **{**body, 'prompt': ['x', 'ab']})
    self.assertEqual(several['choices'][1]['text'], choice['text'])
    tokens = self.post('/v1/completions', **{**body, 'prompt': [256, 97, 98]})
    self.assertEqual(tokens['choices'], one['choices'])
    events = self.stream(
      '/v1/completions',
      **body,
      stream=True,
      stream_options={'include_usage': True},
    )
    text = ''.join(e['choices'][0]['text'] for e in events[:-1])
    self.assertEqual(text, choice['text'])
    self.assertEqual(events[-2]['choices'][0]['finish_reason'], 'length')
    self.assertEqual(events[-1]['usage'], one['usage'])

  def test_sessions_by_header_and_by_user(self):
    id = self.create()
    self.client.headers['X-Session'] = id
    body = {'prompt': 'ab', 'max_tokens': 4, 'seed': 1}
    learned = self.post('/v1/completions', **body)['session']
    self.assertEqual(learned['id'], id)
    self.assertEqual(learned['tokens'], self.position(id))
    self.assertGreater(learned['tokens'], 3)
    quiet = self.post('/v1/completions', **body, learn=False)['session']
    self.assertEqual(quiet['tokens'], learned['tokens'])
    del self.client.headers['X-Session']
    for _ in range(2):
      self.post('/v1/completions', **body, user='me@example.com')
    users = self.client.get('/v1/sessions').json()['data'][1:]
    self.assertEqual([x['name'] for x in users], ['me@example.com'])
    self.assertNotIn('session', self.post('/v1/completions', **body))

  @parameterized.parameters(
    ('{', 'the body is not JSON .Expecting'),
    (b'{"prompt": "\xff"}', 'not JSON in UTF-8'),
    ('[' * 9999, 'too deep'),
    ('[]', 'dictionary'),
    ({}, None),
    ({'prompt': 3}, 'prompt'),
    ({'prompt': [1, 999]}, 'token 999'),
    ({'prompt': [-1]}, 'prompt'),
    ({'prompt': [10**30]}, 'less than'),
    ({'prompt': []}, '0 prompts'),
    ({'prompt': 'a\ud800'}, 'not Unicode'),
    ({'user': 'a\ud800'}, 'not Unicode'),
    ({'max_tokens': '3'}, 'max_tokens'),
    ({'max_tokens': 10**9}, 'tokens to be drawn'),
    ({'temperature': -1}, 'temperature'),
    ({'top_p': 0}, 'top_p'),
    ({'n': 2}, 'n: this server does not serve it'),
    ({'stop': ['x'] * 17}, 'stop'),
    ({'typo': 1}, 'typo'),
    ({'model': 'gpt'}, "no model 'gpt'"),
    ({'presence_penalty': 0.5}, 'presence_penalty'),
  )
  def test_refuses_bad_bodies_in_one_line(self, body, message):
    if isinstance(body, dict):
      body = json.dumps({'max_tokens': 2, 'prompt': 'a', **body})
    response = self.client.post(
      '/v1/completions',
      content=body,
      headers={'content-type': 'application/json'},
    )
    if message is None:
      self.assertEqual(response.status_code, 200)
      return
    self.assertIn(response.status_code, (400, 404))
    error = response.json()['error']
    self.assertRegex(error['message'], message)
    self.assertEqual(error['type'], 'invalid_request_error')
    self.assertNotIn('\n', error['message'])

  def test_health_and_metrics(self):
    self.post('/v1/completions', prompt='abc', max_tokens=3)
    self.assertEqual(self.client.get('/health').json(), {'status': 'ok'})
    text = self.client.get('/metrics').text
    self.assertIn('tokens_total{what="drawn"} 3.0', text)
    self.assertIn('requests_running 0.0', text)
    self.assertRegex(
      text, r'http_requests_total{route="/v1/completions",status="200"} 1.0'
    )

  def test_errors_of_a_stream_are_its_last_event(self):
    with mock.patch.object(
      serving.Engine, '_take', side_effect=RuntimeError('secret')
    ):
      events = self.stream(
        '/v1/completions', prompt='a', max_tokens=3, stream=True
      )
    self.assertEqual(events[-1]['error']['type'], 'server_error')
    self.assertNotIn('secret', str(events))

  def test_api_key_hosts_and_sizes(self):
    client = self.connect(key='geheim', max_bytes=200)
    path, body = '/v1/completions', {'prompt': 'a', 'max_tokens': 1}
    self.assertEqual(client.get('/health').status_code, 200)
    for key in (None, 'Bearer falsch', 'geheim'):
      headers = {} if key is None else {'authorization': key}
      response = client.post(path, json=body, headers=headers)
      self.assertEqual(response.status_code, 401)
      error = response.json()['error']
      self.assertEqual(error['type'], 'authentication_error')
    headers = {'authorization': 'Bearer geheim'}
    response = client.post(path, json=body, headers=headers)
    self.assertEqual(response.status_code, 200)
    long = json.dumps({**body, 'prompt': 'a' * 300}).encode()
    for content in (long, iter([long])):  # with a length, and without
      response = client.post(
        path,
        content=content,
        headers={**headers, 'content-type': 'application/json'},
      )
      self.assertEqual(response.status_code, 413)
      self.assertEqual(response.json()['error']['code'], 'body_too_large')
    headers['host'] = 'evil.example'
    self.assertEqual(client.get('/health', headers=headers).status_code, 400)

  def test_refuses_pages_of_other_sites(self):
    for origin, status in (
      ('http://testserver', 200),
      ('https://evil.example', 403),
      ('null', 403),
    ):
      response = self.client.post('/v1/sessions', headers={'origin': origin})
      self.assertEqual(response.status_code, status)
    self.assertEqual(response.json()['error']['code'], 'foreign_origin')
    self.assertLen(self.client.get('/v1/sessions').json()['data'], 1)

  def test_says_how_a_body_of_json_is_sent(self):
    kind = {'content-type': 'application/x-www-form-urlencoded'}
    response = self.client.post('/v1/sessions', content='{}', headers=kind)
    self.assertEqual(response.status_code, 400)
    self.assertIn(
      'content-type: application/json', response.json()['error']['message']
    )


class SessionRoutesTest(AppTest):
  def test_learn_fork_roll_back_and_reset(self):
    id = self.create(name='notes')
    path = f'/v1/sessions/{id}'
    health = self.client.get(f'{path}/health').json()
    start = health['fingerprint']
    self.assertEqual(start, health['fingerprint_of_checkpoint'])
    read = self.post(f'{path}/observe', text='ab' * 14)
    self.assertLess(read['loss_after'], read['loss'])
    self.assertEqual(read['steps']['fast'], 7)
    fork = self.post(f'{path}/fork', name='copy')
    self.assertEqual((fork['tokens'], fork['name']), (29, 'copy'))
    asked = self.post(f'{path}/ask', text='b', max_tokens=3, seed=1)
    self.assertEqual(asked['tokens'], 29 + 2 + asked['drawn'])
    quiet = self.post(f'{path}/ask', text='b', max_tokens=3, learn=False)
    self.assertEqual(quiet['tokens'], asked['tokens'])
    self.assertEqual(self.post(f'{path}/rollback')['tokens'], 29)
    self.assertEqual(self.post(f'{path}/reset')['fingerprint'], start)
    other = f'/v1/sessions/{fork["id"]}'
    self.assertEqual(self.position(fork['id']), 29)
    kinds = [x['kind'] for x in self.client.get(f'{path}/audit').json()['data']]
    self.assertEqual(kinds, ['create', 'observe', 'ask', 'rollback', 'reset'])
    file = self.client.get(f'{other}/export').content
    response = self.client.post('/v1/sessions/import?name=x', content=file)
    copy = response.json()['id']
    fingerprints = {
      self.client.get(f'/v1/sessions/{x}/health').json()['fingerprint']
      for x in (copy, fork['id'])
    }
    self.assertLen(fingerprints, 1)
    self.assertTrue(self.client.delete(other).json()['deleted'])
    listed = self.client.get('/v1/sessions').json()['data']
    self.assertEqual([x['id'] for x in listed], [id, copy])

  @parameterized.parameters(
    ('GET', '/sess_0', 404, 'session_not_found'),
    ('GET', '/..%2f..%2fetc%2fpasswd/health', 404, None),
    ('DELETE', '/%00', 404, 'session_not_found'),
    ('POST', '/import', 400, 'foreign_session'),
    ('POST', '/ID/rollback', 409, 'nothing_to_roll_back'),
    ('PUT', '/ID', 405, None),
    ('GET', '/ID/nothing', 404, None),
  )
  def test_refuses(self, method, path, status, code):
    path = path.replace('ID', self.create())
    response = self.client.request(method, f'/v1/sessions{path}')
    self.assertEqual(response.status_code, status)
    self.assertEqual(response.json()['error']['code'], code)
    self.assertEqual([x.name for x in self.folder.glob('.import*')], [])

  def test_empty_texts_are_refused_and_the_session_is_intact(self):
    id = self.create()
    for action in ('observe', 'ask'):
      error = self.post(f'/v1/sessions/{id}/{action}', 400, text='')['error']
      self.assertRegex(error['message'], 'nothing')
    self.assertEqual(self.position(id), 0)


class BusyServerTest(AppTest):
  def limits(self):
    return {'num_slots': 1, 'max_queue': 0, 'max_sessions': 1}

  def test_refuses_with_429_and_a_reason(self):
    self.create()
    error = self.post('/v1/sessions', 429)['error']
    self.assertEqual(error['code'], 'too_many_sessions')
    self.assertEqual(error['type'], 'rate_limit_error')
    service, engine = self.worker.service, self.worker.service.engine
    with mock.patch.object(engine, '_admit'):  # so that it waits
      request = serving.Request('x', text='a', draw=serving.Draw(9))
      self.worker.call(service.start, request, lambda result: None).result()
      error = self.post('/v1/completions', 429, prompt='a', max_tokens=1)[
        'error'
      ]
      self.assertEqual(error['code'], 'queue_full')
    # Asked between two steps; in one, a request is in neither of the two.
    count = lambda: engine.num_running + engine.num_waiting
    while self.worker.call(count).result():
      time.sleep(0.05)
    self.post('/v1/completions', prompt='a', max_tokens=1)


class OverTheNetworkTest(AppTest):
  def setUp(self):
    super().setUp()
    listener = socket.create_server(('127.0.0.1', 0))
    self.port = listener.getsockname()[1]
    server = uvicorn.Server(
      uvicorn.Config(make_app(self.worker, key='geheim'), log_level='warning')
    )
    server.install_signal_handlers = lambda: None
    thread = threading.Thread(
      target=server.run, kwargs={'sockets': [listener]}, daemon=True
    )
    thread.start()

    def stop():
      server.should_exit = True
      thread.join()

    self.addCleanup(stop)
    self.openai = openai.OpenAI(
      base_url=f'http://127.0.0.1:{self.port}/v1', api_key='geheim',
      max_retries=0,
    )  # fmt: skip
    self.addCleanup(self.openai.close)

  def test_the_official_client(self):
    client = self.openai
    (model,) = client.models.list()
    self.assertEqual(client.models.retrieve('tiny').id, model.id)
    completed = client.completions.create(
      model='tiny', prompt='ab', max_tokens=5, seed=1, logprobs=1
    )
    self.assertEqual(completed.usage.completion_tokens, 5)
    self.assertLen(completed.choices[0].logprobs.token_logprobs, 5)
    messages = [{'role': 'user', 'content': 'hello'}]
    settings = {'model': 'tiny', 'max_tokens': 5, 'seed': 2}
    chat = client.chat.completions.create(
      messages=messages, logprobs=True, top_logprobs=3, **settings
    )
    text = chat.choices[0].message.content
    content = chat.choices[0].logprobs.content
    self.assertLen(content, chat.usage.completion_tokens)
    self.assertLen(content[0].top_logprobs, 3)
    chunks = list(
      client.chat.completions.create(
        messages=messages,
        stream=True,
        stream_options={'include_usage': True},
        **settings,
      )
    )
    told = [x.choices[0].delta.content or '' for x in chunks if x.choices]
    self.assertEqual(''.join(told), text)
    self.assertEqual(chunks[-1].usage, chat.usage)
    with self.assertRaises(openai.BadRequestError) as caught:
      client.chat.completions.create(messages=[], **settings)
    self.assertIn('messages', caught.exception.message)
    with self.assertRaises(openai.NotFoundError):
      client.completions.create(model='gpt', prompt='a')
    with self.assertRaises(openai.AuthenticationError):
      client.with_options(api_key='x').models.list()

  def test_a_chat_on_a_session_by_the_official_client(self):
    client, messages, read = self.openai, [], []
    for i in range(2):
      messages.append({'role': 'user', 'content': f'question {i}'})
      chat = client.chat.completions.create(
        model='tiny', messages=messages, max_tokens=4, user='me'
      )
      read.append(chat.usage.prompt_tokens)
      text = chat.choices[0].message.content
      messages.append({'role': 'assistant', 'content': text})
      self.assertEqual(chat.session['steps'].keys(), {'fast', 'slow'})
    self.assertLess(read[1], read[0] + 2)  # not what it read before

  def test_a_client_that_goes_away_frees_its_slot(self):
    engine = self.worker.service.engine
    stream = self.openai.completions.create(
      model='tiny', prompt='a', max_tokens=4000, stream=True
    )
    next(iter(stream))
    self.assertEqual(engine.num_running, 1)
    stream.close()
    with contextlib.suppress(openai.APITimeoutError):
      self.openai.completions.create(
        model='tiny', prompt='a', max_tokens=4000, timeout=0.2
      )
    for _ in range(200):
      if not engine.num_running:
        break
      time.sleep(0.1)
    self.assertEqual(engine.num_running, 0)

  def test_sessions_side_by_side_do_not_mix(self):
    service = self.worker.service

    def ask(user):
      self.openai.completions.create(
        model='tiny', prompt=user * 9, max_tokens=5, seed=1, user=user
      )

    threads = [threading.Thread(target=ask, args=(x,)) for x in 'abcd']
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    for user in 'abcd':
      entry = self.worker.call(service.store.of_user, user).result()
      found, prompt = entry.session, np.array([256, *(user * 9).encode()])
      alone = tiny.base().fork()
      alone.feed(prompt, reset=np.arange(10) == 0)
      self.assertEqual(found.clock - alone.clock, 5)
      tokens = alone.generate(
        5, key=jax.random.key(1), vocab_size=tiny.VOCAB, keep=True
      )
      self.assertLen(tokens.tokens[0], 5)
      tiny.assert_equal(found.now, alone.now)
