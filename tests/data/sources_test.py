import os
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from nested_learning import errors
from nested_learning.data import sources


class SourcesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def write(self, name, content):
    path = self.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
      content if isinstance(content, bytes) else content.encode()
    )
    return path

  def names(self, source):
    return [file.name for file in sources.find_files(str(source))]

  def test_stdlib_is_source_code_without_tests(self):
    files = sources.find_files('stdlib')
    names = [file.name for file in files]
    self.assertEqual(names, sorted(names))
    self.assertIn('json/decoder.py', names)
    self.assertTrue(all(name.endswith('.py') for name in names))
    folders = {part for name in names for part in name.split('/')[:-1]}
    self.assertNoCommonElements(
      folders, ['test', 'tests', 'site-packages', 'idle_test']
    )
    self.assertGreater(sum(file.size for file in files), 4_000_000)

  def test_every_stdlib_file_is_readable_text(self):
    for file in sources.find_files('stdlib'):
      self.assertLen(sources.read_text(file.path).encode(), file.size)

  def test_folder_is_walked_without_hidden_and_empty_files(self):
    for name in ('b.txt', 'a/c.py', '.git/config', '.hidden', 'a/b.md'):
      self.write(name, 'text')
    self.write('empty.txt', '')
    self.assertEqual(self.names(self.root), ['a/b.md', 'a/c.py', 'b.txt'])

  def test_glob_and_file_give_names_below_the_fixed_folder(self):
    for name in ('b.txt', 'a/c.txt', 'a/d.py'):
      self.write(name, 'text')
    self.assertEqual(self.names(self.root / '**/*.txt'), ['a/c.txt', 'b.txt'])
    self.assertEqual(self.names(self.root / 'a' / '[cd].*'), ['c.txt', 'd.py'])
    self.assertEqual(self.names(self.root / 'a/d.py'), ['d.py'])

  def test_relative_glob(self):
    self.write('a/c.txt', 'text')
    self.addCleanup(os.chdir, os.getcwd())
    os.chdir(self.root)
    self.assertEqual(self.names('*/*.txt'), ['a/c.txt'])
    self.assertEqual(self.names('a'), ['c.txt'])

  def test_text_is_read_as_it_is(self):
    text = '\ufeffna\u00efve\r\n\u2603\n'
    self.assertEqual(sources.read_text(self.write('a.txt', text)), text)

  def test_missing_source(self):
    with self.assertRaisesRegex(
      errors.UserError, "'/no/such' does not exist. Give 'stdlib', a folder"
    ):
      sources.find_files('/no/such')
    with self.assertRaisesRegex(errors.UserError, "'' does not exist"):
      sources.find_files('')

  def test_pattern_without_match(self):
    with self.assertRaisesRegex(
      errors.UserError, r"\*.txt' matches no file. Check the pattern"
    ):
      sources.find_files(str(self.root / '*.txt'))

  def test_nothing_but_empty_files(self):
    self.write('empty.txt', '')
    with self.assertRaisesRegex(
      errors.UserError, 'holds no text: none of the 1 files'
    ):
      sources.find_files(str(self.root))

  @parameterized.parameters(
    (b'text\0more', r'a.bin is a binary file .* glob pattern such as'),
    (b'caf\xe9', r'a.bin is not UTF-8 text \(byte 3\). Convert it'),
  )
  def test_binary_file(self, content, message):
    path = self.write('a.bin', content)
    with self.assertRaisesRegex(errors.UserError, message):
      sources.read_text(path)

  def test_unreadable_file(self):
    path = self.write('a.txt', 'text')
    with mock.patch.object(
      pathlib.Path, 'read_bytes', side_effect=PermissionError(13, 'Denied')
    ):
      with self.assertRaisesRegex(
        errors.UserError, r'a.txt cannot be read \(Denied\). Mend its'
      ):
        sources.read_text(path)

  def test_broken_link(self):
    (self.root / 'link.txt').symlink_to(self.root / 'gone.txt')
    for source in (self.root, self.root / '*.txt'):
      with self.assertRaisesRegex(errors.UserError, 'link.txt cannot be read'):
        sources.find_files(str(source))

  def test_unreadable_folder(self):
    self.write('a/b.txt', 'text')
    with mock.patch.object(
      os, 'scandir', side_effect=PermissionError(13, 'Denied', 'a')
    ):
      with self.assertRaisesRegex(errors.UserError, 'a cannot be read'):
        sources.find_files(str(self.root))


class SplitTest(parameterized.TestCase):
  def test_share_is_about_the_fraction(self):
    names = [f'{i}.txt' for i in range(2000)]
    self.assertBetween(sources.is_validation(names, 0.1).mean(), 0.08, 0.12)

  def test_a_file_keeps_its_side(self):
    names = [f'{i}.txt' for i in range(100)]
    chosen = sources.is_validation(names, 0.3)
    fewer = sources.is_validation(names[::-2], 0.3)
    self.assertSequenceEqual(chosen[::-2].tolist(), fewer.tolist())

  @parameterized.parameters((0.001, 1), (0.999, 9))
  def test_both_sides_have_a_file(self, fraction, expected):
    names = [f'{i}.txt' for i in range(10)]
    self.assertEqual(sources.is_validation(names, fraction).sum(), expected)

  def test_nothing_is_held_out_at_zero(self):
    self.assertFalse(sources.is_validation(['a', 'b', 'c'], 0.0).any())


if __name__ == '__main__':
  absltest.main()
