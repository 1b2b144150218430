"""README's claims and the numbers of result pages, against the data beside.

Every decimal number in what README says about results belongs to a claim that
has its source. Tables and sentences of pages that a program made are read
against summary.json, results.csv and the cells in the same folder. Pages that
people wrote name command, commit and date in every section.
"""

from collections.abc import Callable
import dataclasses
import json
import pathlib
import re
import shutil
from typing import NamedTuple
from unittest import mock

from absl.testing import parameterized

from experiments import cells as cells_lib
from experiments import compiled
from experiments import pages
from experiments import streams
from experiments import streams_report
from experiments.pretrained import streams as pretrained_streams
from experiments.pretrained import streams_report as pretrained_report
from nested_learning import configs
from nested_learning import models
from tests.experiments import page_numbers

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_RESULTS = _ROOT / 'experiments' / 'results'


def _pages(*, made: bool) -> list[str]:
  """Returns folders of pages that a program made, or that people wrote."""
  return sorted(
    str(page.parent.relative_to(_RESULTS))
    for page in _RESULTS.rglob('README.md')
    if (page.parent / 'summary.json').is_file() == made
  )


class Claim(NamedTuple):
  """Numbers in README.

  Attributes:
    said: Pattern of the sentence; its groups are the numbers.
    page: Folder of the page that has them.
    values: Function of the page's data that returns the numbers.
  """

  said: str
  page: str
  values: Callable[[page_numbers.Sweep], list[float]]


_STREAM = 'stream_bits_per_byte'
_CLAIMS = (
  Claim(
    r'(\d\.\d+) bits per byte with its writes off, (\d\.\d+) with memory '
    r'writes, (\d\.\d+) with levels learning',
    'quickstart',
    lambda sweep: [
      sweep.values('config', f'{_STREAM}{end}')['0']
      for end in ('_writes_off', '', '_levels_learning')
    ],
  ),
  Claim(
    r'ends with (\d\.\d+) bits per byte \((\d\.\d+) with the memories',
    'quickstart',
    lambda sweep: [
      sweep.values('config', f'bits_per_byte{end}')['0']
      for end in ('', '_writes_off')
    ],
  ),
  Claim(
    r'levels that learn take it from (\d\.\d+) to (\d\.\d+) bits per byte',
    'quickstart',
    lambda sweep: [
      sweep.summary[f'config/{_STREAM}{end}']
      for end in ('', '_levels_learning')
    ],
  ),
  Claim(
    r'levels that learn save Hope (\d\.\d+) bits per byte, Gated DeltaNet with '
    r'the same levels (\d\.\d+) and Transformer\+\+ (\d\.\d+); a temperature '
    r'and a bias in their place save Hope (\d\.\d+)',
    'streams',
    lambda data: [
      *(data.summary[f'{name}_levels_gain'] for name in streams.MODELS),
      data.summary['hope_calibration_gain'],
    ],
  ),
  Claim(
    r'it recalls (\d\.\d+) of them after 16,384 tokens, (\d\.\d+) after '
    r'131,072 and (\d\.\d+) after 1,048,576, with memories alone (\d\.\d+), '
    r'a guess',
    'facts',
    lambda data: [
      data.summary[f'{name}_after_{gap}']
      for name, gap in (
        ('fast_and_slow_level', 16_384),
        ('fast_and_slow_level', 131_072),
        ('fast_and_slow_level', 1_048_576),
        ('memories_only', 1_048_576),
      )
    ],
  ),
  Claim(
    r'both levels answer (\d\.\d+) of the changed facts with their new value '
    r'and (\d\.\d+) of the names that were never said with an invented one; '
    r'after 65,536 tokens they are less sure than the threshold, answer '
    r'(\d\.\d+), and (\d\.\d+) of their answers are made up',
    'closed_book',
    lambda data: [
      data.summary[f'fast_and_slow_level_{name}']
      for name in (
        'changed_right_after_4096',
        'never_said_made_up_after_4096',
        'changed_right_after_65536',
        'made_up_after_65536',
      )
    ],
  ),
  Claim(
    r'keep of the first topic what the slow one keeps alone, (\d\.\d+) nats '
    r'per token after 65,536 tokens of others, and on the stream itself their '
    r'loss is (\d\.\d+) where the best single level has (\d\.\d+)',
    'horizon',
    lambda data: [
      data.summary['all_levels_gain_after_65536'],
      data.summary['all_levels_loss_on_the_stream'],
      min(
        data.summary[f'{name}_level_loss_on_the_stream']
        for name in ('fast', 'middle', 'slow')
      ),
    ],
  ),
  Claim(
    r'a small Hope is (\d\.\d+) bits per byte ahead of Transformer\+\+ and '
    r'(\d\.\d+) ahead of Gated DeltaNet, and (\d\.\d+) ahead of attention '
    r'with the short convolution',
    'ablations/hope',
    lambda sweep: [
      sweep.summary[f'{row}/bits_per_byte/difference']
      for row in ('transformer', 'gated_deltanet', 'convolved_transformer')
    ],
  ),
  Claim(
    r'with own outputs and on fewer tokens, it was (\d\.\d+) ahead of Hope as '
    r'printed',
    'ablations/hope_first',
    lambda sweep: [sweep.summary['printed/bits_per_byte/difference']],
  ),
)
# Words of README's table, and patterns of the page that say the same.
_WORDS = (
  (
    'three levels, memories twice as wide and their own outputs as targets are '
    'no different',
    'ablations/hope',
    [
      r'\| levels_3 +\| [^|]*\| no different',
      r'\| target_own +\| [^|]*\| no different',
      r'\| hidden_128 +\| [^|]*\| no different',
      'Behind it: .*gated_deltanet, transformer, convolved_transformer',
    ],
  ),
  (
    'memories that make its keys, values and rates made no difference but in '
    'speed',
    'ablations/hope_first',
    [r'\| adaptive +\| [^|]*\| no different'],
  ),
  (
    'Hope alone learns parity, also on strings twice as long, since its writes '
    'may reflect (Gated DeltaNet learns it with rates up to 2)',
    'small',
    [
      r'\| parity +\| hope +\| [^|]*2x[^|]*\| [^|]*\| passed',
      'max_inner_lr=2 Gated DeltaNet learns it as well',
      'Fewer than two models have learned the task: no comparison[.]',
    ],
  ),
  (
    'Hope, Gated DeltaNet and attention with a short convolution learn the '
    'recall alike, Transformer++ does not in as many steps; on rows twice as '
    'long convolved attention is behind there',
    'small',
    [
      'The highest answers right is that of hope[.] No different from it by '
      'twice the larger spread: convolved_transformer, gated_deltanet',
      r'\| transformer +\| [*]{2}not trained',
      'The highest answers right, 2x is [^.]*[.][^.]*[.] Behind it: '
      'convolved_transformer',
    ],
  ),
  (
    "on the quickstart's language model M3 without its slow momentum is "
    'lowest, no different from Muon and M3, and ahead of AdamW',
    'optimizers',
    [
      'The lowest bits per byte is that of M3 no slow momentum. No different '
      'from it by twice the larger spread: Muon, M3,',
      'Behind it: preconditioned momentum, AdamW,',
    ],
  ),
  (
    'on a vision transformer corrected Delta Gradient Descent is lowest, no '
    'different from M3 and Muon',
    'optimizers',
    [
      'The lowest validation loss is that of DGD corrected. No different from '
      'it by twice the larger spread: [^.]*Muon, M3[.]',
    ],
  ),
  (
    'a window of four times the length gains more; most arms are not run yet',
    'pretrained_streams',
    ['The frozen model gains .* from four times the window', 'Not run yet: '],
  ),
)
# Words of README's table, and keys of summary.json in ascending order.
_ORDERS = (
  *(
    (
      'one layer whose keys or queries are memories finds values behind '
      'several aliases; a delta rule needs a layer for each',
      'aliases',
      [f'{key}_{order}_{hops}' for key in rows],
    )
    for order, hops, rows in (
      ('values_last', 1, ('delta_rule', 'delta_rule_two_layers')),
      ('values_last', 2, ('delta_rule_two_layers', 'and_queries')),
      ('backwards', 2, ('delta_rule_two_layers', 'and_keys')),
    )
  ),
  (
    'everything in a direction that repeats, little in each where inputs vary',
    'forgetting',
    [f'dgd_printed_dot_product_rank_{n}_inside' for n in (1, 64)],
  ),
  (
    'but more of the memory as a whole',
    'forgetting',
    [f'dgd_printed_dot_product_rank_{n}_whole' for n in (64, 1)],
  ),
  (
    "on text whose topic shifts once and for all, M3's slow momentum forgets "
    'less',
    'optimizers',
    [
      'topics.once,m3_forgotten',
      'topics.once,m3_no_slow_momentum_forgotten',
    ],
  ),
  (
    'and learns more slowly',
    'optimizers',
    ['topics.once,m3_no_slow_momentum_online', 'topics.once,m3_online'],
  ),
  (
    'a single MLP in place of the chain is slightly better at this size',
    'ablations/components',
    ['no_cms/bits_per_byte', 'hope/bits_per_byte'],
  ),
  *(
    (
      'without the delta rule it loses most',
      'ablations/components',
      [f'{other}/bits_per_byte', 'no_dgd/bits_per_byte'],
    )
    for other in ('no_retention', 'no_cms', 'static_k', 'static_v')
  ),
)


def wrong_in_readme(text: str) -> list[str]:
  """Returns what README says about results and no page has."""
  text = ' '.join(text.split())
  wrong, covered = [], set()
  for claim in _CLAIMS:
    folder = _RESULTS / claim.page
    match = re.search(claim.said, text)
    if match is None:
      wrong.append(f'not said any more: {claim.said}')
      continue
    data = page_numbers.Sweep.read(folder)
    wanted = claim.values(data)
    for i, (shown, value) in enumerate(
      zip(match.groups(), wanted, strict=True)
    ):
      covered.add(match.start(i + 1))
      wrong += (
        [] if page_numbers.agrees(shown, value) else [f'{shown} for {value}']
      )
  for words, page, patterns in _WORDS:
    said = ' '.join(page_numbers.read_text(_RESULTS / page).split())
    if words not in text:
      wrong.append(f'not said any more: {words}')
    wrong += [f'{page}: {p}' for p in patterns if not re.search(p, said)]
  for words, page, keys in _ORDERS:
    summary = page_numbers.read_summary(_RESULTS / page)
    values = [summary[key] for key in keys]
    if words not in text or values != sorted(values):
      wrong.append(f'{words}: {values}')
  for begin, end in (
    ('# nested_learning', '## What it is'),
    ('## Results', '## I'),
  ):
    start = text.index(begin)
    part = text[start : text.index(end, start)]
    for match in re.finditer(r'\b\d+\.\d+\b', part):
      if start + match.start() not in covered and match[0] not in _VERSIONS:
        wrong.append(f'{match[0]} belongs to no claim')
  return wrong


_VERSIONS = {'3.11'}  # of Python


def _remake(
  name: str, folder: pathlib.Path, scratch: pathlib.Path
) -> pathlib.Path | None:
  """Writes the page of some cells again; returns its folder, None if unknown.

  Nothing is measured: a cell that the page's command would measure is an error.
  """
  made = scratch / 'page'
  if name in _REPORTS:
    _REPORTS[name](cells_lib.Store(scratch, folder, {}), made)
    return made
  programs = [
    page.program
    for page in pages.PAGES.values()
    if (page.folder, page.flag) == (name, '--set=results')
  ]
  if not programs:
    return None
  shutil.copytree(folder, made)
  spec = programs[0][1].removeprefix('--config=')
  experiment = configs.load_experiment(str(_ROOT / spec))
  config = dataclasses.replace(experiment.config, results=str(made))
  with mock.patch.object(cells_lib, 'measure', _find):
    experiment.run(config, str(scratch / 'run'), 'train')
  return made


def _find(store, task, name, settings, make_values) -> cells_lib.Cell:
  """Returns a finished cell, in place of `cells.measure`."""
  del make_values
  found = cells_lib.read(store, task).get(name)
  if found is None or not cells_lib.agrees(found, settings):
    raise AssertionError(f'{task}: {name} is not there with these settings.')
  return found


_REPORTS = {
  'streams': lambda store, folder: streams_report.write_page(
    store, folder, streams.MODELS
  ),
  'pretrained_streams': lambda store, folder: pretrained_report.write_page(
    store, folder, tuple(pretrained_streams.ARMS)
  ),
}


class ClaimsTest(parameterized.TestCase):
  def _wrong(self, name: str, folder: pathlib.Path) -> list[str]:
    """Returns the numbers of a page that a program made and have no source."""
    if (folder / 'results.csv').is_file():
      return page_numbers.wrong_in_sweep(folder)
    if name == 'optimizers':
      return page_numbers.wrong_in_optimizers(folder)
    scratch = pathlib.Path(self.create_tempdir().full_path)
    made = _remake(name, folder, scratch)
    return (
      page_numbers.wrong_in_copy(folder, made)
      if made
      else page_numbers.wrong_anywhere(folder)
    )

  @parameterized.parameters(*_pages(made=True))
  def test_pages_have_the_numbers_beside_them(self, name):
    folder = _RESULTS / name
    self.assertEqual(self._wrong(name, folder), [])
    # A number that somebody edits is noticed.
    text = page_numbers.read_text(folder)
    number = re.search(rf'(?m)^\|.*? \**({page_numbers.NUMBER})', text)
    edited = _edit(number[1])
    changed = text[: number.start(1)] + edited + text[number.end(1) :]
    copy = pathlib.Path(self.create_tempdir().full_path, 'page')
    shutil.copytree(folder, copy)
    (copy / 'README.md').write_text(changed, encoding='utf-8')
    self.assertNotEmpty(self._wrong(name, copy), f'{number[0]} as {edited}')

  def test_readme_has_the_numbers_of_pages(self):
    text = (_ROOT / 'README.md').read_text(encoding='utf-8')
    self.assertEqual(wrong_in_readme(text), [])
    for shown in re.findall(r'\b\d\.\d+ bits per byte', text):
      number = shown.split()[0]
      changed = text.replace(shown, shown.replace(number, _edit(number)))
      self.assertNotEmpty(wrong_in_readme(changed), shown)
    added = text.replace('## Install', 'Hope has 1.23 bits.\n\n## Install')
    self.assertEqual(wrong_in_readme(added), ['1.23 belongs to no claim'])

  def test_the_table_of_compiled_sizes_is_that_of_its_file(self):
    folder = _ROOT / 'experiments' / 'compiled'
    table = json.loads((folder / 'table.json').read_text(encoding='utf-8'))
    page = compiled.describe(list(table.values()))
    self.assertEqual(page_numbers.read_text(folder), page)

  def test_readme_counts_the_families(self):
    text = (_ROOT / 'README.md').read_text(encoding='utf-8')
    said = re.search(r'There are (\d+) families', text)
    self.assertEqual(int(said[1]), len(models.zoo.FAMILIES))

  @parameterized.parameters(*_pages(made=False))
  def test_pages_by_people_say_where_their_numbers_are_from(self, name):
    self.assertEqual(page_numbers.wrong_in_prose(_RESULTS / name), [])

  def test_a_section_without_its_source_is_noticed(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    page = folder / 'README.md'
    section = '# A\n\n## B\n\nLoss 1.5, `make demo`, commit {}, 2026-01-01.\n'
    page.write_text(section.format('1a2b3c4'))
    self.assertEqual(page_numbers.wrong_in_prose(folder), [])
    page.write_text(section.format('deadbee'))
    self.assertEqual(page_numbers.wrong_in_prose(folder), ['B: no commit'])
    page.write_text('# A\n\n## B\n\nThe loss is 1.5.\n')
    wrong = ['B: no command', 'B: no commit', 'B: no date']
    self.assertEqual(page_numbers.wrong_in_prose(folder), wrong)


def _edit(number: str) -> str:
  """Returns a number with another last digit."""
  digits = number.partition('e')[0]
  last = str((int(digits[-1]) + 3) % 10)
  return digits[:-1] + last + number[len(digits) :]
