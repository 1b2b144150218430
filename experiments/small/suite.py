"""The small suite: models, tasks, numbers of steps, gates and printed numbers.

A run is `experiments/tasks.py:family,preset`, whose `model_config` defines the
models, with the changes of its task and its own.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, Tables 1, 3, 4 and 5.
"""

from collections.abc import Mapping, Sequence
import difflib
import hashlib
import pathlib
from typing import NamedTuple

from launch import sweeps
from nested_learning import configs
from nested_learning import errors

_EXPERIMENT = pathlib.Path(__file__).resolve().parents[1] / 'tasks.py'


class Task(NamedTuple):
  """A task of the suite.

  Attributes:
    preset: Name in `tasks.TASKS`.
    about: A sentence or two for the page.
    columns: Keys of a run's summary.json; the first is the task's score.
    longer: Factors of the length of further rows to evaluate on.
    changes: Assignments for all its runs, as for --set.
  """

  preset: str
  about: str
  columns: tuple[str, ...]
  longer: tuple[int, ...] = (2,)
  changes: tuple[str, ...] = ()


TASKS = {
  'mqar': Task(
    'mqar_rewritten_small',
    'Recall of eight keys, whose values are written eight more times before '
    'they are asked for: the last value counts.',
    ('accuracy', 'all_right', 'accuracy_2x', 'all_right_2x'),
  ),
  'parity': Task(
    'parity',
    'Whether the number of ones is even, after every symbol of strings of 2 to '
    '50; then of 51 to 100, and of 151 to 200.',
    ('all_right_2x', 'all_right', 'all_right_4x', 'accuracy_2x'),
    longer=(2, 4),
  ),
  'aa': Task(
    'aa',
    'Whether the number of symbols is even, after every symbol; lengths as in '
    'parity.',
    ('all_right_2x', 'all_right', 'all_right_4x', 'accuracy_2x'),
    longer=(2, 4),
  ),
  's_niah_1': Task(
    'niah_single_1_small',
    'A needle of four digits, as tokens, in hay that repeats itself; then with '
    'up to eight times as much hay, read in pieces with the state carried.',
    ('all_right_8x', 'all_right', 'all_right_2x', 'all_right_4x'),
    longer=(2, 4, 8),
    changes=('data.batch_size=16',),
  ),
  'selective_copying': Task(
    'selective_copying_small',
    'Eight tokens among blanks, to be repeated in their order.',
    ('macro_accuracy', 'accuracy', 'all_right', 'macro_accuracy_2x'),
  ),
  'fuzzy_recall': Task(
    'fuzzy_recall_small',
    'Recall where keys and values are one or two tokens long.',
    ('macro_accuracy', 'accuracy', 'all_right', 'macro_accuracy_2x'),
  ),
  'documents': Task(
    'documents_small',
    'The value of one of four to eight attributes of a document, asked for by '
    'the beginning of its line, and written out.',
    ('string_match', 'accuracy', 'string_match_2x'),
    changes=('data.batch_size=16',),
  ),
  'compression': Task(
    'compression',
    'All of a row of 32 random tokens, from the output at its last one.',
    ('macro_accuracy', 'accuracy'),
    longer=(),
  ),
  'regression': Task(
    'regression_small',
    'A linear function of five numbers, to be learned from the points that the '
    'row has shown; saying 0 gives an error of 5.',
    ('squared_error', 'squared_error_2x'),
  ),
}

RUNS = (  # task, family, steps
  ('mqar', 'transformer', 800),
  ('mqar', 'linear_attention', 600),
  ('mqar', 'deltanet', 600),
  ('mqar', 'gated_deltanet', 600),
  ('mqar', 'titans', 1000),
  ('mqar', 'hope', 2000),
  ('parity', 'transformer', 400),
  ('parity', 'linear_attention', 400),
  ('parity', 'deltanet', 400),
  ('parity', 'hope', 300),
  ('aa', 'transformer', 300),
  ('aa', 'linear_attention', 300),
  ('aa', 'deltanet', 300),
  ('aa', 'hope', 400),
  ('s_niah_1', 'transformer', 600),
  ('s_niah_1', 'gated_deltanet', 600),
  ('s_niah_1', 'titans', 600),
  ('s_niah_1', 'hope', 1200),
  ('selective_copying', 'transformer', 500),
  ('selective_copying', 'deltanet', 500),
  ('selective_copying', 'titans', 500),
  ('selective_copying', 'hope', 500),
  ('fuzzy_recall', 'transformer', 500),
  ('fuzzy_recall', 'deltanet', 500),
  ('fuzzy_recall', 'titans', 500),
  ('fuzzy_recall', 'hope', 500),
  ('documents', 'transformer', 400),
  ('documents', 'hope', 400),
  ('compression', 'transformer', 500),
  ('compression', 'hope', 500),
  ('regression', 'transformer', 500),
  ('regression', 'linear_attention', 500),
  ('regression', 'deltanet', 500),
  ('regression', 'titans', 500),
  ('regression', 'hope', 500),
)

# Two steps of two rows through one layer, to see that everything runs.
_QUICK = (
  'train.num_steps=2',
  'train.evaluate_every=2',
  'data.batch_size=2',
  'evaluation.num_batches=1',
  'model.num_layers=1',
)


def make_cells(*, quick: bool = False) -> tuple[sweeps.Cell, ...]:
  """Makes every cell of the suite.

  Args:
    quick: Whether to make the runs as short as possible.

  Returns:
    The cells. The row of a cell is 'family.task'. Its name ends in a digest of
    its config, so that runs with other settings are in other folders.
  """
  cells = []
  for name, family, num_steps in RUNS:
    task = TASKS[name]
    spec = f'{_EXPERIMENT}:{family},{task.preset}'
    assignments = (
      f'train.num_steps={num_steps}',
      f'train.evaluate_every={num_steps}',
      f'data.longer={task.longer}',
      *task.changes,
      *(_QUICK if quick else ()),
    )
    config = configs.override(configs.load(spec), assignments)
    digest = hashlib.sha1(configs.to_json(config).encode()).hexdigest()[:8]
    row = f'{family}.{name}'
    cells.append(sweeps.Cell(f'{row}-{digest}', spec, assignments, row=row))
  return tuple(cells)


def select(
  cells: Sequence[sweeps.Cell], only: Sequence[str]
) -> tuple[sweeps.Cell, ...]:
  """Selects cells by the families and tasks of --only.

  Args:
    cells: The suite.
    only: Families, tasks, or both as in 'hope.mqar'. Families and tasks select
      these families on these tasks. Empty selects all.

  Returns:
    The selected cells, in their order.

  Raises:
    errors.UserError: A name is unknown, or no run matches.
  """
  rows = {cell.row for cell in cells}
  families = {row.split('.')[0] for row in rows}
  tasks = {row.split('.')[1] for row in rows}
  known = sorted(families | tasks | rows)
  for name in only:
    if name not in known:
      (nearest,) = difflib.get_close_matches(name, known, 1, 0)
      raise errors.UserError(
        f'--only={name} is not a family or task of the suite, which has '
        f'{", ".join(sorted(families | tasks))}; the nearest is {nearest}.'
      )
  families, tasks = families & set(only), tasks & set(only)

  def is_selected(row):
    family, task = row.split('.')
    both = family in (families or {family}) and task in (tasks or {task})
    return row in only or (both and bool(families or tasks or not only))

  selected = tuple(cell for cell in cells if is_selected(cell.row))
  if not selected:
    raise errors.UserError(
      f'--only={",".join(only)}: the suite has no run of {sorted(families)} on '
      f'{sorted(tasks)}; leave out one of these.'
    )
  return selected


class Gate(NamedTuple):
  """A bound on a model's score on a task, which holds for every seed.

  Attributes:
    task: Name of a task of the suite.
    family: Family of the zoo.
    key: Key of a run's summary.json.
    at_least: The value must not be below it.
    below: The value must be below it.
  """

  task: str
  family: str
  key: str
  at_least: float = float('-inf')
  below: float = float('inf')

  def passed(self, values: Sequence[float]) -> bool | None:
    """Returns whether all values pass; None if there are none."""
    if not values:
      return None
    return all(self.at_least <= value < self.below for value in values)


_SOLVED = 0.95

GATES = (
  # Linear attention adds to a value and cannot replace it.
  Gate('mqar', 'linear_attention', 'all_right', below=0.5),
  Gate('mqar', 'deltanet', 'accuracy', at_least=_SOLVED),
  Gate('mqar', 'gated_deltanet', 'accuracy', at_least=_SOLVED),
  Gate('mqar', 'titans', 'accuracy', at_least=_SOLVED),
  Gate('mqar', 'hope', 'accuracy', at_least=_SOLVED),
  # Parity needs a state that changes sign, or a non-linear read.
  Gate('parity', 'hope', 'all_right_2x', at_least=_SOLVED),
  Gate('parity', 'transformer', 'all_right_2x', below=_SOLVED),
  Gate('parity', 'linear_attention', 'all_right_2x', below=_SOLVED),
  Gate('aa', 'hope', 'all_right_2x', at_least=_SOLVED),
  Gate('aa', 'transformer', 'all_right_2x', below=_SOLVED),
  Gate('aa', 'linear_attention', 'all_right_2x', below=_SOLVED),
  # The needle is kept, however much hay follows.
  Gate('s_niah_1', 'hope', 'all_right_8x', at_least=_SOLVED),
)


class Printed(NamedTuple):
  """Numbers that the paper prints for a task.

  Attributes:
    where: The table and the meaning of its numbers.
    values: From family to the printed text.
  """

  where: str
  values: Mapping[str, str]


_MAD = 'Table 4, accuracy in per cent'
_LANGUAGES = (
  'Table 5, strings all right in per cent, of training lengths / of 51 to 100'
)

PRINTED = {
  's_niah_1': Printed(
    'Table 1, S-NIAH-1 at 4K / 8K / 16K tokens, per cent',
    {
      'transformer': '88.6 / 76.4 / 79.8',
      'titans': '100 / 100 / 100',
      'hope': '100 / 100 / 100',
    },
  ),
  'documents': Printed(
    'Table 3, SWDE / FDA, per cent',
    {
      'transformer': '71.4 / 67.3',
      'hope': '65.9 / 41.9',
    },
  ),
  'compression': Printed(_MAD, {'transformer': '49.4', 'hope': '51.2'}),
  'fuzzy_recall': Printed(
    _MAD, {'transformer': '47.9', 'titans': '50.0', 'hope': '52.1'}
  ),
  'selective_copying': Printed(
    _MAD, {'transformer': '96.2', 'titans': '99.4', 'hope': '99.7'}
  ),
  'parity': Printed(
    _LANGUAGES,
    {
      'transformer': '46.4 / 0',
      'linear_attention': '78.1 / 0',
      'deltanet': '98.2 / 10.1',
      'hope': '100 / 100',
    },
  ),
  'aa': Printed(
    _LANGUAGES,
    {
      'transformer': '0 / 0',
      'linear_attention': '0 / 0',
      'deltanet': '0 / 0',
      'hope': '100 / 100',
    },
  ),
}
