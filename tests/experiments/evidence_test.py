"""Tests of the pages of results and of the program that makes them."""

import contextlib
import io
import pathlib
import subprocess
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from experiments import pages as pages_lib
from nested_learning import configs

_ROOT = pathlib.Path(pages_lib.__file__).resolve().parents[1]


class EvidenceTest(parameterized.TestCase):
  @parameterized.parameters(*pages_lib.PAGES)
  def test_pages_name_files_that_exist(self, name):
    page = pages_lib.PAGES[name]
    for path in (page.program[0], *page.code):
      self.assertTrue((_ROOT / path).exists(), path)
    spec = page.program[1].removeprefix('--config=')
    config = configs.load_experiment(spec).config
    if page.program[0] == 'launch/run.py':
      self.assertIsNone(config.results)

  def test_runs_every_command_and_reports_failures(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    program = folder / 'program.py'
    program.write_text(
      'import pathlib, sys\n'
      'pathlib.Path(sys.argv[2].split("=")[1]).write_text(sys.argv[3])\n'
      'sys.exit(int(sys.argv[1]))\n'
    )
    pages = {
      name: pages_lib.Page(name, (str(program), code), (), 1.0)
      for name, code in {'bad': '3', 'good': '0'}.items()
    }
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      self.assertEqual(pages_lib.make(pages, folder), 1)
    self.assertEqual(err.getvalue(), 'bad: exit code 3\n')
    self.assertIn('[2 of 2] good', out.getvalue())
    self.assertEqual(
      (folder / 'good').read_text(), '--results=experiments/results/good'
    )

  def test_says_how_old_a_page_is(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    page = pages_lib.Page('page', ('launch/run.py',), ('code.py',), 1.0)
    git = lambda *args: subprocess.run(
      ['git', '-C', root, '-c', 'user.name=a', '-c', 'user.email=a@b', *args],
      check=True,
      capture_output=True,
      text=True,
    ).stdout.strip()
    git('init', '-q')

    def commit(text):
      (root / 'code.py').write_text(text)
      git('add', 'code.py')
      git('commit', '-qm', text)

    commit('first')
    with mock.patch.object(pages_lib, '_HERE', root):
      self.assertStartsWith(pages_lib.describe(page), 'not made yet')
      folder = root / 'experiments/results/page'
      folder.mkdir(parents=True)
      readme = folder / 'README.md'
      readme.write_text(f'- commit: {git("rev-parse", "--short", "HEAD")}\n')
      self.assertEndsWith(pages_lib.describe(page), 'up to date')
      commit('second')
      self.assertEndsWith(pages_lib.describe(page), 'in 1 commits since')
      readme.write_text('- commit: 1234567\n')
      self.assertEndsWith(pages_lib.describe(page), 'not known here')

  def test_refuses_other_names(self):
    process = subprocess.run(
      [sys.executable, 'experiments/evidence.py', '--only=fact'],
      cwd=_ROOT,
      capture_output=True,
      text=True,
    )
    self.assertEqual(process.returncode, 2)
    self.assertIn('--only=fact names no page', process.stderr)
    self.assertLen(process.stderr.splitlines(), 1)


if __name__ == '__main__':
  absltest.main()
