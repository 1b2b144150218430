"""Tests of the package as a whole: what it ships, pins and imports."""

import ast
import configparser
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

from absl.testing import parameterized
from packaging import requirements

_ROOT = pathlib.Path(__file__).resolve().parents[1]

# A room may import its own tier and those before it in this list; launch and
# experiments, which stand beside the package, may import all of it.
_TIERS = (
  (
    'accelerators',
    'errors',
    'files',
    'markdown',
    'cluster',
    'distributed',
    'parameters',
    'sharding',
    'subtrees',
    'context_parallel',
    'compilation',
    'configs',
    'data',
    'newton_schulz',
    'optimizers',
    'tasks',
  ),
  ('memory',),
  ('layers',),
  ('levels',),
  ('models', 'linen'),
  ('pretrained',),
  ('inference',),
  ('evaluation',),
  ('training',),
  ('planning', 'serving'),
)


def _read_setup() -> configparser.ConfigParser:
  setup = configparser.ConfigParser()
  setup.read(_ROOT / 'setup.cfg')
  return setup


def _rooms() -> list[str]:
  package = _ROOT / 'nested_learning'
  return sorted(
    path.stem
    for path in package.iterdir()
    if (path.suffix == '.py' or (path / '__init__.py').is_file())
    and path.stem != '__init__'
  )


def _documents() -> list[str]:
  """Returns the Markdown pages that people write, from the root."""
  pages = [_ROOT / 'README.md', _ROOT / 'WORKSPACE.md']
  for top in ('nested_learning', 'launch', 'experiments'):
    pages += sorted((_ROOT / top).rglob('README.md'))
  made = ('experiments/results/', 'experiments/compiled/')
  names = [str(page.relative_to(_ROOT)) for page in pages]
  return [name for name in names if not name.startswith(made)]


def _python_files() -> list[pathlib.Path]:
  tops = ('nested_learning', 'launch', 'experiments')
  return sorted(path for top in tops for path in (_ROOT / top).rglob('*.py'))


class HouseTest(parameterized.TestCase):
  def test_import_is_light(self):
    code = 'import sys, nested_learning; print("jax" in sys.modules)'
    output = subprocess.check_output(
      [sys.executable, '-c', code], text=True, cwd=_ROOT
    )
    self.assertEqual(output.strip(), 'False')

  def test_every_room_has_a_tier(self):
    known = {room for tier in _TIERS for room in tier}
    self.assertEqual(set(_rooms()) - known, set())

  def test_imports_point_one_way(self):
    tiers = {room: i for i, tier in enumerate(_TIERS) for room in tier}
    for path in (_ROOT / 'nested_learning').rglob('*.py'):
      room = path.relative_to(_ROOT / 'nested_learning').parts[0]
      room = room.removesuffix('.py')
      for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
          continue
        source = (node.module or '').split('.')
        if source[0] != 'nested_learning' or room == '__init__':
          continue
        names = source[1:2] or [alias.name for alias in node.names]
        for name in names:
          self.assertLessEqual(
            tiers[name],
            tiers[room],
            f'{path.name} of {room} imports {name}, which is built on it.',
          )

  def test_pins_are_inside_the_ranges(self):
    lines = (_ROOT / 'constraints.txt').read_text().splitlines()
    pins = dict(line.split('==') for line in lines if line[:1] != '#')
    pins = {re.sub('[-_.]+', '-', k).lower(): v for k, v in pins.items()}
    setup = _read_setup()
    extras = setup['options.extras_require']
    ranges = setup['options']['install_requires'].split('\n')
    for extra in set(extras) - {'tpu', 'cuda'}:  # their pin is that of jax
      ranges += extras[extra].split('\n')
    for line in filter(None, ranges):
      requirement = requirements.Requirement(line)
      name = re.sub('[-_.]+', '-', requirement.name).lower()
      self.assertIn(name, pins)
      self.assertIn(pins[name], requirement.specifier)

  @parameterized.parameters('launch', 'experiments')
  def test_the_library_does_not_import_its_users(self, user):
    for path in (_ROOT / 'nested_learning').rglob('*.py'):
      for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
          names = [node.module or '']
        elif isinstance(node, ast.Import):
          names = [alias.name for alias in node.names]
        for name in names:
          self.assertNotEqual(name.split('.')[0], user, path)

  def test_the_engine_imports_no_extension(self):
    for path in (_ROOT / 'nested_learning' / 'memory').glob('*.py'):
      self.assertNotRegex(
        path.read_text(), r'(from|import) nested_learning\S*\.extensions', path
      )

  def test_no_package_hides_a_module_of_its_own(self):
    for init in (_ROOT / 'nested_learning').rglob('__init__.py'):
      modules = {path.stem for path in init.parent.iterdir()} - {'__init__'}
      for node in ast.walk(ast.parse(init.read_text())):
        if isinstance(node, ast.ImportFrom):
          package = '.'.join(init.parent.relative_to(_ROOT).parts)
          for alias in node.names:
            if node.module != package:  # not the module itself
              self.assertNotIn(alias.asname or alias.name, modules, init)

  def test_docstrings_begin_with_what_the_code_does(self):
    riddles = re.compile(r'What |Of |Where |Which |Who |Those |That ')
    for path in _python_files():
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
          docstring = ast.get_docstring(node) or ''
          self.assertNotRegex(
            docstring.split('\n')[0], rf'^({riddles.pattern})', path
          )

  def test_messages_name_a_field_without_self(self):
    for path in _python_files():
      self.assertNotRegex(path.read_text(), r'\{self\.\w+=', path)

  def test_reading_list_adds_up(self):
    text = (_ROOT / 'WORKSPACE.md').read_text()
    text = text[: text.index('## Rooms')]
    rows = re.findall(r'^\| `([\w/.]+\.py)` \| ([\d,]+) \|', text, re.M)
    self.assertGreater(len(rows), 10)
    total = 0
    for name, said in rows:
      path = _ROOT / 'nested_learning' / name
      lines = len(path.read_text().splitlines())
      total += lines
      said = int(said.replace(',', ''))
      self.assertAlmostEqual(said, lines, delta=max(10, lines // 10), msg=name)
    self.assertLessEqual(total, 3000)

  @parameterized.parameters(_documents())
  def test_paths_in_the_documents_exist(self, document):
    text = (_ROOT / document).read_text()
    rooms = 'nested_learning|experiments|launch|tests'
    paths = set(re.findall(rf'\b(?:{rooms})/[\w/.]*\w', text))
    # In the map, files of the library are named from inside the package.
    paths |= set(re.findall(r'(?<![\w/*])\w[\w/]*\.py\b', text))
    folders = (_ROOT, _ROOT / 'nested_learning', (_ROOT / document).parent)
    for path in paths:
      found = any(
        (folder / path).exists() or list(folder.glob(f'**/{path}'))
        for folder in folders
      )
      self.assertTrue(found, f'{document} names {path}.')
    for link in re.findall(r'\]\(([^)#:]+)\)', text):
      target = (_ROOT / document).parent / link
      self.assertTrue(target.exists(), f'{document} links to {link}.')

  @parameterized.parameters(
    name for name in _documents() if '```python' in (_ROOT / name).read_text()
  )
  def test_examples_in_the_documents_run(self, document):
    blocks = re.findall(
      r'```python\n(.*?)```', (_ROOT / document).read_text(), re.DOTALL
    )
    folder = self.create_tempdir().full_path
    run = subprocess.run(
      [sys.executable, '-c', '\n'.join(blocks)],
      capture_output=True,
      text=True,
      cwd=folder,
      env={**os.environ, 'PYTHONPATH': str(_ROOT)},
    )
    self.assertEqual(run.returncode, 0, run.stderr[-2000:])
    if document == 'README.md':  # the loss of a model that has learned
      self.assertLess(float(run.stdout.split()[0]), 1.0)  # from log(257) = 5.5

  def test_readme_is_short(self):
    lines = (_ROOT / 'README.md').read_text().splitlines()
    self.assertLessEqual(len(lines), 200)

  def test_wheel_holds_the_package_and_its_type_marker(self):
    source = pathlib.Path(self.create_tempdir().full_path, 'source')
    source.mkdir()
    for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'):
      shutil.copy(_ROOT / name, source)
    for name in ('nested_learning', 'launch', 'experiments', 'tests'):
      shutil.copytree(_ROOT / name, source / name)
    command = '-m pip wheel --quiet --no-deps --no-build-isolation -w . .'
    subprocess.run([sys.executable, *command.split()], check=True, cwd=source)
    (wheel,) = source.glob('*.whl')
    with zipfile.ZipFile(wheel) as archive:
      names = set(archive.namelist())
      (metadata,) = [n for n in names if n.endswith('/METADATA')]
      metadata = archive.read(metadata).decode()
    tops = {name.split('/')[0] for name in names}
    tops -= {name for name in tops if name.endswith('.dist-info')}
    self.assertEqual(tops, {'nested_learning'})
    self.assertIn('nested_learning/py.typed', names)
    package = _ROOT / 'nested_learning'
    for path in package.rglob('*.py'):
      self.assertIn(str(path.relative_to(_ROOT)), names)
    for extra in _read_setup()['options.extras_require']:
      self.assertIn(f'Provides-Extra: {extra}', metadata)
