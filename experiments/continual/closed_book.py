"""Asked for what was told, changed, or never said: does a learner make it up?

A stream of `facts.py` tells some facts. It then tells them again, half of them
with another value, and goes on with documents. From time to time a copy of the
learner is asked for all of them, and for names that the stream never says. It
may abstain: an answer counts as given if its probability reaches a threshold.
Every learner has one threshold, at which most of its reactions to half of the
streams are good: a right answer, or none for a name that was never said. The
numbers are those of the other half.

Learners, their training and their levels are those of `facts.py`.

Command:
  python launch/run.py --config=experiments/continual/closed_book.py \
    --workdir=runs/closed_book

The same command goes on where it was stopped, and
--set=results=experiments/results/closed_book also takes finished cells from
that folder and writes page and cells there.

Hardware: one CPU core.
Results: experiments/results/closed_book/README.md.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib

import numpy as np

from experiments import cells as cells_lib
from experiments import report_files
from experiments.continual import facts
from experiments.continual import reading
from nested_learning import errors

_TASK = 'closed_book'
KINDS = ('told', 'changed', 'never said')
# What an answer can be; 'outdated' is the value of a fact before its change.
REACTIONS = ('right', 'outdated', 'made up', 'none')


@dataclasses.dataclass(frozen=True)
class ClosedBookConfig(facts.FactsConfig):
  """Learners and streams of `facts.py`, and what they are asked for."""

  gaps: tuple[int, ...] = (64, 1024, 4096, 16_384, 65_536)
  num_changed: int = 8  # facts of a stream that get another value
  num_unknown: int = 16  # names that are asked for and were never said

  def __post_init__(self):
    stream = self.stream
    fits = 1 <= self.num_changed < stream.num_facts
    errors.check_field(
      self, 'num_changed', fits, f'from 1 to {stream.num_facts - 1}'
    )
    most = stream.num_parts**2 - stream.num_facts - stream.document_facts
    fits = 1 <= self.num_unknown <= most
    errors.check_field(self, 'num_unknown', fits, f'from 1 to {most}')
    fits = self.num_streams >= 2
    errors.check_field(self, 'num_streams', fits, 'at least 2')


def get_config(arg: str | None = None) -> ClosedBookConfig:
  """Returns the config; 'small' is for tests."""
  if arg is None:
    return ClosedBookConfig()
  if arg == 'small':
    small = facts.get_config('small')
    fields = {
      field.name: getattr(small, field.name)
      for field in dataclasses.fields(small)
    }
    return ClosedBookConfig(**fields, num_changed=2, num_unknown=4)
  raise errors.UserError(f"{arg!r} must be 'small', or nothing.")


class Stream(facts.Stream):
  """A stream that changes some of its facts, and never says some names.

  Attributes:
    values: What each name stands for in the end, [name]; -1 for those that are
      never said. Facts that change come first, then the others, then unknown
      names.
    outdated: What each stood for before; -1 if it did not change.
  """

  def __init__(
    self,
    config: facts.StreamConfig,
    rng: np.random.Generator,
    *,
    num_changed: int,
    num_unknown: int,
  ):
    half = dataclasses.replace(config, tellings=config.tellings // 2)
    super().__init__(half, rng)
    self._unknown, self._others = np.split(self._others, [num_unknown])
    before = self._values
    self.outdated = np.full(config.num_facts + num_unknown, -1)
    self.outdated[:num_changed] = before[:num_changed]
    self._before, self._values = before, before.copy()
    self._values[:num_changed] += rng.integers(
      1, config.num_values, size=num_changed
    )
    self._values %= config.num_values
    self.values = np.concatenate([self._values, np.full(num_unknown, -1)])

  def plant(self) -> np.ndarray:
    """Returns sentences with the facts as they were, then as they are."""
    after, self._values = self._values, self._before
    told = super().plant()
    self._values = after
    return np.concatenate([told, super().plant()])

  def questions(self) -> np.ndarray:
    """Returns a question for every name, in the order of `values`, int [t]."""
    names = np.concatenate([self._facts, self._unknown])
    return self.ask(names, np.maximum(self.values, 0))


def run(config: ClosedBookConfig, workdir: str, mode: str) -> None:
  """Trains each learner, asks it on the way, writes the page."""
  report_files.check_mode(mode)
  store = cells_lib.open_store(pathlib.Path(workdir), config.results)
  found = {
    name: [
      _measure(config, store, seed, name) for seed in range(config.num_seeds)
    ]
    for name in facts.LEARNERS
  }
  _write(config, store, found)


def _measure(config, store, seed, name):
  """Returns answers and confidences of a learner; see `_ask`."""
  model, size = facts.make_learner(config)
  settings = dataclasses.asdict(config)
  settings['model'] = dataclasses.asdict(model.config)
  del settings['num_seeds'], settings['results']
  cell = cells_lib.measure(
    store,
    _TASK,
    f'{report_files.key(name)}, seed {seed}',
    settings,
    lambda: _ask(
      config,
      model,
      facts.train_learner(config, store, seed, name),
      size,
      name,
    ),
  )
  return {key: np.asarray(x) for key, x in cell.values.items()}


def _ask(config, model, params, size, name):
  """Returns 'answers' and 'confidences' [gap, name, stream] of a learner."""
  streams = []

  def make_stream(stream_config, rng):
    streams.append(_make_stream(config, stream_config, rng))
    return streams[-1]

  inner = reading.only(config.inner, facts.LEARNERS[name])
  asked = facts.AskedStreams(
    config,
    model,
    inner,
    params,
    segment_size=size,
    make_stream=make_stream,
  )
  answers, confidences = [], []
  for gap in config.gaps:
    asked.read_until(gap)
    said = asked.ask(asked.state)
    answers.append(said.answers[..., -1] - config.stream.first_value)
    confidences.append(np.exp(said.confidences[..., -1]))
    values = np.stack([stream.values for stream in streams], axis=1)
    known = values >= 0
    right = np.mean(answers[-1][known] == values[known])
    print(f'{name}: {right:.3f} right after {gap:,} tokens', flush=True)
  return {'answers': np.stack(answers), 'confidences': np.stack(confidences)}


def _make_stream(config, stream_config, rng):
  return Stream(
    stream_config,
    rng,
    num_changed=config.num_changed,
    num_unknown=config.num_unknown,
  )


def truth(config: ClosedBookConfig) -> tuple[np.ndarray, ...]:
  """Returns values and outdated values of the streams, each [name, stream]."""
  streams = [
    _make_stream(config, config.stream, np.random.default_rng((1, i)))
    for i in range(config.num_streams)
  ]
  return tuple(
    np.stack([getattr(stream, name) for stream in streams], axis=1)
    for name in ('values', 'outdated')
  )


def react(
  answers: np.ndarray,
  confidences: np.ndarray,
  values: np.ndarray,
  outdated: np.ndarray,
  threshold: float,
) -> np.ndarray:
  """Returns what answers are, as indices of `REACTIONS`.

  Args:
    answers: Likeliest values, [..., name, stream].
    confidences: Their probabilities.
    values: Right values, [name, stream]; -1 where there is none.
    outdated: Values before a change; -1 where there was none.
    threshold: Least probability of an answer that is given.
  """
  kinds = np.select([answers == values, answers == outdated], [0, 1], 2)
  return np.where(confidences >= threshold, kinds, 3)


def choose_threshold(
  answers: np.ndarray, confidences: np.ndarray, values: np.ndarray
) -> float:
  """Returns the threshold with the most good reactions.

  Args:
    answers: As for `react`.
    confidences: Their probabilities.
    values: Right values; -1 where the good reaction is none.

  Returns:
    A probability: an answer is given from this one on. Infinite if no answer is
    worth giving.
  """
  # Of the answers that are given, the right ones help; for a name without a
  # value, none helps.
  gain = np.where(answers == values, 1, np.where(values < 0, -1, 0))
  order = np.argsort(-confidences, axis=None)
  total = np.cumsum(gain.ravel()[order])
  best = int(np.argmax(total))
  if total[best] <= 0:
    return float('inf')
  return float(confidences.ravel()[order[best]])


def separation(known: np.ndarray, unknown: np.ndarray) -> float:
  """Returns how often a known name has the higher confidence.

  Args:
    known: Confidences for names that were told.
    unknown: Confidences for names that were never said.

  Returns:
    The probability for a pair of these, ties half; 0.5 tells nothing.
  """
  known, unknown = known.ravel()[:, None], unknown.ravel()[None]
  return float(np.mean((known > unknown) + 0.5 * (known == unknown)))


def score(
  config: ClosedBookConfig, found: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Returns the numbers of one training of a learner, by name.

  Args:
    config: The experiment.
    found: 'answers' and 'confidences', [gap, name, stream].

  Returns:
    'reactions', the share of each reaction by kind of name, [gap, kind,
    reaction]; 'made_up', of the answers that are given those that are made up,
    [gap], 0 if none is given; 'separation' [gap].
  """
  values, outdated = truth(config)
  half = config.num_streams // 2
  answers, confidences = found['answers'], found['confidences']
  threshold = choose_threshold(
    answers[..., :half],
    confidences[..., :half],
    np.broadcast_to(values[:, :half], answers[..., :half].shape),
  )
  tested = slice(half, None)
  reactions = react(
    answers[..., tested],
    confidences[..., tested],
    values[:, tested],
    outdated[:, tested],
    threshold,
  )
  ends = [config.num_changed, config.stream.num_facts]
  by_kind = np.split(reactions, ends, axis=1)
  by_kind = [by_kind[1], by_kind[0], by_kind[2]]  # as KINDS
  shares = [
    [np.mean(x == i, axis=(1, 2)) for i in range(len(REACTIONS))]
    for x in by_kind
  ]
  is_made_up, is_given = reactions == 2, reactions != 3
  total = lambda x: np.sum(x, axis=(1, 2))
  return {
    'reactions': np.transpose(shares, (2, 0, 1)),
    'made_up': total(is_made_up) / np.maximum(total(is_given), 1),
    'separation': np.array(
      [
        separation(x[: ends[1], tested], x[ends[1] :, tested])
        for x in confidences
      ]
    ),
  }


def _write(
  config: ClosedBookConfig,
  store: cells_lib.Store,
  found: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
) -> None:
  scores = {}
  for name, trainings in found.items():
    all_seeds = [score(config, one) for one in trainings]
    scores[name] = {
      key: np.stack([one[key] for one in all_seeds]) for key in all_seeds[0]
    }
  summary, rows = {}, []
  for i, gap in enumerate(config.gaps):
    for name, one in scores.items():
      row = [f'{gap:,}', name]
      for k, kind in enumerate(KINDS):
        shown = one['reactions'][:, i, k]  # [seed, reaction]
        for r, reaction in enumerate(REACTIONS):
          key = report_files.key(f'{name} {kind} {reaction} after {gap}')
          summary |= report_files.summarize(key, shown[:, r])
        row.append(' / '.join(f'{x:.2f}' for x in np.mean(shown, axis=0)))
      for key in ('made_up', 'separation'):
        value = one[key][:, i]
        name_of = report_files.key(f'{name} {key} after {gap}')
        summary |= report_files.summarize(name_of, value)
        row.append(report_files.mean_and_spread(value))
      rows.append(row)
  reading.plot_lines(
    store.workdir / 'made_up.png',
    config.gaps,
    {name: one['made_up'] for name, one in scores.items()},
    xlabel='tokens since the facts were told',
    ylabel='made up, of the answers that are given',
  )
  known = config.stream.num_facts - config.num_changed
  cells_lib.write_page(
    store,
    _TASK,
    config,
    module=__name__,
    summary=summary,
    sections=[
      '# Told, changed, never said',
      f'A stream tells {known} facts {config.stream.tellings} times, and '
      f'{config.num_changed} half of these times with one value and then with '
      f'another. A learner is asked for these and for {config.num_unknown} '
      'names that were never said, and may give no answer. Columns of kinds: '
      f'{" / ".join(REACTIONS)}. A made-up answer is a value that its name '
      'never had in the stream. Separation is how often a name that was told '
      'has the higher confidence of a pair with one that was not; 0.5 tells '
      f'nothing. Means over {config.num_seeds} trainings, and over '
      f'{config.num_streams - config.num_streams // 2} streams other than '
      'those that the threshold was chosen on; levels step every '
      f'{config.inner.update_every} tokens.',
      report_files.table(
        (
          'tokens since',
          'learner',
          *KINDS,
          'made up, of given',
          'separation',
        ),
        rows,
      ),
      '![Made-up answers by distance](made_up.png)',
    ],
    plots=['made_up.png'],
  )
