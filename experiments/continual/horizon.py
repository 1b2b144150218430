"""Ten million tokens of text that keeps shifting: does forgetting come back?

A stream begins with a long stretch of one topic, its home, and goes on with a
new topic every few thousand tokens, for ever. A topic is a table of which words
follow which, drawn anew. What a level learned of home is measured on other text
of it, by a copy of the learner: in nats per token that are saved against one
that has read nothing. The learner reads with no level, with its fastest, and
with ever slower ones.

Command:
  python launch/run.py --config=experiments/continual/horizon.py \
    --workdir=runs/horizon

`:full` reads ten million tokens per stream.

Hardware: one CPU core, four minutes of its time; `:full` fifteen.
Result of `:full` with --set=num_streams=2, one training: nats per token that
having read home saves, after so many tokens of other topics; standard
deviations over streams up to 0.1, of the fast level 0.2.

  levels  0      4,096  16,384  65,536  262,144  1,048,576  10,485,760
  none    -0.01   0.01   0.01   -0.01    0.01     0.00       0.01
  fast     2.12   0.30  -1.00   put back
  middle   2.11   1.32   0.42   -0.14   -0.15    -0.02      put back
  slow     1.92   1.92   1.71    1.02    0.29     0.07       0.00
  all      0.44  -0.41   0.45    0.42    0.34     0.04      -0.42

So forgetting does come back: after four of its own steps on other text a level
keeps about half of what it saved (the slow one: 65,536 tokens), and from a
million on nothing is left of home. Slower levels keep it longer and cost little
at the start. A level that has gone too far from its start is put back there
(`max_drift`), and knows from then on what no level knows. All levels together
know less of home than the slow one alone, presumably because faster ones,
started anew at each of its steps, leave it little to explain meanwhile.
"""

import dataclasses
import pathlib

import numpy as np

from experiments import report_files
from experiments.continual import reading
from nested_learning import errors
from nested_learning import levels

_LEVELS = ('fast', 'middle', 'slow')
_ARMS = {
  'no level': (),
  'fast level': (0,),
  'middle level': (1,),
  'slow level': (2,),
  'all levels': (0, 1, 2),
}


@dataclasses.dataclass(frozen=True)
class HorizonConfig:
  """Topics, the stream and the learner."""

  num_words: int = 32
  num_successors: int = 3  # likely ones of a word, in a topic
  noise: float = 0.1  # how often any other word follows
  topic_tokens: int = 4096  # of a topic that is no home
  home_tokens: int = 65_536
  distances: tuple[int, ...] = (
    0,
    4096,
    16_384,
    65_536,
    262_144,
  )  # tokens since home
  probes: int = 32  # texts of home that a copy is asked, of a segment each
  num_streams: int = 4
  learner: reading.LearnerConfig = reading.LearnerConfig(
    mlp_dim=128, connection='nested', batch_size=4, learning_rate=6e-3
  )
  inner: levels.InnerConfig = levels.InnerConfig((64, 1024, 16_384), (1.0,))
  # Rows of training are short. There, slower levels step more often, so that
  # home has as many of their steps as in a stream.
  train_clocks: tuple[int, ...] = (64, 128, 256)
  train_tokens: tuple[int, int, int] = (1024, 768, 256)  # home, other, home


def get_config(arg: str | None = None) -> HorizonConfig:
  """The experiment; 'full' reads 10^7 tokens, 'small' is for tests."""
  config = HorizonConfig()
  if arg is None:
    return config
  if arg == 'full':
    longer = (2**20, 2**21, 2**22, 2**23, 10_485_760)
    return dataclasses.replace(config, distances=(*config.distances, *longer))
  if arg == 'small':
    return dataclasses.replace(
      config,
      topic_tokens=32,
      home_tokens=64,
      distances=(0, 64),
      probes=2,
      num_streams=2,
      learner=reading.LearnerConfig(
        embed_dim=16, mlp_dim=16, num_steps=2, batch_size=2
      ),
      inner=levels.InnerConfig((16, 32, 64), (1.0,)),
      train_clocks=(16, 32, 32),
      train_tokens=(32, 16, 16),
    )
  raise errors.UserError(f"{arg!r} must be 'full' or 'small', or nothing.")


def make_topic(config: HorizonConfig, rng: np.random.Generator) -> np.ndarray:
  """Cumulated probabilities of the word after each, [word, word]."""
  num = config.num_words
  likely = rng.random((num, num)).argsort(axis=1)[:, : config.num_successors]
  weights = rng.dirichlet(np.ones(config.num_successors), size=num)
  table = np.full((num, num), config.noise / num)
  np.add.at(
    table, (np.arange(num)[:, None], likely), (1 - config.noise) * weights
  )
  return np.cumsum(table, axis=1)


def write_text(
  topics: np.ndarray, num_tokens: int, rng: np.random.Generator
) -> np.ndarray:
  """Text [text, t] of topics [text, word, word]."""
  count, num_words = topics.shape[:2]
  words = np.empty((count, num_tokens), np.int64)
  words[:, 0] = rng.integers(num_words, size=count)
  draws = rng.random((count, num_tokens))
  rows = np.arange(count)
  for t in range(1, num_tokens):
    after = topics[rows, words[:, t - 1]]
    words[:, t] = np.sum(after < draws[:, t, None], axis=1)
  return np.minimum(words, num_words - 1)


def make_row(
  config: HorizonConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Text of a topic, of another and of the first again; and weights, [t]."""
  home, other = make_topic(config, rng), make_topic(config, rng)
  parts = [
    write_text(topic[None], count, rng)[0]
    for topic, count in zip(
      (home, other, home), config.train_tokens, strict=True
    )
  ]
  tokens = np.concatenate(parts)
  weights = np.ones(len(tokens))
  # Coming home counts as much as everything before it.
  back = config.train_tokens[-1]
  weights[-back:] = (len(tokens) - back) / back
  return tokens, weights


def run(config: HorizonConfig, workdir: str, mode: str) -> None:
  """Trains a learner, reads the streams with each set of levels, writes."""
  report_files.check_mode(mode)
  model = reading.make_model(config.learner, config.num_words, _LEVELS)

  trained = dataclasses.replace(config.inner, update_every=config.train_clocks)
  params, losses = reading.train(
    model, trained, lambda rng: make_row(config, rng), config.learner
  )
  metrics = [{'step': i, 'loss': float(loss)} for i, loss in enumerate(losses)]
  found = {}
  for name, which in _ARMS.items():
    inner = reading.only(config.inner, which)
    found[name] = _read(config, model, inner, params, name)
  _write(config, workdir, found, metrics)


def _read(config, model, inner, params, name):
  """Loss on home before it, and at every distance, [stream, 1 + distance]."""
  size = levels.segment_size(levels.make_levels(config.inner, _LEVELS))
  learner = reading.make_reading(model, inner, segment_size=size)
  num, rng = config.num_streams, np.random.default_rng(1)
  draw = lambda count: np.stack([make_topic(config, rng) for _ in range(count)])
  home = draw(num)
  probes = [write_text(home, size, rng) for _ in range(config.probes)]
  probes = np.stack(probes)
  state = learner.start(params, num)

  def ask():
    losses = learner.ask(params, state, probes).losses
    return np.nanmean(losses, axis=(0, 2))

  scores = [ask()]
  _, state = learner.read(
    params, state, write_text(home, config.home_tokens, rng)
  )
  done = 0
  for distance in config.distances:
    while done < distance:
      # Many topics are written at once, and read one after the other.
      count = min((distance - done) // config.topic_tokens, 64)
      text = write_text(draw(num * count), config.topic_tokens, rng)
      _, state = learner.read(params, state, text.reshape(num, -1))
      done += count * config.topic_tokens
    scores.append(ask())
    print(
      f'{name}: {np.mean(scores[-1]):.3f} nats after {distance:,} tokens',
      flush=True,
    )
    reading.print_warnings(state, name)
  return np.stack(scores, axis=1)


def _write(config, workdir, found, metrics):
  start = found['no level'][:, :1]
  best = min(np.mean(losses[:, 1]) for losses in found.values())
  summary, rows = {'loss_before': float(np.mean(start))}, []
  summary['loss_best_after_home'] = float(best)
  gains = {name: start - losses[:, 1:] for name, losses in found.items()}
  for name, gain in gains.items():
    row = [name]
    for i, distance in enumerate(config.distances):
      row.append(reading.mean_and_spread(gain[:, i]))
      key = f'{report_files.key(name)}_gain_after_{distance}'
      summary[key] = float(np.mean(gain[:, i]))
    rows.append(row)
  last = {name: float(np.mean(gain[:, -1])) for name, gain in gains.items()}
  summary['keeps_most'] = max(last, key=last.get)
  reading.plot_lines(
    pathlib.Path(workdir) / 'horizon.png',
    config.distances,
    gains,
    xlabel='tokens since home',
    ylabel='nats per token saved on home',
    floor=0.0,
  )
  report_files.write(
    workdir,
    config,
    module=__name__,
    summary=summary,
    metrics=metrics,
    sections=[
      '# How long a topic is kept',
      'Nats per token that having read home saves on other text of it, mean '
      f'and spread over {config.num_streams} streams, by tokens of other '
      'topics since. Levels step every '
      f'{config.inner.update_every} tokens; before home, the loss is '
      f'{np.mean(start):.3f}.',
      report_files.table(
        ('levels that learn', *(f'{d:,}' for d in config.distances)), rows
      ),
      '![What is kept of home](horizon.png)',
    ],
  )
