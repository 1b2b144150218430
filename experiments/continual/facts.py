"""Facts, then much other text: which levels still know them?

A stream tells some facts, 64 times each. It goes on with documents that have
facts of their own, about other names made of the same parts; each of these
holds only within its document and is asked for there, so that a memory has to
make room. From time to time a copy of the learner is asked for the first facts.
Learners of one size are trained alike on short streams, with several seeds:
with memories only, with a fast level, with a slow one, and with both. The last
one is also read with one of its levels at rest, and its whole chain is asked
without a mixture before and after the fast level restarts.

Command:
  python launch/run.py --config=experiments/continual/facts.py \
    --workdir=runs/facts

`:full` reads a million tokens. The same command goes on where it was stopped,
and --set=results=experiments/results/facts also takes finished cells from that
folder and writes page and cells there.

Hardware: one CPU core.
Results: experiments/results/facts/README.md.
"""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np

from experiments import cells as cells_lib
from experiments import report_files
from experiments.continual import reading
from nested_learning import errors
from nested_learning import levels
from nested_learning import models

_TELL, _ASK = 0, 1
_SENTENCE = 4  # tokens: mark, two parts of a name, value
LEVELS = ('fast', 'slow')
_BOTH = 'fast and slow level'
# Levels that learn in training, by learner.
LEARNERS = {
  'memories only': (),
  'fast level': (0,),
  'slow level': (1,),
  _BOTH: (0, 1),
}
_MOST_TOKENS = 2**16  # generated at a time


@dataclasses.dataclass(frozen=True)
class StreamConfig:
  """The facts of a stream, and the documents after them."""

  num_parts: int = 8  # choices for the first half of a name, and the second
  num_values: int = 16
  num_facts: int = 16  # of a stream; its documents do not use their names
  tellings: int = 64  # times that each of them is told
  document_facts: int = 4  # told and asked in a document
  document_tokens: int = 64

  @property
  def vocab_size(self) -> int:
    """Number of tokens."""
    return 2 + 2 * self.num_parts + self.num_values

  @property
  def plant_tokens(self) -> int:
    """Tokens that tell the facts, in rounds."""
    return self.tellings * self.num_facts * _SENTENCE

  @property
  def first_value(self) -> int:
    """The first token that is a value."""
    return 2 + 2 * self.num_parts


@dataclasses.dataclass(frozen=True)
class FactsConfig:
  """Learners, their training and their streams."""

  stream: StreamConfig = StreamConfig()
  learner: reading.LearnerConfig = reading.LearnerConfig(
    'hope',
    mlp_dim=128,
    connection='nested',
    batch_size=4,
    learning_rate=6e-3,
  )
  inner: levels.InnerConfig = levels.make_inner((16, 256))
  train_tellings: int = 8  # times that each fact is told in a row of training
  train_gap: int = 1536  # tokens of documents, in a row of training
  gaps: tuple[int, ...] = (0, 64, 256, 1024, 4096, 16_384, 65_536, 131_072)
  num_streams: int = 16
  num_seeds: int = 3  # of training
  # Folder of earlier cells, to which page and cells are written as well.
  results: str | None = None


@dataclasses.dataclass(frozen=True)
class AskConfig:
  """Streams, and the distances at which facts are asked for."""

  stream: StreamConfig
  gaps: tuple[int, ...]
  num_streams: int


def get_config(arg: str | None = None) -> FactsConfig:
  """Returns the config; 'full' reads a million tokens, 'small' is for tests."""
  if arg is None:
    return FactsConfig()
  if arg == 'full':
    gaps = (*FactsConfig().gaps, 2**18, 2**19, 2**20)
    return FactsConfig(gaps=gaps)
  if arg == 'small':
    return FactsConfig(
      stream=StreamConfig(num_parts=4, num_facts=4, tellings=2),
      learner=reading.LearnerConfig(
        embed_dim=16,
        mlp_dim=16,
        connection='nested',
        num_steps=2,
        batch_size=2,
      ),
      inner=levels.make_inner((16, 32)),
      train_tellings=2,
      train_gap=64,
      gaps=(0, 64),
      num_streams=2,
      num_seeds=1,
    )
  raise errors.UserError(f"{arg!r} must be 'full' or 'small', or nothing.")


class Stream:
  """One stream: its facts and its documents, drawn from `rng`."""

  def __init__(self, config: StreamConfig, rng: np.random.Generator):
    names = rng.permutation(config.num_parts**2)
    self._config, self._rng = config, rng
    self._facts, self._others = np.split(names, [config.num_facts])
    self._values = rng.integers(config.num_values, size=config.num_facts)

  def plant(self) -> np.ndarray:
    """Returns sentences that tell the facts in random rounds, int [t]."""
    rounds = range(self._config.tellings)
    order = [self._rng.permutation(len(self._facts)) for _ in rounds]
    picked = np.concatenate(order)
    return self._say(_TELL, self._facts[picked], self._values[picked])

  def documents(self, num_tokens: int) -> np.ndarray:
    """Returns documents, each with facts told and asked in it, int [t]."""
    config = self._config
    count = -(-num_tokens // config.document_tokens)
    shape = count, config.document_facts
    names = self._others[
      self._rng.random((count, len(self._others))).argsort(1)[:, : shape[1]]
    ]
    values = self._rng.integers(config.num_values, size=shape)
    num_asked = config.document_tokens // _SENTENCE - shape[1]
    asked = self._rng.integers(shape[1], size=(count, num_asked))
    take = lambda x: np.take_along_axis(x, asked, axis=1)
    parts = [
      self._say(mark, name.ravel(), value.ravel()).reshape(count, -1)
      for mark, name, value in (
        (_TELL, names, values),
        (_ASK, take(names), take(values)),
      )
    ]
    return np.concatenate(parts, axis=1).ravel()[:num_tokens]

  def questions(self) -> np.ndarray:
    """Returns a question with its answer for every fact, int [t]."""
    order = self._rng.permutation(len(self._facts))
    return self.ask(self._facts[order], self._values[order])

  def ask(self, names: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns a question for each name, with a value as its answer, int [t]."""
    return self._say(_ASK, names, values)

  def _say(self, mark, names, values):
    first, second = np.divmod(names, self._config.num_parts)
    second = second + self._config.num_parts
    values = values + self._config.first_value
    marks = np.full(len(names), mark)
    return np.stack([marks, 2 + first, 2 + second, values], axis=1).ravel()


def make_row(
  config: StreamConfig,
  rng: np.random.Generator,
  *,
  tellings: int,
  gap: int,
  multiple_of: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
  """Makes a short stream to train on.

  Args:
    config: Facts and documents.
    rng: Random numbers.
    tellings: Number of times that each fact is told.
    gap: Minimum number of tokens between telling and asking.
    multiple_of: The number of tokens of the row is a multiple of this.

  Returns:
    Tokens int [t], and weights [t] of their losses.
  """
  stream = Stream(dataclasses.replace(config, tellings=tellings), rng)
  told, asked = stream.plant(), stream.questions()
  gap += -(len(told) + gap + len(asked)) % multiple_of
  parts = told, stream.documents(gap), asked
  tokens = np.concatenate(parts)
  answers = np.arange(len(tokens)) % _SENTENCE == _SENTENCE - 1
  is_asked = answers & (np.roll(tokens, _SENTENCE - 1) == _ASK)
  # A level learns from every token. Other tokens get a small weight, so that
  # the level knows their distribution and need not learn it in the stream.
  weights = 0.05 + is_asked
  # The questions at the end count as much as everything before them.
  end = len(tokens) - len(parts[-1])
  weights[end:] *= weights[:end].sum() / weights[end:].sum()
  return tokens, weights


def recall(
  config: FactsConfig | AskConfig,
  model: models.Model,
  inner: levels.InnerConfig,
  params: Any,
  *,
  segment_size: int,
  name: str,
) -> np.ndarray:
  """Measures how many facts a learner recalls after every gap.

  Args:
    config: The streams and the gaps.
    model: The learner.
    inner: How its levels learn.
    params: Its parameters.
    segment_size: As for `reading.make_reading`.
    name: Name of the learner, printed with the scores.

  Returns:
    The share of facts with a right answer, [stream, gap].
  """
  asked = AskedStreams(config, model, inner, params, segment_size=segment_size)
  return np.stack([asked.score(gap, name) for gap in config.gaps], axis=1)


def recall_around_restarts(
  config: FactsConfig,
  model: models.Model,
  params: Any,
  *,
  segment_size: int,
  name: str,
) -> dict[str, np.ndarray]:
  """Measures what both levels recall, and their chain alone around restarts.

  The predictions of the chain alone are not mixed with those of the slow level:
  what the fast level has covered comes back when it restarts.

  Args:
    config: The streams and the gaps.
    model: The learner with both levels.
    params: Its parameters.
    segment_size: As for `reading.make_reading`.
    name: As for `recall`.

  Returns:
    'recall', as from `recall`; and 'restarts', what the chain alone recalls a
    segment before a restart of the fast level and after it, [stream, gap, 2],
    at those gaps that end in one.
  """
  asked = AskedStreams(
    config, model, config.inner, params, segment_size=segment_size
  )
  chain = reading.make_unmixed(model, config.inner, segment_size=segment_size)
  alone = lambda: asked.recall(reading.unmixed(asked.state), chain)
  scores, around = [], []
  for gap in config.gaps:
    restarts = gap in _restarts(config)
    if restarts:
      asked.read_until(gap - segment_size)
      before = alone()
    scores.append(asked.score(gap, name))
    if restarts:
      around.append(np.stack([before, alone()], axis=-1))
  around = np.array(around).reshape(-1, config.num_streams, 2).swapaxes(0, 1)
  return {'recall': np.stack(scores, axis=1), 'restarts': around}


def _restarts(config):
  """Returns the gaps after which the fast level restarts."""
  told, every = config.stream.plant_tokens, config.inner.update_every[-1]
  return [gap for gap in config.gaps if gap and not (told + gap) % every]


class AskedStreams:
  """Streams that are read, and asked for their facts on the way.

  Attributes:
    state: State of the learner after what it has read.
  """

  def __init__(
    self,
    config: FactsConfig | AskConfig,
    model: models.Model,
    inner: levels.InnerConfig,
    params: Any,
    *,
    segment_size: int,
    make_stream: Callable[[StreamConfig, np.random.Generator], Any] = Stream,
  ):
    """Reads what the streams tell.

    Args:
      config: The streams.
      model: The learner.
      inner: How its levels learn.
      params: Its parameters.
      segment_size: As for `reading.make_reading`.
      make_stream: Makes each stream: a `Stream` or the like.
    """
    self._learner = reading.make_reading(
      model, inner, segment_size=segment_size
    )
    self._params, vocab_size = params, model.config.vocab_size
    self._document_tokens = config.stream.document_tokens
    self._streams = [
      make_stream(config.stream, np.random.default_rng((1, i)))
      for i in range(config.num_streams)
    ]
    self._allowed = np.arange(vocab_size) >= config.stream.first_value
    questions = [s.questions().reshape(-1, _SENTENCE) for s in self._streams]
    self._questions = np.stack(questions, axis=1)
    self.state = self._learner.start(params, config.num_streams)
    self._done, self._ahead = 0, np.stack([s.plant() for s in self._streams])
    self._read(self._ahead.shape[1])

  def read_until(self, gap: int) -> None:
    """Reads documents until so many tokens lie behind the facts."""
    while self._done < gap:
      count = min(gap - self._done, _MOST_TOKENS)
      if not self._ahead.shape[1]:  # a segment may be shorter than a document
        size = -(-count // self._document_tokens) * self._document_tokens
        self._ahead = np.stack([s.documents(size) for s in self._streams])
      count = min(count, self._ahead.shape[1])
      self._read(count)
      self._done += count

  def score(self, gap: int, name: str) -> np.ndarray:
    """Reads on, and returns the share of right answers, [stream]."""
    self.read_until(gap)
    found = self.recall(self.state)
    print(f'{name}: {np.mean(found):.3f} after {gap:,} tokens', flush=True)
    reading.print_warnings(self.state, name)
    return found

  def recall(
    self, state: Any, learner: reading.StreamReader | None = None
  ) -> np.ndarray:
    """Returns the share of right answers of a state, [stream]."""
    said = self.ask(state, learner)
    right = said.answers[..., -1] == self._questions[..., -1]
    return np.mean(right, axis=0)

  def ask(
    self, state: Any, learner: reading.StreamReader | None = None
  ) -> reading.Predictions:
    """Returns what a state answers, [question, stream, 4]."""
    return (learner or self._learner).ask(
      self._params, state, self._questions, allowed=self._allowed
    )

  def _read(self, count):
    tokens, self._ahead = self._ahead[:, :count], self._ahead[:, count:]
    _, self.state = self._learner.read(self._params, self.state, tokens)


def run(config: FactsConfig, workdir: str, mode: str) -> None:
  """Trains each learner, reads the streams, writes the report."""
  report_files.check_mode(mode)
  store = cells_lib.open_store(pathlib.Path(workdir), config.results)
  found = {}
  for seed in range(config.num_seeds):
    for name, scores in _measure_seed(config, store, seed).items():
      found.setdefault(name, []).append(np.mean(scores, axis=0))
  _write(config, store, {name: np.stack(x) for name, x in found.items()})


def make_learner(config: FactsConfig) -> tuple[models.Model, int]:
  """Returns the model of all learners, and the tokens of a segment."""
  size = levels.segment_size(levels.make_levels(config.inner, LEVELS))
  made = reading.make_config(config.learner, config.stream.vocab_size, LEVELS)
  return models.make_model(made), size


def train_learner(
  config: FactsConfig, store: cells_lib.Store, seed: int, name: str
) -> Any:
  """Trains a learner on short streams, unless the run has its file.

  Args:
    config: The experiment.
    store: Folders of the run.
    seed: Seed of parameters and rows.
    name: A key of `LEARNERS`.

  Returns:
    Its parameters.
  """
  model, size = make_learner(config)
  params, _ = reading.train(
    model,
    reading.only(config.inner, LEARNERS[name]),
    lambda rng: make_row(
      config.stream,
      rng,
      tellings=config.train_tellings,
      gap=config.train_gap,
      multiple_of=size,
    ),
    config.learner,
    seed=seed,
    name=f'{name}, seed {seed}',
    file=store.workdir / 'parts' / f'{report_files.key(name)}_{seed}.npz',
  )
  return params


def _measure_seed(config, store, seed):
  """Returns the share of recalled facts by learner, [stream, gap, ...]."""
  model, size = make_learner(config)
  settings = dataclasses.asdict(config)
  settings['model'] = dataclasses.asdict(model.config)
  del settings['num_seeds'], settings['results']

  train = functools.cache(functools.partial(train_learner, config, store, seed))

  def measure(name, make_values):
    cell = cells_lib.measure(
      store,
      'facts',
      f'{report_files.key(name)}, seed {seed}',
      settings,
      make_values,
    )
    as_array = lambda x: np.asarray(x, np.float64)
    return {key: as_array(x) for key, x in cell.values.items()}

  def ask(name, learner, which):
    recall_all = lambda: recall(
      config,
      model,
      reading.only(config.inner, which),
      train(learner),
      segment_size=size,
      name=name,
    )
    return measure(name, lambda: {'recall': recall_all()})['recall']

  both = measure(
    _BOTH,
    lambda: recall_around_restarts(
      config, model, train(_BOTH), segment_size=size, name=_BOTH
    ),
  )
  found = {
    name: both['recall'] if name == _BOTH else ask(name, name, which)
    for name, which in LEARNERS.items()
  }
  for resting, which in {'slow': (0,), 'fast': (1,)}.items():
    name = f'{_BOTH}, {resting} at rest'
    found[name] = ask(name, _BOTH, which)
  return {**found, 'restarts': both['restarts']}


def _write(config, store, found):
  chance = 1 / config.stream.num_values
  restarts = found.pop('restarts')  # [seed, gap, 2]
  summary = {'chance': chance}
  for name, scores in found.items():
    for gap, score in zip(config.gaps, scores.T, strict=True):
      key = f'{report_files.key(name)}_after_{gap}'
      summary |= report_files.summarize(key, score)
  names = list(found)
  both = found[_BOTH][:, -1]
  alone = np.maximum(found['fast level'], found['slow level'])[:, -1]
  summary['gain_on_the_best_level_at_the_end'] = float(np.mean(both - alone))
  reading.plot_lines(
    store.workdir / 'recall.png',
    config.gaps,
    found,
    xlabel='tokens since the facts were told',
    ylabel='facts recalled',
    floor=chance,
  )
  rows = [
    (f'{gap:,}', *(report_files.mean_and_spread(found[n][:, i]) for n in names))
    for i, gap in enumerate(config.gaps)
  ]
  gaps = _restarts(config)
  around = [
    (f'{gap:,}', *map(report_files.mean_and_spread, restarts[:, i].T))
    for i, gap in enumerate(gaps)
  ]
  for i, gap in enumerate(gaps):
    for side, score in zip(('before', 'after'), restarts[:, i].T, strict=True):
      key = f'whole_chain_{side}_the_restart_after_{gap}'
      summary |= report_files.summarize(key, score)
  cells_lib.write_page(
    store,
    'facts',
    config,
    module=__name__,
    summary=summary,
    sections=[
      f'# Facts told {config.stream.tellings} times',
      f'Share of {config.stream.num_facts} facts that are recalled over '
      f'{config.num_streams} streams, mean and spread over {config.num_seeds} '
      f'trainings; a guess gives {chance:.3f}. Levels step every '
      f'{config.inner.update_every} tokens.',
      report_files.table(('tokens since', *names), rows),
      '![Recall by distance](recall.png)',
      'What the whole chain of both levels recalls, unmixed, a segment before '
      'its fast level restarts and after that:',
      report_files.table(('tokens since', 'before', 'after'), around),
    ],
    plots=['recall.png'],
  )
