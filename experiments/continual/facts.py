"""Facts told once, then much other text: which levels still know them?

A stream tells some facts, several times each. It goes on with documents that
have facts of their own, about other names made of the same parts; each of these
holds only within its document and is asked for there, so that a memory has to
make room. From time to time a copy of the learner is asked for the first facts.
Three learners of one size are trained alike on short streams: with memories
only, with a fast level, and with a fast and a slow level. The last one is also
read with one of its levels at rest.

Command:
  python launch/run.py --config=experiments/continual/facts.py \
    --workdir=runs/facts

Hardware: one CPU core, five minutes.
Result: after 16,384 tokens the learner with both levels recalls 94 % of the
facts and with the fast one 9 %, where a guess gives 6 %; after 131,072 tokens
31 %; see experiments/results/continual/README.md.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from experiments import report_files
from experiments.continual import reading
from nested_learning import errors
from nested_learning import levels
from nested_learning import models

_TELL, _ASK = 0, 1
_SENTENCE = 4  # tokens: mark, two parts of a name, value
_LEVELS = ('fast', 'slow')
_MOST_TOKENS = 2**16  # generated at a time


@dataclasses.dataclass(frozen=True)
class StreamConfig:
  """The facts of a stream, and the documents after them."""

  num_parts: int = 8  # choices for the first half of a name, and the second
  num_values: int = 16
  num_facts: int = 16  # of a stream; its documents do not use their names
  plant_tokens: int = 4096  # tokens that tell the facts, in rounds
  document_facts: int = 4  # told and asked in a document
  document_tokens: int = 64

  @property
  def vocab_size(self) -> int:
    """Number of tokens."""
    return 2 + 2 * self.num_parts + self.num_values

  @property
  def first_value(self) -> int:
    """The first token that is a value."""
    return 2 + 2 * self.num_parts


@dataclasses.dataclass(frozen=True)
class FactsConfig:
  """Learners, their training and their streams."""

  stream: StreamConfig = StreamConfig()
  learner: reading.LearnerConfig = reading.LearnerConfig(
    mlp_dim=128,
    connection='nested',
    batch_size=4,
    learning_rate=6e-3,
  )
  inner: levels.InnerConfig = levels.make_inner((16, 256))
  train_plant: int = 512  # tokens that tell facts, in a row of training
  train_gap: int = 1536  # tokens of documents, in a row of training
  gaps: tuple[int, ...] = (0, 64, 256, 1024, 4096, 16_384, 65_536, 131_072)
  num_streams: int = 16


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
      stream=StreamConfig(num_parts=4, num_facts=4, plant_tokens=32),
      learner=reading.LearnerConfig(
        embed_dim=16,
        mlp_dim=16,
        connection='nested',
        num_steps=2,
        batch_size=2,
      ),
      inner=levels.make_inner((16, 32)),
      train_plant=32,
      train_gap=64,
      gaps=(0, 64),
      num_streams=2,
    )
  raise errors.UserError(f"{arg!r} must be 'full' or 'small', or nothing.")


class Stream:
  """One stream: its facts and its documents, drawn from `rng`."""

  def __init__(self, config: StreamConfig, rng: np.random.Generator):
    names = rng.permutation(config.num_parts**2)
    self._config, self._rng = config, rng
    self._facts = names[: config.num_facts]
    self._others = names[config.num_facts :]
    self._values = rng.integers(config.num_values, size=config.num_facts)

  def plant(self) -> np.ndarray:
    """Returns sentences that tell the facts in random rounds, int [t]."""
    count = self._config.plant_tokens // _SENTENCE
    rounds = -(-count // len(self._facts))
    order = [self._rng.permutation(len(self._facts)) for _ in range(rounds)]
    picked = np.concatenate(order)[:count]
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
    return self._say(_ASK, self._facts[order], self._values[order])

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
  plant: int,
  gap: int,
  multiple_of: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
  """Makes a short stream to train on.

  Args:
    config: Facts and documents.
    rng: Random numbers.
    plant: Number of tokens that tell the facts.
    gap: Minimum number of tokens between telling and asking.
    multiple_of: The number of tokens of the row is a multiple of this.

  Returns:
    Tokens int [t], and weights [t] of their losses.
  """
  stream = Stream(dataclasses.replace(config, plant_tokens=plant), rng)
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
  learner = reading.make_reading(model, inner, segment_size=segment_size)
  streams = [
    Stream(config.stream, np.random.default_rng((1, i)))
    for i in range(config.num_streams)
  ]
  allowed = np.arange(model.config.vocab_size) >= config.stream.first_value
  questions = [stream.questions().reshape(-1, _SENTENCE) for stream in streams]
  questions = np.stack(questions, axis=1)
  state = learner.start(params, config.num_streams)
  plant = np.stack([stream.plant() for stream in streams])
  _, state = learner.read(params, state, plant)
  scores, done = [], 0
  for gap in config.gaps:
    while done < gap:
      count = min(gap - done, _MOST_TOKENS)
      tokens = np.stack([stream.documents(count) for stream in streams])
      _, state = learner.read(params, state, tokens)
      done += count
    said = learner.ask(params, state, questions, allowed=allowed)
    right = said.answers[..., -1] == questions[..., -1]
    scores.append(np.mean(right, axis=0))
    print(f'{name}: {np.mean(scores[-1]):.3f} after {gap:,} tokens', flush=True)
    reading.print_warnings(state, name)
  return np.stack(scores, axis=1)


def run(config: FactsConfig, workdir: str, mode: str) -> None:
  """Trains each learner, reads the streams, writes the report."""
  report_files.check_mode(mode)
  model = models.make_model(
    reading.make_config(config.learner, config.stream.vocab_size, _LEVELS)
  )
  inner = config.inner
  size = levels.segment_size(levels.make_levels(inner, _LEVELS))

  def ask(arm, params, name):
    return recall(config, model, arm, params, segment_size=size, name=name)

  arms = {
    'memories only': reading.only(inner, ()),
    'fast level': reading.only(inner, (0,)),
    'fast and slow level': inner,
  }
  curves, metrics = {}, []
  for name, arm in arms.items():
    params, losses = reading.train(
      model,
      arm,
      lambda rng: make_row(
        config.stream,
        rng,
        plant=config.train_plant,
        gap=config.train_gap,
        multiple_of=size,
      ),
      config.learner,
      name=name,
    )
    metrics += [
      {'learner': name, 'step': i, 'loss': float(loss)}
      for i, loss in enumerate(losses)
    ]
    curves[name] = ask(arm, params, name)
  for name, which in {'slow': (0,), 'fast': (1,), 'both': ()}.items():
    name = f'fast and slow level, {name} at rest'
    arm = reading.only(inner, which)
    curves[name] = ask(arm, params, name)
  _write(config, workdir, curves, metrics)


def _write(config, workdir, curves, metrics):
  chance = 1 / config.stream.num_values
  summary = {'chance': chance}
  for name, scores in curves.items():
    for gap, score in zip(config.gaps, scores.T, strict=True):
      summary[f'{report_files.key(name)}_after_{gap}'] = float(np.mean(score))
  names = list(curves)
  last = {name: curves[name][:, -1] for name in names}
  summary['slow_gain_at_the_end'] = float(
    np.mean(last['fast and slow level'] - last[names[3]])
  )
  reading.plot_lines(
    pathlib.Path(workdir) / 'recall.png',
    config.gaps,
    curves,
    xlabel='tokens since the facts were told',
    ylabel='facts recalled',
    floor=chance,
  )
  rows = [
    (f'{gap:,}', *(reading.mean_and_spread(curves[n][:, i]) for n in names))
    for i, gap in enumerate(config.gaps)
  ]
  report_files.write(
    workdir,
    config,
    module=__name__,
    summary=summary,
    metrics=metrics,
    sections=[
      '# Facts told once',
      f'Share of {config.stream.num_facts} facts that are recalled, mean and '
      f'spread over {config.num_streams} streams; a guess gives {chance:.3f}. '
      f'Levels step every {config.inner.update_every} tokens.',
      report_files.table(('tokens since', *names), rows),
      '![Recall by distance](recall.png)',
    ],
  )
