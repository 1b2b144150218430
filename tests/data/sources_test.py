import glob
import os
import pathlib
from unittest import mock

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
    (b'text\0more', r'a.bin is a binary file .* or leave it out'),
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
        errors.UserError, r'a.txt cannot be read \(Denied\). Correct its'
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
      with self.assertRaisesRegex(errors.UserError, 'cannot be read .Denied'):
        sources.find_files(str(self.root))

  def test_linked_folders_are_read_and_every_file_once(self):
    for i in range(40):
      self.write(f'store/{i}.txt', 'text')
    self.write('corpus/a.txt', 'text')
    (self.root / 'corpus/part').symlink_to(self.root / 'store')
    (self.root / 'corpus/again').symlink_to(self.root / 'store')
    (self.root / 'corpus/b.txt').symlink_to(self.root / 'corpus/a.txt')
    (self.root / 'corpus/c.txt').symlink_to(self.root / 'store/3.txt')
    for source in ('corpus', 'corpus/**', 'corpus/**/*.txt'):
      names = self.names(self.root / source)
      self.assertLen(names, 41)
      self.assertIn('a.txt', names)  # not by the name of its link
      self.assertIn('again/0.txt', names)
    self.assertLen(self.names(self.root / '**/*.txt'), 41)

  def test_loops_of_links_end(self):
    self.write('a/1.txt', 'text')
    self.write('b/2.txt', 'text')
    (self.root / 'a/here').symlink_to(self.root / 'a')
    (self.root / 'a/up').symlink_to(self.root)
    (self.root / 'b/to_a').symlink_to(self.root / 'a')
    (self.root / 'a/to_b').symlink_to(self.root / 'b')
    for source in ('', '**', '**/*.txt', '**/**/*.txt', '**/[12].txt'):
      self.assertEqual(self.names(self.root / source), ['a/1.txt', 'b/2.txt'])
    self.assertEqual(
      self.names(self.root / 'a'),
      ['1.txt', 'to_b/2.txt'],
    )

  def test_glob_agrees_with_the_standard_library(self):
    for name in ('b.txt', 'a/c.txt', 'a/.d.txt', '.e/f.txt', 'a/g[1]/h.txt'):
      self.write(name, 'text')
    for pattern in (
      '*', '**', '**/*', '*/*', 'a/**', '**/g*/*', '.*/*', 'a/.*', '**/c.txt',
      'a/*/../c.txt', '?/c.txt', '[!a].txt', 'a/g[[]1]/*', '**/.d*',
    ):  # fmt: skip
      found = glob.glob(str(self.root / pattern), recursive=True)
      expected = {os.path.realpath(p) for p in found if os.path.isfile(p)}
      files = sources.find_files(str(self.root / pattern))
      self.assertEqual({os.path.realpath(f.path) for f in files}, expected)

  def test_odd_names(self):
    odd = ['new\nline.txt', '\'"quotes".txt', ' space ', 'n\u00e4me', 'a[1].t']
    for name in odd:
      self.write(f'odd/{name}', 'text')
    self.assertCountEqual(self.names(self.root / 'odd'), odd)
    for name in odd:
      self.assertEqual(self.names(self.root / 'odd' / name), [name])
    path = self.write('odd/new\nline.txt', b'\xff')
    with self.assertRaisesRegex(errors.UserError, 'is not UTF-8') as caught:
      sources.read_text(path)
    self.assertNotIn('\n', str(caught.exception))
    for source in ('~nobody-here/x', 'x' * 5000, 'a\0b', 'x' * 5000 + '*'):
      with self.assertRaises(errors.UserError):
        sources.find_files(source)
