"""Tests of the service: texts and chats, on sessions and without."""

import pathlib

from absl.testing import parameterized
import jax
import numpy as np

from nested_learning import data
from nested_learning import inference
from nested_learning import serving
from nested_learning.serving import texts
from tests import compiling
from tests.serving import tiny


def render_marked(messages):
  """A template in which an answer has an end, and a chat a first line."""
  lines = [f'[{x["role"]}]{x["content"]}[end]\n' for x in messages]
  return 'BEGIN\n' + ''.join(lines) + '[assistant]'


class TextsTest(parameterized.TestCase):
  def add(self, text, stops):
    """Adds the bytes of a text; returns what was told, and what was kept."""
    stream = texts.TextStream(data.make_tokenizer('bytes'), np.zeros(0), stops)
    told = []
    for token in text.encode():
      kept = stream.add(token)
      if kept is not None:
        return [*told, stream.take(all=True)], kept
      told.append(stream.take())
    return [*told, stream.take(all=True)], None

  @parameterized.parameters(
    ('a whole text', (), 'a whole text', None),
    ('one. STOP two', ('STOP',), 'one. ', 5),
    ('one. STO', ('STOP',), 'one. STO', None),
    ('aab', ('ab',), 'a', 1),
    ('x\n\ny', ('\n\n', 'y'), 'x', 1),
    ('naïve ☃!', ('☃',), 'naïve ', 7),
    ('STOP', ('STOP',), '', 0),
  )
  def test_stop_strings(self, text, stops, expected, kept):
    told, found = self.add(text, stops)
    self.assertEqual(''.join(told), expected)
    self.assertEqual(found, kept)

  def test_tells_whole_characters_as_they_come(self):
    told, _ = self.add('aï☃', ())
    self.assertEqual(told, ['a', '', 'ï', '', '', '☃', ''])

  @parameterized.parameters(texts.render_plainly, render_marked)
  def test_turns_add_up_to_the_whole_chat(self, render):
    chat = [
      {'role': role, 'content': f'{role} {i}'}
      for i, role in enumerate(['user', 'assistant'] * 3 + ['user'])
    ]
    whole = render(chat[:1])
    for n in (2, 4, 6):
      whole += chat[n - 1]['content']
      turn = texts.render_turn(render, chat[:n], chat[n : n + 1])
      whole += turn
      other = texts.render_turn(render, chat[:2], chat[n : n + 1])
      self.assertEqual(turn, other)  # whatever was said before
    self.assertEqual(whole, render(chat))


class ServiceTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(compiling.quickly())
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.service = self.open()

  def open(self, render=render_marked, **limits):
    service = tiny.make_service(self.folder, render_chat=render, **limits)
    self.addCleanup(service.store._folder.close)
    return service

  def ask(self, kind='complete', num_tokens=5, temperature=1.0, **kwargs):
    settings = inference.DrawSettings(seed=1, temperature=temperature)
    draw = serving.Draw(num_tokens, settings) if num_tokens else None
    found, told = [], []
    self.service.start(
      serving.Request(kind, draw=draw, **kwargs),
      found.append,
      lambda text, drawn: told.append((text, drawn)),
    )
    while self.service.step():
      pass
    (result,) = found
    if isinstance(result, Exception):
      raise result
    self.assertEqual(''.join(text for text, _ in told), result.text)
    return result

  def test_texts_equal_a_session_alone(self):
    tokenizer = data.make_tokenizer('bytes')
    entry, alone = self.service.store.create(), tiny.base().fork()
    notes = np.array([256, *b'some notes'])
    losses = alone.feed(notes, reset=np.arange(len(notes)) == 0)
    result = self.ask(
      'observe', 0, text='some notes', session=entry, learn=True
    )
    self.assertAlmostEqual(result.losses['loss'], np.nanmean(losses), places=5)
    self.assertEqual(result.steps, {'fast': 2, 'slow': 1})
    tiny.assert_equal(entry.session.now, alone.now)
    prompt = np.array([256, *b'and?'])
    found = alone.generate(
      5,
      prompt=prompt,
      reset=np.arange(5) == 0,
      key=jax.random.key(1),
      stop_token=256,
      vocab_size=tiny.VOCAB,
      keep=True,
    )
    result = self.ask(text='and?', session=entry, learn=True)
    length = int(found.lengths[0])
    tokens = np.asarray(found.tokens)[0, :length]
    self.assertEqual(result.text, tokenizer.decode_after(prompt, tokens))
    self.assertLen(result.drawn, length)
    tiny.assert_equal(entry.session.now, alone.now)
    lines = self.service.store.audit(entry.id)
    self.assertEqual(
      [line['kind'] for line in lines], ['create', 'observe', 'complete']
    )
    self.assertNotIn('notes', str(lines))

  def test_requests_that_do_not_learn_leave_no_trace(self):
    entry = self.service.store.create()
    self.ask('observe', 0, text='some notes', session=entry, learn=True)
    before, log = entry.session.now, self.service.store.audit(entry.id)
    for session in (entry, None):
      self.ask(text='more', session=session)
      self.ask('observe', 0, text='more', session=session)
    self.assertIs(entry.session.now, before)
    self.assertEqual(self.service.store.audit(entry.id), log)

  def test_chats_read_only_what_is_new(self):
    store = self.service.store
    chat, entry, short = [], store.create(), store.create()
    read = 0
    for i in range(3):
      chat.append({'role': 'user', 'content': f'say {i}'})
      result = self.ask('chat', messages=chat, session=entry, learn=True)
      again = self.ask('chat', messages=chat[-1:], session=short, learn=True)
      self.assertEqual(again.num_read, result.num_read)
      chat.append({'role': 'assistant', 'content': result.text})
      read += result.num_read + len(result.drawn)
    tiny.assert_equal(entry.session.now, short.session.now)
    self.assertEqual(entry.position, read)
    self.assertLen(entry.messages, 6)
    whole = self.service.encode(serving.Request('chat', messages=chat))[0]
    told = sum(len(x['content'].encode()) for x in chat)
    self.assertLess(read, len(whole) + told)
    # Messages of a request that did not learn are new to the next one.
    fork = store.fork(entry.id)
    more = [*chat, {'role': 'user', 'content': 'quietly'}]
    first = self.ask('chat', messages=more, session=fork)
    second = self.ask('chat', messages=more, session=fork, learn=True)
    self.assertEqual(first.num_read, second.num_read)

  def test_stop_strings_end_text_and_what_is_learned(self):
    whole = self.ask(text='hello', num_tokens=40)
    stop = whole.text[3:5]
    cut = self.ask(text='hello', num_tokens=40, stops=(stop,))
    self.assertEqual(cut.text, whole.text[: whole.text.index(stop)])
    self.assertEqual(cut.reason, 'stop')
    entry = self.service.store.create()
    self.ask(
      text='hello', num_tokens=40, stops=(stop,), session=entry, learn=True
    )
    tokens = entry.position - 6
    self.assertLess(tokens, len(whole.drawn))

  def test_measures_what_was_learned(self):
    request = {'text': 'ab' * 14, 'learn': True, 'measure': True}
    entry = self.service.store.create()
    losses = self.ask('observe', 0, session=entry, **request).losses
    self.assertLess(losses['loss_after'], losses['loss'])
    record = self.service.store.audit(entry.id)[-1]
    self.assertEqual({x: record[x] for x in losses}, losses)
    # The same tokens in the same place, with the levels after the request.
    tokens, alone = np.array([256, *b'ab' * 14]), tiny.base().fork()
    stream = alone.state.stream._replace(
      levels=entry.session.state.stream.levels
    )
    now = alone.now._replace(state=alone.state._replace(stream=stream))
    engine = tiny.make_engine()
    ticket = engine.submit(
      serving.Job(lambda: now, tokens, reset=np.arange(29) == 0)
    )
    while engine.step():
      pass
    found = np.nanmean(ticket.outcome.losses)
    self.assertAlmostEqual(losses['loss_after'], found, places=5)

  def test_measures_answers_and_changes_nothing_else(self):
    store, results = self.service.store, []
    entries = [store.create() for _ in range(2)]
    for entry, measure in zip(entries, (True, False), strict=True):
      request = {'session': entry, 'learn': True, 'measure': measure}
      results.append(self.ask(text='hello', **request))
    tiny.assert_equal(entries[0].session.now, entries[1].session.now)
    self.assertIsNotNone(results[0].losses['answer_loss_after'])
    self.assertIsNone(results[1].losses['answer_loss_after'])
    # No level steps within a segment.
    short = self.ask(
      'observe', 0, text='', session=store.create(), learn=True, measure=True
    )
    self.assertEqual(set(short.steps.values()), {0})
    self.assertIsNone(short.losses['loss_after'])

  def test_a_text_that_attention_does_not_hold_is_not_measured(self):
    checkpoint = tiny.make_checkpoint(session=tiny.base(window=None))
    folder = pathlib.Path(self.create_tempdir().full_path)
    service = serving.Service(checkpoint, folder, serving.Limits())
    self.addCleanup(service.close)
    entry, ended = service.store.create(), []
    request = serving.Request(
      'observe', text='a' * 40, session=entry, learn=True, measure=True
    )
    service.start(request, ended.append)
    while service.step():
      pass
    self.assertEqual(ended[0].position, 41)
    self.assertIsNone(ended[0].losses['loss_after'])

  def test_logs_the_text_if_asked_for(self):
    entry = self.service.store.create()
    self.ask(
      'observe', 0, text='a note', session=entry, learn=True, log_text=True
    )
    self.assertEqual(self.service.store.audit(entry.id)[-1]['text'], 'a note')

  def test_cancelled_and_failed_requests_leave_the_session_usable(self):
    entry, ended = self.service.store.create(), []
    request = serving.Request(
      'complete', text='x', session=entry, learn=True, draw=serving.Draw(9)
    )
    running = self.service.start(request, ended.append)
    self.assertEqual(entry.num_jobs, 1)
    self.service.step()
    self.service.engine.cancel(running.ticket)
    self.assertEqual(ended[0].code, 'cancelled')
    self.assertEqual((entry.num_jobs, entry.position), (0, 0))
    with self.assertRaises(serving.RequestError):
      self.ask(num_tokens=5000, text='x', session=entry, learn=True)
    self.assertEqual(entry.num_jobs, 0)
    self.ask(text='x', session=entry, learn=True)

  def test_requests_are_told_that_the_server_ends(self):
    entry, ended = self.service.store.create(), []
    request = serving.Request(
      'complete', text='x', session=entry, learn=True, draw=serving.Draw(99)
    )
    for _ in range(9):  # one more than there are slots
      self.service.start(request, ended.append)
    for _ in range(3):
      self.service.step()
    self.service.end_requests()
    self.assertEqual([(x.status, x.code) for x in ended], [(503, 'ending')] * 9)
    self.assertFalse(self.service.step())
    self.assertEqual((entry.position, entry.num_jobs), (0, 0))

  def test_a_session_survives_a_restart(self):
    entry = self.service.store.of_user('me')
    self.ask('observe', 0, text='a note', session=entry, learn=True)
    before = self.ask(text='x', session=entry, temperature=0.0)
    self.service.close()
    self.service = self.open()
    entry = self.service.store.of_user('me')
    after = self.ask(text='x', session=entry, temperature=0.0)
    self.assertEqual(before, after)
