"""Tests of the pages of results and of the program that makes them."""

import contextlib
import io
import pathlib
import subprocess
import sys
from unittest import mock

from absl.testing import parameterized

from experiments import pages as pages_lib
from experiments import report_files
from launch import programs
from launch import provenance
from nested_learning import configs

_ROOT = pathlib.Path(pages_lib.__file__).resolve().parents[1]


class EvidenceTest(parameterized.TestCase):
  @parameterized.parameters(*pages_lib.PAGES)
  def test_pages_name_files_that_exist(self, name):
    page = pages_lib.PAGES[name]
    for path in (page.program[0], *page.code):
      self.assertTrue((_ROOT / path).exists(), path)
    if len(page.program) > 1:
      spec = page.program[1].removeprefix('--config=')
      config = configs.load_experiment(spec).config
      if page.flag == '--set=results':
        self.assertIsNone(config.results)

  def test_every_experiment_has_a_page(self):
    ours = {
      path
      for page in pages_lib.PAGES.values()
      for start in page.code
      for path in pages_lib._imported(start)
    }
    without = {
      path
      for file in (_ROOT / 'experiments').rglob('*.py')
      if '\ndef get_config(' in file.read_text(encoding='utf-8')
      for path in [str(file.relative_to(_ROOT / 'experiments'))]
      if f'experiments/{path}' not in ours
    }
    self.assertEqual(
      without,
      {
        'benchmarks/gpu.py',  # needs a GPU
        'benchmarks/peers.py',  # needs another Python with PyTorch
        'lm_eval.py',  # needs a checkpoint
        'pretrained/llama.py',  # a size, for compiled.py
      },
    )

  def test_reports_say_how_they_were_made(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    for sections, count in (['# A'], 1), (['# A', report_files.MADE, 'x'], 0):
      report_files.write(
        str(folder),
        configs.load('experiments/continual/facts.py:small'),
        module='m',
        summary={},
        metrics=[],
        sections=sections,
      )
      report = (folder / 'report.md').read_text()
      self.assertEqual(report.count(report_files.MADE), 1)
      self.assertEqual(report.count('\n- commit: '), count)

  def test_runs_every_command_and_reports_failures(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    program = folder / 'program.py'
    program.write_text(
      'import pathlib, sys\n'
      'pathlib.Path(sys.argv[2].split("=")[1]).write_text(sys.argv[3])\n'
      'sys.exit(int(sys.argv[1]))\n'
    )
    pages = {
      name: pages_lib.Page(name, (str(program), code), ('x',), 1.0)
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

  def test_a_signal_reaches_the_command(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / 'program.py').write_text(
      'import os, pathlib, signal, time\n'
      'def end(*_):\n'
      '  pathlib.Path("ended").touch()\n'
      '  os._exit(0)\n'
      'signal.signal(signal.SIGTERM, end)\n'
      'os.kill(os.getppid(), signal.SIGINT)\n'
      'time.sleep(60)\n'
    )
    with self.assertRaises(KeyboardInterrupt):
      programs.call([sys.executable, 'program.py'], folder)
    self.assertTrue((folder / 'ended').exists())

  def _git(self, *args):
    git = ['git', '-C', self.root, '-c', 'user.name=a', '-c', 'user.email=a@b']
    return subprocess.run(
      [*git, *args], check=True, capture_output=True, text=True
    ).stdout.strip()

  def _commit(self, **texts):
    for name, text in texts.items():
      path = self.root / 'experiments' / f'{name}.py'
      path.parent.mkdir(exist_ok=True)
      path.write_text(text)
    self._git('add', '.')
    self._git('commit', '-qm', 'Change')
    return self._git('rev-parse', '--short', 'HEAD')

  def _start(self):
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.enter_context(mock.patch.object(pages_lib, '_HERE', self.root))
    self.enter_context(mock.patch.object(provenance, '_ROOT', self.root))
    self._git('init', '-q')
    imports = 'from experiments import part\n'
    return self._commit(main=imports, part='', other='')

  def test_says_how_old_a_page_is(self):
    first = self._start()
    code = ('experiments/main.py',)
    page = pages_lib.Page('page', ('launch/run.py',), code, 1.0)
    self.assertStartsWith(pages_lib.describe(page), 'not made yet')
    folder = self.root / 'experiments/results/page'
    folder.mkdir(parents=True)
    readme = folder / 'README.md'
    readme.write_text(f'- commit: {first}\n')
    self._commit(other='1')
    self.assertEndsWith(pages_lib.describe(page), 'up to date')
    self._commit(part='1')  # which main imports
    self.assertEndsWith(pages_lib.describe(page), 'in 1 commits since')
    self._commit(main='2')  # which imports it no more
    self.assertEndsWith(pages_lib.describe(page), 'in 1 commits since')
    readme.write_text(f'- commit: **{first}-dirty: with changes**\n')
    self.assertEndsWith(pages_lib.describe(page), 'that are in no commit')
    readme.write_text('- commit: 1234567\n')
    self.assertEndsWith(pages_lib.describe(page), 'not known here')

  def test_copies_reports_and_has_pages_say_that_they_are_old(self):
    first = self._start()
    (self.root / 'program.py').write_text(
      'import pathlib, sys\n'
      'folder = pathlib.Path(sys.argv[1].split("=")[1])\n'
      'folder.mkdir(exist_ok=True)\n'
      'for name in ("summary.json", "curve.png", "other.txt"):\n'
      '  (folder / name).write_text(name)\n'
      f'text = "- commit: {first}\\n- machine: x\\n"\n'
      '(folder / "report.md").write_text(text)\n'
    )
    code = ('experiments/main.py',)
    page = pages_lib.Page('page', ('program.py',), code, 1.0, None)
    folder = self.root / page.path
    for changes, lines in (
      ({}, [f'- commit: {first}', '- machine: x']),
      (
        {'part': '1'},
        [
          f'- commit: {first}',
          '- code: **its code has changed in 1 commits since**',
          '- machine: x',
        ],
      ),
    ):
      if changes:
        self._commit(**changes)
      for _ in range(2):
        with contextlib.redirect_stdout(io.StringIO()) as out:
          self.assertEqual(pages_lib.make({'page': page}, self.root), 0)
        text = (folder / 'README.md').read_text()
        self.assertEqual(text.splitlines(), lines)
      self.assertEqual('up to date' in out.getvalue(), not changes)
    names = {path.name for path in folder.iterdir()}
    self.assertEqual(names, {'README.md', 'summary.json', 'curve.png'})

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
