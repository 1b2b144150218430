import errno
import os
import pathlib
import stat
import subprocess
import sys
import unittest
from unittest import mock

from absl.testing import absltest

from nested_learning import errors
from nested_learning import files


class FilesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir())

  def test_a_file_is_whole_and_nothing_is_left_beside_it(self):
    path = self.folder / 'new' / 'a.txt'
    files.write_whole(path, 'text é', mode=0o600)
    self.assertEqual(path.read_text('utf-8'), 'text é')
    self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o600)
    self.assertEqual(os.listdir(path.parent), ['a.txt'])

  def test_a_link_stays_and_its_target_is_written(self):
    (self.folder / 'link').symlink_to(self.folder / 'target')
    files.write_whole(self.folder / 'link', b'1')
    self.assertTrue((self.folder / 'link').is_symlink())
    self.assertEqual((self.folder / 'target').read_bytes(), b'1')

  def test_what_cannot_be_written_is_one_line(self):
    (self.folder / 'file').write_text('')
    for path in ('file/a', 'x' * 300, '.', 'nul\0'):
      with self.assertRaisesRegex(errors.UserError, 'Cannot write'):
        files.write_whole(os.path.join(self.folder, path), b'')
    self.assertEqual(os.listdir(self.folder), ['file'])

  def test_a_full_disk_asks_for_another_attempt(self):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
      mock.patch.object(os, 'fsync', side_effect=full),
      self.assertRaisesRegex(errors.Retryable, 'a.txt: No space left'),
    ):
      files.write_whole(self.folder / 'a.txt', '1')
    self.assertEmpty(os.listdir(self.folder))

  def test_a_folder_is_whole_or_not_at_all(self):
    with self.assertRaises(KeyError), files.whole_folder(self.folder / 'a'):
      raise KeyError
    self.assertEmpty(os.listdir(self.folder))
    with files.whole_folder(self.folder / 'a') as draft:
      (draft / 'b').write_text('b')
    self.assertEqual((self.folder / 'a' / 'b').read_text(), 'b')

  def test_a_lock_names_the_process_that_holds_it(self):
    path = self.folder / 'lock'
    code = (
      'from nested_learning import files\n'
      f'with files.lock({str(path)!r}, "--workdir=w"): pass'
    )
    run = lambda: subprocess.run(
      [sys.executable, '-c', code],
      capture_output=True,
      text=True,
      cwd=pathlib.Path(__file__).parents[1],
    )
    with files.lock(path, '--workdir=w'):
      error = run().stderr
    self.assertIn(f'--workdir=w is in use by process {os.getpid()} on', error)
    self.assertEqual(run().returncode, 0)

  @unittest.skipUnless(os.path.exists('/dev/full'), 'needs /dev/full')
  def test_a_lock_on_a_full_disk_hides_no_error(self):
    with self.assertRaisesRegex(KeyError, 'of the block'):
      with files.lock('/dev/full', '--workdir=w'):
        raise KeyError('of the block')
