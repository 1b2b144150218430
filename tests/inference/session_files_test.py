"""Files of sessions: whole, or refused with the reason."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning.inference import session_files

_ROOT = pathlib.Path(__file__).resolve().parents[2]
# Saves one session after the other over the same file, until it is killed.
_SAVER = """
import sys
import numpy as np
from nested_learning.inference import session_files as files
for i in range(1, 10**9):
  content = files.Content({'number': i}, {'x': np.full(500_000, i, np.float32)})
  files.write(sys.argv[1], content)
  print(i, flush=True)
"""


def content():
  return session_files.Content(
    {'name': 'a'},
    {
      'weights': np.arange(6, dtype=np.float32).reshape(2, 3),
      'half': np.asarray(jnp.arange(3, dtype=jnp.bfloat16)),
      'flags': np.array([True, False]),
      'scalar': np.array(7, np.int32),
      'nothing': np.zeros((0, 4), np.float32),
    },
  )


class SessionFilesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = pathlib.Path(self.create_tempdir().full_path, 'a.session')

  def test_what_is_written_is_read(self):
    size = session_files.write(self.path, content())
    self.assertEqual(size, self.path.stat().st_size)
    found = session_files.read(self.path)
    self.assertEqual(found.header['name'], 'a')
    self.assertEqual(found.arrays.keys(), content().arrays.keys())
    for name, x in content().arrays.items():
      self.assertEqual(found.arrays[name].dtype, x.dtype)
      np.testing.assert_array_equal(found.arrays[name], x)
    self.assertEqual(os.listdir(self.path.parent), ['a.session'])

  def test_every_truncation_is_refused(self):
    session_files.write(self.path, content())
    data = self.path.read_bytes()
    for size in range(len(data)):
      self.path.write_bytes(data[:size])
      with self.assertRaisesRegex(errors.UserError, 'cut short'):
        session_files.read(self.path)

  def test_every_edit_is_refused(self):
    session_files.write(self.path, content())
    data = self.path.read_bytes()
    for place in range(len(data)):
      edited = bytearray(data)
      edited[place] ^= 1
      self.path.write_bytes(edited)
      with self.assertRaises(errors.UserError):
        session_files.read(self.path)
    for place in (-40, -5):  # of the arrays, of the checksum
      edited = bytearray(data)
      edited[place] ^= 16
      self.path.write_bytes(edited)
      with self.assertRaisesRegex(errors.UserError, 'damaged or was edited'):
        session_files.read(self.path)
    self.path.write_bytes(data + b'more')
    with self.assertRaisesRegex(errors.UserError, 'damaged or was edited'):
      session_files.read(self.path)

  def test_another_version_and_another_file_are_refused(self):
    session_files.write(self.path, content())
    data = self.path.read_bytes()
    changed = data.replace(b'"version": 2', b'"version": 9')
    self.assertNotEqual(changed, data)
    self.path.write_bytes(changed)
    with self.assertRaisesRegex(errors.UserError, 'version 9, .* version 2'):
      session_files.read(self.path)
    self.path.write_text(json.dumps({'a': 1}))
    with self.assertRaisesRegex(errors.UserError, 'is no session'):
      session_files.read(self.path)

  def test_a_path_that_cannot_be(self):
    nowhere = self.path.parent / 'nowhere' / 'a.session'
    with self.assertRaisesRegex(errors.UserError, 'cannot be written'):
      session_files.write(nowhere, content())
    with self.assertRaisesRegex(errors.UserError, 'cannot be read'):
      session_files.read(nowhere)

  def test_a_killed_save_leaves_the_file_before_it(self):
    saver = subprocess.Popen(
      [sys.executable, '-c', _SAVER, str(self.path)],
      stdout=subprocess.PIPE,
      text=True,
      cwd=_ROOT,
      env={**os.environ, 'PYTHONPATH': str(_ROOT)},
    )
    partial = self.path.with_name('.a.session.partial')
    saved = 0
    try:
      while saved < 3:
        saved = int(saver.stdout.readline())
      deadline = time.monotonic() + 30
      # In the middle of a save: its file has begun, and is not whole.
      while time.monotonic() < deadline:
        try:
          if 0 < partial.stat().st_size < 2_000_000:
            break
        except FileNotFoundError:
          continue
    finally:
      saver.send_signal(signal.SIGKILL)
      rest = saver.stdout.read().split()
      saver.wait()
    last = int(rest[-1]) if rest else saved
    found = session_files.read(self.path)
    self.assertIn(found.header['number'], (last, last + 1))
    np.testing.assert_array_equal(
      found.arrays['x'], np.full(500_000, found.header['number'])
    )
    session_files.write(self.path, content())  # and the next save is as ever
    self.assertEqual(os.listdir(self.path.parent), ['a.session'])


if __name__ == '__main__':
  absltest.main()
