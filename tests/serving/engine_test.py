"""Tests of the engine: jobs side by side give what each gives alone."""

import dataclasses
from unittest import mock

from absl.testing import parameterized
import jax
import numpy as np

from nested_learning import errors
from nested_learning import inference
from nested_learning import serving
from nested_learning.inference import session_programs
from tests import compiling
from tests.serving import tiny

_SETTINGS = (
  inference.DrawSettings(seed=3, temperature=0.0),
  inference.DrawSettings(seed=4, temperature=1.3),
  inference.DrawSettings(seed=5, temperature=0.7, top_k=9),
  inference.DrawSettings(seed=6, temperature=2.0, top_p=0.6, num_top=4),
  inference.DrawSettings(seed=7, top_k=30, top_p=0.9),
)


def make_job(session, tokens, *, num_tokens=6, settings=_SETTINGS[1], **kwargs):
  draw = serving.Draw(num_tokens, settings) if num_tokens else None
  return serving.Job(lambda: session.now, tokens, draw=draw, **kwargs)


def run(engine, *jobs):
  tickets = [engine.submit(job) for job in jobs]
  while engine.step():
    pass
  for ticket in tickets:
    if ticket.error is not None:
      raise ticket.error
  return [ticket.outcome for ticket in tickets]


def generate(session, tokens, settings, num_tokens, **kwargs):
  return session.generate(
    num_tokens,
    prompt=tokens,
    key=jax.random.key(settings.seed),
    temperature=settings.temperature,
    top_k=settings.top_k,
    top_p=settings.top_p,
    vocab_size=tiny.VOCAB,
    **kwargs,
  )


class EngineTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(compiling.quickly())

  @parameterized.product(read_rows=(1, 4), window=(6, None))
  def test_jobs_that_learn_equal_sessions_alone(self, read_rows, window):
    lengths = (5, 11, 3, 8, 1, 9)
    base = tiny.base(window)
    sessions = [base.fork() for _ in lengths]
    for i, session in enumerate(sessions):
      session.feed(tiny.draw_tokens(2 * i + 1, seed=10 + i))
    prompts = [tiny.draw_tokens(n, seed=n) for n in lengths]
    settings = _SETTINGS + _SETTINGS[:1]
    jobs = [
      make_job(session, prompt, num_tokens=4 + i, settings=x, learn=True)
      for i, (session, prompt, x) in enumerate(
        zip(sessions, prompts, settings, strict=True)
      )
    ]
    engine = tiny.make_engine(base, num_slots=5, read_rows=read_rows)
    with mock.patch.object(
      inference, 'read_together', wraps=inference.read_together
    ) as read:
      outcomes = run(engine, *jobs)
    widest = max(len(call.args[2]) for call in read.call_args_list)
    self.assertEqual(widest, read_rows)
    # Products of several rows may add in another order.
    assert_equal = tiny.assert_equal if read_rows == 1 else tiny.assert_close
    for i, outcome in enumerate(outcomes):
      alone = sessions[i].fork()
      losses = alone.fork().feed(prompts[i])
      found = generate(alone, prompts[i], settings[i], 4 + i, keep=True)
      np.testing.assert_array_equal(outcome.tokens, found.tokens[0])
      assert_equal(outcome.losses, losses[0])
      self.assertTrue(np.isfinite(outcome.answer_losses).all())
      self.assertEqual(outcome.reason, 'length')
      assert_equal(outcome.now, alone.now)

  def test_texts_that_are_read_together_equal_those_alone_at_rest(self):
    session = tiny.base().fork()
    session.feed(tiny.draw_tokens(9))
    prompts = [tiny.draw_tokens(n, seed=n) for n in (3, 10, 1, 4, 7)]
    outcomes = []
    for read_rows in (1, 4):
      jobs = [make_job(session, prompt) for prompt in prompts]
      outcomes.append(run(tiny.make_engine(read_rows=read_rows), *jobs))
    for alone, together in zip(*outcomes, strict=True):
      self.assertEqual(alone.tokens, together.tokens)
      np.testing.assert_allclose(
        alone.losses, together.losses, rtol=1e-5, atol=1e-5
      )

  def test_a_text_that_diverges_fails_alone_among_those_read_with_it(self):
    session, broken = tiny.base().fork(), tiny.base().fork()
    for x in (session, broken):
      x.feed(tiny.draw_tokens(3))
    state = broken.state
    state = state._replace(logits=state.logits * np.nan)
    broken.move(broken.now._replace(state=state))
    engine = tiny.make_engine(read_rows=2)
    jobs = [make_job(x, tiny.draw_tokens(3)) for x in (session, broken)]
    good, bad = map(engine.submit, jobs)
    while engine.step():
      pass
    self.assertLen(good.outcome.tokens, 6)
    self.assertEqual(bad.error.code, 'diverged')

  def test_an_error_of_the_program_that_reads_ends_what_it_read(self):
    session, engine = tiny.base(), tiny.make_engine(read_rows=2)
    with mock.patch.object(inference, 'read_together', side_effect=MemoryError):
      tickets = [
        engine.submit(make_job(session, tiny.draw_tokens(3))) for _ in range(3)
      ]
      engine.step()
    while engine.step():
      pass
    self.assertIsInstance(tickets[0].error, MemoryError)
    self.assertIsInstance(tickets[1].error, MemoryError)
    self.assertLen(tickets[2].outcome.tokens, 6)

  def test_jobs_that_do_not_learn_equal_a_model_at_rest(self):
    session = tiny.base().fork()
    session.feed(tiny.draw_tokens(9))
    before = session.now
    prompts = [tiny.draw_tokens(n, seed=n) for n in (3, 10)]
    jobs = [make_job(session, prompt) for prompt in prompts]
    learning = make_job(session, prompts[0], learn=True)
    outcomes = run(tiny.make_engine(num_slots=3), *jobs, learning)
    programs, params = session.programs, session.prepared
    for prompt, outcome in zip(prompts, outcomes[:2], strict=True):
      self.assertIsNone(outcome.now)
      inputs = session_programs.check_inputs(
        prompt, None, None, num_rows=1, vocab_size=tiny.VOCAB
      )
      _, last = session_programs.read(
        programs, params, before, inputs, learn=False
      )
      for level, old in zip(
        last.state.stream.levels.values(),
        before.state.stream.levels.values(),
        strict=True,
      ):
        tiny.assert_equal(level, old)
      config = inference.DrawConfig(6, 1.3, vocab_size=tiny.VOCAB)
      drawn = programs.make_draw(config)(
        params, last.state, jax.random.key(_SETTINGS[1].seed)
      )
      np.testing.assert_array_equal(outcome.tokens, drawn.tokens[0])
    tiny.assert_equal(session.now, before)

  def test_a_job_draws_the_same_tokens_beside_others(self):
    session, engine = tiny.base(), tiny.make_engine(num_slots=4)
    prompt = tiny.draw_tokens(6)
    (alone,) = run(engine, make_job(session, prompt, num_tokens=12))
    seen = []
    job = make_job(
      session,
      prompt,
      num_tokens=12,
      settings=_SETTINGS[1]._replace(num_top=3),
      on_token=seen.append,
    )
    others = [
      make_job(session, tiny.draw_tokens(2, seed=i), num_tokens=i)
      for i in range(1, 8)
    ]
    outcomes = run(engine, *others[:4], job, *others[4:])
    self.assertEqual(outcomes[4].tokens, alone.tokens)
    self.assertEqual([int(drawn.token) for drawn in seen], alone.tokens)
    for drawn in seen:
      self.assertLen(drawn.top_tokens, 3)
      self.assertLessEqual(drawn.logprob, drawn.top_logprobs[0])
      np.testing.assert_array_less(drawn.top_logprobs, 0)

  def test_jobs_of_one_session_run_in_order(self):
    session, alone = tiny.base().fork(), tiny.base().fork()
    keep = lambda ticket: session.move(ticket.outcome.now)
    texts = [tiny.draw_tokens(n, seed=n) for n in (7, 2, 9)]
    jobs = [
      make_job(session, text, num_tokens=0, learn=True, key='a', on_end=keep)
      for text in texts
    ]
    engine = tiny.make_engine(num_slots=4)
    run(engine, *jobs)
    for text in texts:
      alone.feed(text)
    tiny.assert_equal(session.now, alone.now)

  def test_cancelled_jobs_free_their_slots_and_change_nothing(self):
    session, engine = tiny.base().fork(), tiny.make_engine(num_slots=1)
    before, ended = session.now, []
    jobs = [
      make_job(
        session, tiny.draw_tokens(3), num_tokens=500, learn=True,
        key=i, on_end=ended.append,
      )
      for i in range(3)
    ]  # fmt: skip
    drawing, reading, waiting = map(engine.submit, jobs)
    for _ in range(3):
      engine.step()
    engine.cancel(drawing)
    engine.cancel(drawing)  # once more changes nothing
    engine.cancel(waiting)
    engine.step()
    engine.cancel(reading)
    self.assertFalse(engine.step())
    self.assertEqual((engine.num_running, engine.num_waiting), (0, 0))
    self.assertEqual(ended, [drawing, waiting, reading])
    tiny.assert_equal(session.now, before)
    run(engine, make_job(session, tiny.draw_tokens(3)))

  def test_callbacks_and_stop_tokens_end_a_text(self):
    session, engine = tiny.base(), tiny.make_engine()
    prompt = tiny.draw_tokens(5)
    (whole,) = run(engine, make_job(session, prompt, num_tokens=9))
    seen = []

    def stop(drawn):
      seen.append(int(drawn.token))
      return 2 if len(seen) == 4 else None

    job = make_job(session, prompt, num_tokens=9, on_token=stop, learn=True)
    (cut,) = run(engine, job)
    self.assertEqual((cut.tokens, cut.reason), (whole.tokens[:2], 'stop'))
    self.assertEqual(seen, whole.tokens[:4])
    alone = session.fork()
    alone.feed(np.concatenate([prompt, cut.tokens]).astype(np.int32))
    np.testing.assert_array_equal(cut.now.clock, alone.clock)
    last = whole.tokens[5]
    draw = serving.Draw(9, _SETTINGS[1], stop_tokens=(last,))
    job = serving.Job(lambda: session.now, prompt, draw=draw)
    (cut,) = run(engine, job)
    self.assertEqual(cut.tokens, whole.tokens[: whole.tokens.index(last)])
    self.assertEqual(cut.reason, 'stop')

  def test_an_error_of_one_job_leaves_the_others(self):
    session, engine = tiny.base(), tiny.make_engine()

    def fail(*_):
      raise RuntimeError('a bug')

    good = engine.submit(make_job(session, tiny.draw_tokens(3)))
    bad = engine.submit(make_job(session, tiny.draw_tokens(3), on_token=fail))
    worse = engine.submit(serving.Job(fail, tiny.draw_tokens(3)))
    while engine.step():
      pass
    self.assertLen(good.outcome.tokens, 6)
    self.assertIsInstance(bad.error, RuntimeError)
    self.assertIsInstance(worse.error, RuntimeError)
    self.assertEqual(engine.num_running, 0)

  def test_an_error_of_the_shared_program_ends_the_jobs_that_draw(self):
    session, engine = tiny.base(), tiny.make_engine()
    drawing = engine.submit(make_job(session, tiny.draw_tokens(3)))
    for _ in range(3):
      engine.step()
    with mock.patch.object(
      inference.DrawSlots, 'draw', side_effect=MemoryError
    ):
      reading = engine.submit(make_job(session, tiny.draw_tokens(9)))
      engine.step()
    self.assertIsInstance(drawing.error, MemoryError)
    while engine.step():
      pass
    self.assertLen(reading.outcome.tokens, 6)

  def test_a_level_that_diverges_fails_its_job(self):
    config = tiny.base().inner
    inner = dataclasses.replace(config, max_drift=1e-6)
    session = inference.Session(tiny.base().model, tiny.base().params, inner)
    job = make_job(session, tiny.draw_tokens(9), num_tokens=0, learn=True)
    with self.assertRaisesRegex(serving.RequestError, "level 'fast' has div"):
      run(tiny.make_engine(session), job)

  def test_refuses_what_diverges(self):
    session, engine = tiny.base().fork(), tiny.make_engine()
    session.feed(tiny.draw_tokens(3))
    state = session.state
    broken = state._replace(logits=state.logits * np.nan)
    session.move(session.now._replace(state=broken))
    for num_tokens in (0, 3):
      with self.assertRaisesRegex(serving.RequestError, 'finite') as caught:
        run(
          engine,
          make_job(session, tiny.draw_tokens(1), num_tokens=num_tokens),
        )
      self.assertEqual(caught.exception.code, 'diverged')

  @parameterized.parameters(
    ({'num_read': 21}, 'too_many_tokens'),
    ({'num_tokens': 21}, 'too_many_tokens'),
    ({'num_read': 0, 'num_tokens': 0}, 'empty_text'),
    ({'num_read': 20, 'num_tokens': 13}, 'context_length_exceeded'),
  )
  def test_refuses_jobs_that_are_too_long(self, sizes, code):
    session = tiny.base(window=None)
    engine = tiny.make_engine(session, max_read_tokens=20, max_draw_tokens=20)
    sizes = {'num_read': 2, 'num_tokens': 2, **sizes}
    text = tiny.draw_tokens(sizes.pop('num_read'))
    with self.assertRaises(serving.RequestError) as caught:
      engine.submit(make_job(session, text, **sizes))
    self.assertEqual(caught.exception.code, code)

  def test_refuses_tokens_that_the_model_has_not(self):
    engine = tiny.make_engine()
    with self.assertRaisesRegex(errors.UserError, 'token 999'):
      engine.submit(make_job(tiny.base(), np.array([1, 999])))

  def test_refuses_more_than_the_queue_holds(self):
    engine = tiny.make_engine(num_slots=1, max_queue=2)
    job = make_job(tiny.base(), tiny.draw_tokens(3))
    for _ in range(3):
      engine.submit(job)
    with self.assertRaisesRegex(serving.RequestError, 'try again') as caught:
      engine.submit(job)
    self.assertEqual(caught.exception.status, 429)
    while engine.step():
      pass
    engine.submit(job)

  def test_full_attention_begins_anew_where_an_answer_would_not_fit(self):
    session = tiny.base(window=None).fork()
    engine = tiny.make_engine(session)
    session.feed(tiny.draw_tokens(27))
    job = make_job(session, tiny.draw_tokens(5), num_tokens=8, learn=True)
    (outcome,) = run(engine, job)
    self.assertLen(outcome.tokens, 8)
    np.testing.assert_array_equal(outcome.now.age, [13])
    levels = session.state.stream.levels['fast'].num_updates
    after = outcome.now.state.stream.levels['fast'].num_updates
    np.testing.assert_array_equal(after, levels + 3)
