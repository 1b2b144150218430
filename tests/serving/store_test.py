"""Tests of the store: nothing is lost or mixed up, in memory or on the disk."""

import contextlib
import errno
import json
import pathlib
from unittest import mock

from absl.testing import parameterized
import jax
import numpy as np

from nested_learning import errors
from nested_learning import files
from nested_learning import serving
from tests import compiling
from tests.serving import tiny


class Clock:
  """A clock that the test moves."""

  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now


def learn(store, entry, seed, num_tokens=9):
  """Learns from random tokens, as a request would."""
  session = store.load(entry).fork()
  session.feed(tiny.draw_tokens(num_tokens, seed=seed))
  messages = (*entry.messages, f'hash of {seed}')
  store.commit(entry, session.now, {'kind': 'observe'}, messages=messages)


class StoreTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(compiling.quickly())
    self.folder = pathlib.Path(self.create_tempdir().full_path, 'sessions')
    self.clock = Clock()

  def open(self, **limits):
    store = serving.Store(
      tiny.base(), self.folder, serving.Limits(**limits), clock=self.clock
    )
    self.addCleanup(store._folder.close)
    return store

  def test_sessions_survive_the_store(self):
    store = self.open()
    one, two = store.create('mine'), store.of_user('../../etc')
    learn(store, one, seed=1)
    learn(store, one, seed=2)
    learn(store, two, seed=3)
    states = [store.load(entry).now for entry in (one, two)]
    store.close()
    again = self.open()
    self.assertEqual([x.id for x in again.all()], [one.id, two.id])
    self.assertEqual(again.num_resident, 0)
    for entry, state in zip(again.all(), states, strict=True):
      tiny.assert_equal(again.load(entry).now, state)
    self.assertEqual(again.of_user('../../etc').id, two.id)
    self.assertRegex(two.id, '^user_[0-9a-f]{32}$')
    self.assertLen(again.find(one.id).messages, 2)
    again.rollback(one.id)
    self.assertEqual(again.find(one.id).messages, ('hash of 1',))
    alone = tiny.base().fork()
    alone.feed(tiny.draw_tokens(9, seed=1))
    tiny.assert_equal(again.load(again.find(one.id)).now, alone.now)

  def test_idle_sessions_go_to_the_disk_and_come_back(self):
    store = self.open(max_resident=2, idle_seconds=100, save_seconds=50)
    entries = [store.create() for _ in range(2)]
    states = []
    for i, entry in enumerate(entries):
      learn(store, entry, seed=i)
      states.append(entry.session.now)
      self.clock.now += 1
    entries.append(store.create())
    self.assertEqual(
      [entry.session is not None for entry in entries], [False, True, True]
    )
    self.clock.now += 60
    self.assertIsNotNone(entries[1].unsaved_since)
    store.tick()
    self.assertIsNone(entries[1].unsaved_since)
    self.clock.now += 60
    entries[1].num_jobs = 1  # a request is in work
    for _ in range(3):
      store.tick()
    self.assertIsNotNone(entries[1].session)
    entries[1].num_jobs = 0
    store.tick()
    self.assertEqual(store.num_resident, 0)
    for entry, state in zip(entries, states, strict=False):
      tiny.assert_equal(store.load(entry).now, state)

  def test_a_crash_loses_only_what_came_after_the_last_save(self):
    store = self.open(save_seconds=10)
    entry = store.create()
    learn(store, entry, seed=1)
    self.clock.now += 11
    store.tick()
    saved = entry.session.now
    learn(store, entry, seed=2)
    store._folder.close()  # as the end of the process does
    (self.folder / 'half').mkdir()  # of a session that was never complete
    again = self.open()
    self.assertLen(again, 1)
    tiny.assert_equal(again.load(again.find(entry.id)).now, saved)
    again._folder.close()
    self.assertEqual(
      [x['kind'] for x in self.open().audit(entry.id)],
      ['create', 'observe', 'observe', 'crash'],
    )

  @parameterized.parameters(range(4))
  def test_a_crash_while_a_session_is_saved(self, num_writes):
    store = self.open()
    entry = store.create()
    learn(store, entry, seed=1)
    learn(store, entry, seed=2)
    store._folder.save(entry)
    old = entry.before.now, entry.session.now, entry.messages
    learn(store, entry, seed=3)
    new = entry.before.now, entry.session.now, entry.messages
    left = iter(range(num_writes))

    def write(*args, **kwargs):
      if next(left, None) is None:
        raise KeyboardInterrupt
      return write_whole(*args, **kwargs)

    write_whole = files.write_whole
    with mock.patch.object(files, 'write_whole', write):
      with mock.patch.object(store._folder, '_sweep'):  # as in a crash
        with contextlib.suppress(KeyboardInterrupt):
          store._folder.save(entry)
    store._folder.close()
    again = self.open()
    entry = again.find(entry.id)
    before, now, messages = new if num_writes == 3 else old
    tiny.assert_equal(again.load(entry).now, now)
    tiny.assert_equal(entry.before.now, before)
    self.assertEqual(entry.messages, messages)
    self.assertEqual(entry.position, int(now.clock[0]))
    learn(again, entry, seed=4)
    again._folder.save(entry)
    self.assertLen(list((self.folder / entry.id).iterdir()), 4)

  def test_lines_of_the_log_that_a_full_disk_cut_short(self):
    store = self.open()
    entry = store.create()
    with open(self.folder / entry.id / 'audit.jsonl', 'a') as file:
      file.write('\n{"time": 10')
    learn(store, entry, seed=1)
    kinds = [line['kind'] for line in store.audit(entry.id)]
    self.assertEqual(kinds, ['create', 'observe'])

  def test_fork_rollback_and_reset_are_exact(self):
    store = self.open()
    entry = store.create()
    start = store.health(entry.id)
    self.assertEqual(start['fingerprint'], start['fingerprint_of_checkpoint'])
    learn(store, entry, seed=1)
    state = entry.session.now
    other = store.fork(entry.id, name='copy')
    learn(store, other, seed=2)
    tiny.assert_equal(store.load(entry).now, state)
    store.rollback(other.id)
    tiny.assert_equal(store.load(other).now, state)
    with self.assertRaisesRegex(serving.RequestError, 'nothing to return to'):
      store.rollback(other.id)
    health = store.health(entry.id)
    self.assertNotEqual(health['fingerprint'], start['fingerprint'])
    self.assertEqual(health['levels']['fast']['num_updates'], 2)
    json.dumps(health, allow_nan=False)
    store.reset(entry.id)
    self.assertEqual(
      store.health(entry.id)['fingerprint'], start['fingerprint']
    )
    store.rollback(entry.id)
    tiny.assert_equal(store.load(entry).now, state)

  def test_export_and_import(self):
    store = self.open()
    entry = store.create()
    learn(store, entry, seed=1)
    content = store.export(entry.id)
    copy = store.import_file(content, name='copy')
    tiny.assert_equal(store.load(copy).now, entry.session.now)
    other = tiny.base(window=None).fork()
    other.feed(tiny.draw_tokens(5))
    path = pathlib.Path(self.create_tempdir().full_path, 'x.session')
    other.save(path)
    for wrong in (b'', b'notes', content[:-9], path.read_bytes()):
      with self.assertRaises(serving.RequestError) as caught:
        store.import_file(wrong)
      self.assertEqual(caught.exception.code, 'foreign_session')
      self.assertNotIn(str(self.folder), str(caught.exception))
    self.assertLen(store, 2)
    self.assertEmpty(list(self.folder.glob('.import*')))

  def test_audit_log_says_what_happened_without_the_text(self):
    store = self.open()
    entry = store.create()
    learn(store, entry, seed=1)
    self.clock.now += 5
    store.reset(entry.id)
    created, observed, reset = store.audit(entry.id)
    self.assertEqual(created['kind'], 'create')
    self.assertEqual(observed['steps'], {'fast': 2, 'slow': 1})
    self.assertEqual((observed['position'], reset['position']), (9, 0))
    self.assertEqual((observed['time'], reset['time']), (1000, 1005))

  def test_delete_removes_all_files(self):
    store = self.open()
    entry = store.create()
    entry.num_jobs = 1
    for function in (store.delete, store.reset, store.rollback):
      with self.assertRaisesRegex(serving.RequestError, 'in work') as caught:
        function(entry.id)
      self.assertEqual(caught.exception.status, 409)
    entry.num_jobs = 0
    store.delete(entry.id)
    self.assertEqual([x.name for x in self.folder.iterdir()], ['.lock'])
    with self.assertRaises(serving.RequestError) as caught:
      store.find(entry.id)
    self.assertEqual(caught.exception.status, 404)

  def test_refuses_more_sessions_than_its_limit(self):
    store = self.open(max_sessions=2)
    store.create()
    store.of_user('a')
    store.of_user('a')
    with self.assertRaises(serving.RequestError) as caught:
      store.create()
    self.assertEqual(caught.exception.status, 429)

  def test_refuses_a_folder_that_is_in_use_and_damaged_files(self):
    store = self.open()
    entry = store.create()
    with self.assertRaisesRegex(errors.UserError, 'in use'):
      self.open()
    store.close()
    again = self.open()
    (path,) = (self.folder / entry.id).glob('*.now.session')
    path.write_bytes(path.read_bytes()[:-1])
    with self.assertRaisesRegex(errors.UserError, 'cut short'):
      again.load(again.find(entry.id))

  def test_a_full_disk_leaves_sessions_as_they_were(self):
    store = self.open()
    entry = store.create()
    learn(store, entry, seed=1)
    before = dict(vars(entry))
    full = OSError(errno.ENOSPC, 'No space left on device')
    with mock.patch.object(store, '_log', side_effect=full):
      for function in (
        lambda: learn(store, entry, seed=2),
        lambda: store.reset(entry.id),
        lambda: store.rollback(entry.id),
        store.create,
      ):
        with self.assertRaisesRegex(errors.Retryable, 'No space left'):
          function()
    self.assertEqual(vars(entry), before | {'used': entry.used})
    self.assertLen(store, 1)
    self.assertLen(list(self.folder.glob('sess_*')), 1)
    learn(store, entry, seed=2)

  def test_forks_share_what_was_learned_once(self):
    store = self.open()
    entry = store.create()
    learn(store, entry, seed=1)
    forks = [store.fork(entry.id) for _ in range(3)]
    for fork in forks:
      for mine, other in zip(
        jax.tree.leaves(fork.session.state),
        jax.tree.leaves(entry.session.state),
        strict=True,
      ):
        self.assertIs(mine, other)
    np.testing.assert_array_equal(forks[0].session.clock, [9])
