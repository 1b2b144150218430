"""The small suite: its tasks, models, steps, gates and printed numbers.

A task is a sweep over models of `experiments/tasks.py`, all of which get the
same rows, steps, optimiser and number of parameters within 3 per cent. Every
rate of the grid is tried with seed 0; the best one gets all seeds:

  python launch/sweep.py --config=experiments/small/suite.py:parity --seeds=3 \
    --workdir=runs/parity

The first score of a task selects the rate. `experiments/bench_small.py` runs
the sweeps of several tasks and writes the page.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, Tables 1, 3, 4 and 5.
"""

from collections.abc import Mapping, Sequence
import difflib
from typing import NamedTuple

from experiments import tasks as experiment
from launch import sweeps
from nested_learning import configs
from nested_learning import errors
from nested_learning import training

FAMILIES = (
  'hope',
  'transformer',
  'convolved_transformer',
  'gated_deltanet',
  'deltanet',
  'titans',
  'linear_attention',
)
# Sweeps of these take about two hours on two cores.
DEFAULT_FAMILIES = (
  'hope',
  'transformer',
  'convolved_transformer',
  'gated_deltanet',
)
DEFAULT_TASKS = ('mqar_rewritten', 's_niah_1', 'parity')
FIELD = 'train.learning_rate'  # that is tuned
RATES = ('1e-3', '2e-3', '4e-3', '8e-3')
_NUM_EVALUATIONS = 10  # points of a learning curve


class Task(NamedTuple):
  """A task of the suite.

  Attributes:
    preset: Name in `nested_learning.tasks.TASKS`.
    about: A sentence or two for the page.
    columns: Keys of a run's summary.json; the first is the task's score at the
      length of training, which selects the rate and changes by small steps.
    learned: Score from which on a model has learned the task; of an error, the
      most. Chosen before any run.
    num_steps: Steps of training, the same for all models.
    longer: Factors of the length of further rows to evaluate on.
    changes: Assignments for all its runs, as for --set.
  """

  preset: str
  about: str
  columns: tuple[str, ...]
  learned: float = 0.9
  num_steps: int = 800
  longer: tuple[int, ...] = (2,)
  changes: tuple[str, ...] = ()

  @property
  def score(self) -> str:
    """Key of the score."""
    return self.columns[0]

  @property
  def best(self) -> str:
    """'min' for an error, 'max' for a share of right answers."""
    return 'min' if self.score.endswith('error') else 'max'

  def is_learned(self, score: float) -> bool:
    """Returns whether a model with this score has learned the task."""
    if self.best == 'min':
      return score <= self.learned
    return score >= self.learned


def _needle(preset: str, about: str) -> Task:
  return Task(
    f'niah_{preset}_small',
    about + ' Then with up to eight times as much hay, read in pieces.',
    ('accuracy', 'all_right', 'all_right_2x', 'all_right_4x', 'all_right_8x'),
    longer=(2, 4, 8),
    changes=('data.batch_size=16',),
  )


def _language(preset: str, about: str) -> Task:
  return Task(
    preset,
    about + ' Strings of 2 to 50 symbols; then of 51 to 100 and 151 to 200.',
    ('accuracy', 'all_right', 'all_right_2x', 'all_right_4x'),
    learned=0.95,
    num_steps=400,
    longer=(2, 4),
  )


def _mad(preset: str, about: str, learned: float, *longer: int) -> Task:
  columns = ('macro_accuracy', 'accuracy', 'all_right')
  more = tuple(f'macro_accuracy_{factor}x' for factor in longer)
  return Task(
    preset, about, columns + more, learned=learned, longer=tuple(longer)
  )


def _group(preset: str, about: str) -> Task:
  return Task(
    preset, about, ('accuracy', 'all_right', 'accuracy_2x', 'all_right_2x')
  )


_RECALL = ('accuracy', 'all_right', 'accuracy_2x', 'all_right_2x')
TASKS = {
  'mqar': Task('mqar_small', 'Recall of sixteen keys.', _RECALL),
  'mqar_rewritten': Task(
    'mqar_rewritten_small',
    'Recall of eight keys, whose values are written eight more times before '
    'they are asked for: the last value counts.',
    _RECALL,
  ),
  'recall': _mad('recall', 'Recall of pairs that repeat.', 0.9, 2),
  'noisy_recall': _mad('noisy_recall', 'Recall among noise.', 0.9, 2),
  'fuzzy_recall': _mad(
    'fuzzy_recall_small',
    'Recall where keys and values are one or two tokens long.',
    0.4,
    2,
  ),
  'selective_copying': _mad(
    'selective_copying_small',
    'Eight tokens among blanks, to be repeated in their order.',
    0.9,
    2,
  ),
  'memorization': _mad(
    'memorization', 'Values that are the same in every row.', 0.9
  ),
  'compression': _mad(
    'compression',
    'All of a row of 32 random tokens, from the output at its last one.',
    0.4,
  ),
  's_niah_1': _needle('single_1', 'A needle in hay that repeats itself.'),
  's_niah_2': _needle('single_2', 'A needle in an essay.'),
  's_niah_3': _needle('single_3', 'A long needle in an essay.'),
  'multi_key': _needle('multikey_1', 'One of four needles in an essay.'),
  'multi_key_2': _needle('multikey_2', 'A needle among needles.'),
  'multi_key_3': _needle('multikey_3', 'A long needle among long needles.'),
  'multi_value': _needle('multivalue', 'Four values of one needle.'),
  'multi_query': _needle('multiquery', 'Four needles, all asked for.'),
  'parity': _language(
    'parity',
    'Whether the number of ones is even, after every symbol. It takes writes '
    'that reflect, with rates above 1, which in this suite Hope alone has: '
    'with --set=model.mixer.max_inner_lr=2 Gated DeltaNet learns it as well '
    '(seed 0, at the smallest rate and at the largest).',
  ),
  'aa': _language(
    'aa', 'Whether the number of symbols is even, after every symbol.'
  ),
  'abab': _language('abab', 'Whether the string is a repetition of abab.'),
  'anbn': _language('anbn', 'Strings of as many b as a.'),
  'anbncn': _language('anbncn', 'Strings of as many b and c as a.'),
  'shuffle': _language('shuffle2', 'Two kinds of brackets, shuffled.'),
  's3': _group('s3', 'Products of permutations of three.'),
  'a5': _group('a5', 'Products of even permutations of five.'),
  'regression': Task(
    'regression_small',
    'A linear function of five numbers, to be learned from the points that the '
    'row has shown; saying 0 gives an error of 5.',
    ('squared_error', 'squared_error_2x'),
    learned=1.0,
  ),
  'documents': Task(
    'documents_small',
    'The value of one of four to eight attributes of a document, asked for by '
    'the beginning of its line, and written out.',
    ('accuracy', 'string_match', 'string_match_2x'),
    changes=('data.batch_size=16',),
  ),
}

# Two steps of two rows through one layer, to see that everything runs.
QUICK = (
  'train.num_steps=2',
  'train.evaluate_every=2',
  'data.batch_size=2',
  'evaluation.num_batches=1',
  'model.num_layers=1',
)


def get_config(arg: str | None = None) -> training.ExperimentConfig:
  """Returns the experiment of a task and a family.

  Args:
    arg: Such as 'mqar,titans'; by default 'parity,hope'.
  """
  name, _, family = (arg or 'parity').partition(',')
  task = TASKS[check('task', name, tuple(TASKS))]
  config = experiment.get_config(f'{family or "hope"},{task.preset}')
  return configs.override(
    config,
    (
      f'train.num_steps={task.num_steps}',
      f'train.evaluate_every={task.num_steps // _NUM_EVALUATIONS}',
      f'data.longer={task.longer}',
      *task.changes,
    ),
  )


def get_sweep(arg: str | None = None) -> sweeps.Sweep:
  """Returns the sweep of a task, by default parity."""
  name = check('task', arg or 'parity', tuple(TASKS))
  first, *others = TASKS[name].columns
  return sweeps.Sweep(
    rows=tuple(sweeps.Row(x, arg=f'{name},{x}') for x in FAMILIES),
    metrics=(f'{first}:{TASKS[name].best}', *others, 'train_seconds'),
    tune=f'{FIELD}={",".join(RATES)}',
  )


def check(kind: str, name: str, known: tuple[str, ...]) -> str:
  """Returns a name of a task or family.

  Args:
    kind: The word for it in the message.
    name: What somebody typed.
    known: The names that there are.

  Raises:
    errors.UserError: There is no such name.
  """
  if name not in known:
    (nearest,) = difflib.get_close_matches(name, known, 1, 0)
    raise errors.UserError(
      f'{name!r} is no {kind} of the suite, which has {", ".join(known)}; the '
      f'nearest is {nearest}.'
    )
  return name


def select(
  only: Sequence[str], *, everything: bool = False
) -> tuple[list[str], list[str]]:
  """Returns the tasks and the families of --only, in the order of the suite.

  Args:
    only: Names of tasks and families. Without tasks, or without families, the
      default ones are selected.
    everything: Whether all tasks and families are the default.

  Raises:
    errors.UserError: There is no such name.
  """
  for name in only:
    check('model or task', name, (*FAMILIES, *TASKS))
  found = []
  for known, default in ((TASKS, DEFAULT_TASKS), (FAMILIES, DEFAULT_FAMILIES)):
    default = list(known) if everything else list(default)
    found.append([name for name in known if name in only] or default)
  return found[0], found[1]


class Gate(NamedTuple):
  """A bound on a model's score on a task, which holds for every seed.

  Attributes:
    task: Name of a task of the suite.
    family: Family of the zoo.
    key: Key of a run's summary.json.
    at_least: The value must not be below it.
    below: The value must be below it, if the model has learned the task.
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
  # A comparison with attention needs attention that has learned the task. In so
  # few steps it does with a convolution, as the memories have one.
  Gate('mqar_rewritten', 'convolved_transformer', 'accuracy', at_least=_SOLVED),
  Gate('s_niah_1', 'convolved_transformer', 'all_right', at_least=_SOLVED),
  # Linear attention adds to a value and cannot replace it.
  Gate('mqar_rewritten', 'linear_attention', 'all_right', below=0.5),
  Gate('mqar_rewritten', 'deltanet', 'accuracy', at_least=_SOLVED),
  Gate('mqar_rewritten', 'gated_deltanet', 'accuracy', at_least=_SOLVED),
  Gate('mqar_rewritten', 'titans', 'accuracy', at_least=_SOLVED),
  Gate('mqar_rewritten', 'hope', 'accuracy', at_least=_SOLVED),
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


_TABLE_4 = 'Table 4, accuracy in per cent'
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
  'compression': Printed(_TABLE_4, {'transformer': '49.4', 'hope': '51.2'}),
  'fuzzy_recall': Printed(
    _TABLE_4, {'transformer': '47.9', 'titans': '50.0', 'hope': '52.1'}
  ),
  'selective_copying': Printed(
    _TABLE_4, {'transformer': '96.2', 'titans': '99.4', 'hope': '99.7'}
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
