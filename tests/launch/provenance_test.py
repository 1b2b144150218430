"""Tests of the provenance of results."""

import pathlib
import shlex
import subprocess
import sys
from unittest import mock

from absl.testing import parameterized

from launch import provenance


class ProvenanceTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def _git(self, *arguments):
    command = ['git', '-c', 'user.name=a', '-c', 'user.email=b', *arguments]
    subprocess.run(command, cwd=self.folder, check=True, capture_output=True)

  def test_commit_is_dirty_if_code_differs_and_not_if_results_do(self):
    code = self.folder / 'code.py'
    page = self.folder / 'experiments' / 'results' / 'page.md'
    page.parent.mkdir(parents=True)
    for path in (code, page):
      path.write_text('1')
    self._git('init')
    self._git('add', '.')
    self._git('commit', '-m', 'all')
    commit = lambda: provenance.provenance()['commit']
    with mock.patch.object(provenance, '_ROOT', self.folder):
      page.write_text('2')
      clean = commit()
      self.assertRegex(clean, '^[0-9a-f]+$')
      code.write_text('2')
      self.assertEqual(commit(), f'{clean}-dirty')
    with mock.patch.object(provenance, '_ROOT', self.folder / 'nowhere'):
      self.assertEqual(commit(), 'unknown')

  def test_counts_commits_that_changed_the_code(self):
    self._git('init')
    commits = []
    for name in ('a/1.py', 'a/2.py', 'a/page.md', 'b/1.py'):
      path = self.folder / name
      path.parent.mkdir(exist_ok=True)
      path.write_text('1')
      self._git('add', '.')
      self._git('commit', '-m', name)
      with mock.patch.object(provenance, '_ROOT', self.folder):
        commits.append(provenance.provenance()['commit'])
    with mock.patch.object(provenance, '_ROOT', self.folder):
      count = provenance.changes_since
      self.assertEqual(count(commits[0], ['a']), 1)  # pages are no code
      self.assertEqual(count(f'{commits[0]}-dirty', ['a', 'b']), 2)
      self.assertEqual(count(commits[-1], ['a', 'b']), 0)
      self.assertIsNone(count('unknown', ['a']))

  def test_starts_of_a_run(self):
    arguments = ['sweep.py', '--run_flag=--env=TOKEN=geheim']
    with mock.patch.object(sys, 'argv', arguments):
      provenance.note_start(self.folder, num_jobs=2, is_here=True)
      provenance.note_start(self.folder, num_jobs=1, is_here=False)
    here, elsewhere = provenance.read_starts(self.folder)
    self.assertEndsWith(here['command'], 'TOKEN=...')
    self.assertRegex(here['machine'], r'^\d+ cores, .*, 2 runs at a time$')
    self.assertRegex(here['software'], r'^Python 3\S+, jax \d')
    self.assertNotIn('machine', elsewhere)
    self.assertEqual(here['commit'], elsewhere['commit'])
    self.assertEmpty(provenance.read_starts(self.folder / 'another'))

  def test_lists_all_sources(self):
    sources = [
      {'commit': 'b2', 'machine': 'x', 'date': '2026-03-02'},
      {'commit': 'a1-dirty', 'machine': 'x', 'date': '2025-12-31'},
      {'commit': 'b2', 'date': '2026-01-01'},
    ]
    self.assertEqual(
      provenance.listed(sources, {'cells': '3'}),
      '- commit: **a1-dirty: with changes that are in no commit**; b2\n'
      '- machine: x\n'
      '- date: 2025-12-31 to 2026-03-02\n'
      '- cells: 3',
    )

  def test_lists_commands(self):
    sources = [
      {'command': shlex.join(['python', 'run.py', f"--set=names=('{name}',)"])}
      | {'commit': commit}
      for name, commit in (('M3', 'b'), ('AdamW', 'a'), ('M3', 'a'))
    ]
    self.assertEqual(
      provenance.listed(sources, {}),
      '- commands:\n'
      '  - `python run.py "--set=names=(\'AdamW\',)"`\n'
      '  - `python run.py "--set=names=(\'M3\',)"`\n'
      '- commit: a; b',
    )

  @parameterized.parameters(
    ('run.py --workdir=/a/b/cmp', 'run.py --workdir=cmp'),
    ("run.py '--set=x=(1, 2)' --workdir=runs/cmp", None),
    (
      '/a/b/run.py --config=experiments/x.py:y',
      'run.py --config=experiments/x.py:y',
    ),
  )
  def test_commands_without_folders_of_the_machine(self, command, expected):
    self.assertEqual(provenance.portable(command), expected or command)
