"""Tests of session files: round trips, damage and forgery."""

import hashlib
import json
import os
import pathlib
import signal
import stat
import struct
import subprocess
import sys
import time

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from nested_learning import errors
from nested_learning import levels
from nested_learning import optimizers
from nested_learning.inference import session_blocks
from nested_learning.inference import session_files

_ROOT = pathlib.Path(__file__).resolve().parents[2]
# Saves one session after the other over the same file, until it is killed.
_SAVER = """
import sys
import numpy as np
from nested_learning.inference import session_files as files
names = {'model': 'm', 'tokenizer': '', 'inner': '{}'}
for i in range(1, 10**9):
  x = np.full(500_000, i, np.float32)
  files.write(sys.argv[1], files.Content(names, {'x': x}))
  print(i, flush=True)
"""


def content(**arrays):
  return session_files.Content(
    {'model': 'm', 'tokenizer': 'letters', 'inner': '{}'},
    {
      'weights': np.arange(6, dtype=np.float32).reshape(2, 3),
      'half': np.asarray(jnp.arange(3, dtype=jnp.bfloat16)),
      'flags': np.array([True, False]),
      'scalar': np.array(7, np.int32),
      'nothing': np.zeros((0, 4), np.float32),
      **arrays,
    },
  )


def sign(data):
  """Returns the file with a valid checksum."""
  (length,) = struct.unpack_from('<Q', data)
  header = json.loads(data[8 : 8 + length])
  old = header['__metadata__']['sha256'].encode()
  blank = data.replace(old, b'0' * 64, 1)
  new = hashlib.sha256(blank).hexdigest().encode()
  return data.replace(old, new, 1)


def forge(data, old, new):
  """Replaces bytes of the header by as many others, and signs it."""
  assert data.count(old) >= 1 and len(old) == len(new)
  return sign(data.replace(old, new, 1))


class SessionFilesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.path = self.folder / 'a.session'

  def test_round_trip(self):
    checksum = session_files.write(self.path, content())
    found = session_files.read(self.path)
    self.assertEqual(found.metadata['model'], 'm')
    self.assertEqual(found.metadata['sha256'], checksum)
    self.assertEqual(session_files.read_checksum(self.path), checksum)
    self.assertEqual(found.arrays.keys(), content().arrays.keys())
    for name, x in content().arrays.items():
      self.assertEqual(found.arrays[name].dtype, x.dtype)
      np.testing.assert_array_equal(found.arrays[name], x)
    self.assertEqual(os.listdir(self.folder), ['a.session'])
    self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o600)

  def test_is_a_safetensors_file(self):
    session_files.write(self.path, content())
    with safetensors.safe_open(self.path, 'numpy') as file:
      self.assertEqual(file.metadata()['tokenizer'], 'letters')
      np.testing.assert_array_equal(
        file.get_tensor('weights'), content().arrays['weights']
      )

  def test_refuses_every_truncation_and_edit(self):
    session_files.write(self.path, content())
    data = self.path.read_bytes()
    for size in range(len(data)):
      self.path.write_bytes(data[:size])
      with self.assertRaisesRegex(errors.UserError, 'cut short'):
        session_files.read(self.path)
    for place in range(len(data)):
      edited = bytearray(data)
      edited[place] ^= 1
      self.path.write_bytes(edited)
      with self.assertRaises(errors.UserError):
        session_files.read(self.path)
    edited = bytearray(data)
    edited[-5] ^= 16
    self.path.write_bytes(edited)
    with self.assertRaisesRegex(errors.UserError, 'damaged or was edited'):
      session_files.read(self.path)
    self.path.write_bytes(data + b'more')
    with self.assertRaises(errors.UserError):
      session_files.read(self.path)

  @parameterized.parameters(
    (b'"version":"6"', b'"version":"9"', 'version 9, .* version 6'),
    (b'"version":"6"', b'"version": 6 ', 'as a string, not 6;'),
    (b'"model":"m"', b'"modem":"m"', "lacks 'model'"),
    (b'"shape":[2,3]', b'"shape":[9,9]', 'is not a session, or is cut'),
    (b'"shape":[2,3]', b'"shape":"ab" ', 'is not a session, or is cut'),
    (b'"dtype":"F32"', b'"dtype":"Xyz"', 'is not a session, or is cut'),
    (b'"dtype":"BOOL"', b'"dtype":  null', 'is not a session, or is cut'),
  )
  def test_refuses_forged_headers(self, old, new, message):
    session_files.write(self.path, content())
    self.path.write_bytes(forge(self.path.read_bytes(), old, new))
    with self.assertRaisesRegex(errors.UserError, message):
      session_files.read(self.path)

  @parameterized.parameters(
    b'',
    b'text',
    b'{"a": 1}',
    b'\xff' * 100,
    struct.pack('<Q', 2) + b'{}',
    struct.pack('<Q', 2) + b'[]',
    struct.pack('<Q', 10**15),
    struct.pack('<Q', 60_000) + b'[' * 60_000,
    safetensors_numpy.save({}, {'format': 'pt'}),
  )
  def test_refuses_files_of_other_kinds(self, data):
    self.path.write_bytes(data)
    for function in (session_files.read, session_files.read_checksum):
      with self.assertRaisesRegex(errors.UserError, 'is not a session'):
        function(self.path)

  def test_refuses_older_versions(self):
    self.path.write_bytes(b'NLSESSN\n' + bytes(100))
    with self.assertRaisesRegex(errors.UserError, 'version 2 or before'):
      session_files.read(self.path)

  def test_checks_shapes_before_allocating(self):
    like = {
      'logits': jax.ShapeDtypeStruct((10**9, 1000), np.float32),
      'x': jax.ShapeDtypeStruct((10**9, 7), np.float32),
    }
    unpack = lambda arrays: session_blocks.unpack_state(
      'a', session_files.Content({}, arrays), ('clock',), like, self.fail
    )
    for arrays, message in (
      ({}, 'nothing for state/logits'),
      ({'state/logits': np.zeros((2, 3))}, r'float64\(2, 3\) for state/lo'),
      ({'state/x@0,5': np.zeros((2, 2), np.float32)}, r'\(2, 2\) for state/x'),
      ({'clock': np.zeros(1), 'other': np.zeros(1)}, r'not \(other\)'),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        unpack(arrays)

  def test_holds_the_blocks_that_changed(self):
    def make(rows):
      cache = np.zeros((rows, 8, 4), np.float32)
      stream = {'model': cache, 'segment': {'model': cache}}
      return {'logits': np.zeros((rows, 3)), 'stream': stream}

    start, state = make(1), make(2)
    model = state['stream']['model']
    model[0, 2:5, 1] = [1.0, -0.0, np.nan]
    state['stream']['segment']['model'] = model.copy()
    state['stream']['segment']['model'][1, 4, 1] = 2.0
    packed = session_blocks.pack_state({'clock': np.ones(2)}, state, start)
    shapes = {name: x.shape for name, x in packed.items()}
    self.assertEqual(
      shapes,
      {
        'clock': (2,),
        'state/logits@0,0': (2, 3),
        'state/stream/model@0,2,1': (2, 3, 1),
        'state/stream/segment/model@0,4,1': (2, 1, 1),
      },
    )
    unpack = lambda arrays: session_blocks.unpack_state(
      'a', session_files.Content({}, arrays), ('clock',), state, lambda: start
    )
    found = unpack(packed)
    jax.tree.map(np.testing.assert_array_equal, found, state)
    self.assertTrue(np.signbit(found['stream']['model'][0, 3, 1]))
    whole = {
      'state/logits': state['logits'],
      'state/stream/model': model,
      'state/stream/segment/model': state['stream']['segment']['model'],
    }
    jax.tree.map(np.testing.assert_array_equal, unpack(whole), state)
    for name in ('@0,6,1', '@1,2,1', '@0,2', '@0,-1,1', '@0,x,1'):
      forged = {'state/logits': state['logits']} | {
        f'state/stream/model{name}': np.zeros((2, 3, 1), np.float32)
      }
      with self.assertRaisesRegex(errors.UserError, 'for state/stream/model'):
        unpack(forged)

  def test_reads_the_config_of_levels_and_no_other_class(self):
    inner = levels.make_inner(
      (4, None), learning_rate=(0.1, 0.2), optimizer=optimizers.configs.M3()
    )
    text = session_files.write_inner(inner)
    self.assertEqual(session_files.read_inner('a', text), inner)
    fields = json.loads(text)
    for text in (
      '{',
      '[]',
      '3',
      '{"_type": "experiments.evil.X"}',
      json.dumps({**fields, 'levels': [{'_type': 'experiments.evil.X'}]}),
      json.dumps({**fields, 'levels': [{'update_every': 4}]}),
      json.dumps(fields['levels'][0]),
      json.dumps({**fields, 'unknown': 1}),
      json.dumps({**fields, 'max_drift': 'far'}),
    ):
      with self.assertRaisesRegex(errors.UserError, 'how its levels learn'):
        session_files.read_inner('a', text)

  def test_refuses_impossible_paths(self):
    (self.folder / 'file').touch()
    for name in ('', 'a\0b', 'x' * 300, 'a\ud800'):
      path = f'{self.folder}/{name}' if name else ''
      for function in (session_files.read, session_files.read_checksum):
        with self.assertRaisesRegex(errors.UserError, 'the session '):
          function(path)
      with self.assertRaises(errors.UserError), session_files.lock(path):
        pass
    with self.assertRaisesRegex(errors.UserError, 'no such file'):
      session_files.read(self.folder / 'none')

  def test_locks_only_what_can_be_a_file(self):
    (self.folder / 'file').touch()
    for path, message in (
      (self.folder, 'is a folder or a device'),
      ('/dev/full', 'is a folder or a device'),
      (self.folder / 'file' / 'a.session', 'Not a directory|File exists'),
    ):
      with (
        self.assertRaisesRegex(errors.UserError, message),
        session_files.lock(path),
      ):
        pass
    with session_files.lock(self.folder / 'new' / 'a.session'):
      self.assertTrue((self.folder / 'new').is_dir())

  def test_follows_and_keeps_symbolic_links(self):
    target, precious = self.folder / 'b', self.folder / 'precious'
    precious.write_text('precious')
    self.path.symlink_to(target)
    # What a writer with a fixed name for its draft would open.
    (self.folder / '.b.partial').symlink_to(precious)
    (self.folder / '.a.session.partial').symlink_to(precious)
    session_files.write(self.path, content())
    self.assertTrue(self.path.is_symlink())
    self.assertEqual(
      session_files.read(target).arrays.keys(), content().arrays.keys()
    )
    self.assertEqual(precious.read_text(), 'precious')

  def test_killed_save_keeps_the_old_file(self):
    saver = subprocess.Popen(
      [sys.executable, '-c', _SAVER, str(self.path)],
      stdout=subprocess.PIPE,
      text=True,
      cwd=_ROOT,
      env={**os.environ, 'PYTHONPATH': str(_ROOT)},
    )
    saved = 0
    try:
      while saved < 3:
        saved = int(saver.stdout.readline())
      deadline = time.monotonic() + 30
      # In the middle of a save: its draft has begun, and is not whole.
      while time.monotonic() < deadline:
        try:
          sizes = [
            path.stat().st_size for path in self.folder.glob('.writing-*')
          ]
        except FileNotFoundError:
          continue
        if sizes and 0 < sizes[0] < 2_000_000:
          break
    finally:
      saver.send_signal(signal.SIGKILL)
      rest = saver.stdout.read().split()
      saver.wait()
    last = int(rest[-1]) if rest else saved
    x = session_files.read(self.path).arrays['x']
    self.assertIn(x[0], (last, last + 1))
    np.testing.assert_array_equal(x, np.full(500_000, x[0]))
    session_files.write(self.path, content())  # the next save succeeds
