"""Ten million tokens of text that keeps shifting: does forgetting come back?

A stream begins with a long stretch of one topic, its home, and goes on with a
new topic every few thousand tokens. A topic is a table of likely successors of
each word. A copy of the learner is asked for other text of home; the measure is
nats per token saved against the learner before it read anything. The learner
reads with no level, with each of its levels alone, and with all of them; its
loss on the stream itself is measured as well. The whole chain is also asked
without a mixture, before and after its faster levels restart.

Command:
  python launch/run.py --config=experiments/continual/horizon.py \
    --workdir=runs/horizon

`:full` reads ten million tokens per stream. `:untrained` asks whether levels
add up in a learner with its initial parameters, on shorter streams. The same
command goes on where it was stopped, and
--set=results=experiments/results/horizon also takes finished cells from that
folder and writes page and cells there.

Hardware: one CPU core.
Results: experiments/results/horizon/README.md.
"""

import dataclasses
import functools
import pathlib

import numpy as np

from experiments import cells as cells_lib
from experiments import report_files
from experiments.continual import reading
from nested_learning import errors
from nested_learning import levels
from nested_learning import models

TASK = 'horizon'
_RESTART = 'restart'
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
  """Topics, streams and the learner."""

  num_words: int = 32
  num_successors: int = 3  # likely successors of a word in a topic
  noise: float = 0.1  # probability of any other word
  topic_tokens: int = 4096  # length of a topic other than home
  home_tokens: int = 65_536
  distances: tuple[int, ...] = (
    0,
    4096,
    16_384,
    65_536,
    262_144,
  )  # tokens since home
  probes: int = 32  # texts of home that a copy is asked for, each a segment
  num_streams: int = 4
  learner: reading.LearnerConfig = reading.LearnerConfig(
    'hope',
    mlp_dim=128,
    connection='nested',
    batch_size=4,
    learning_rate=6e-3,
  )
  inner: levels.InnerConfig = levels.make_inner((64, 1024, 16_384))
  # Rows of training are short: slower levels step more often there, so that
  # home has as many of their steps as in a stream.
  train_clocks: tuple[int, ...] = (64, 128, 256)
  train_tokens: tuple[int, int, int] = (1024, 768, 256)  # home, other, home
  num_seeds: int = 3  # of training, and of topics and streams
  # Folder of earlier cells, to which page and cells are written as well.
  results: str | None = None


def get_config(arg: str | None = None) -> HorizonConfig:
  """Returns the config; see the command, and 'small' is for tests."""
  config = HorizonConfig()
  if arg is None:
    return config
  if arg == 'untrained':
    return dataclasses.replace(
      config,
      topic_tokens=2048,
      home_tokens=32_768,
      distances=(0, 2048, 8192, 32_768),
      num_streams=2,
      learner=dataclasses.replace(config.learner, num_steps=0),
      inner=levels.make_inner(
        (64, 512, 8192), learning_rate=2.0, clip_norm=None, max_drift=1e9
      ),
    )
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
      inner=levels.make_inner((16, 32, 64)),
      train_clocks=(16, 32, 32),
      train_tokens=(32, 16, 16),
      num_seeds=1,
    )
  raise errors.UserError(
    f"{arg!r} must be 'full', 'untrained' or 'small', or nothing."
  )


def make_topic(config: HorizonConfig, rng: np.random.Generator) -> np.ndarray:
  """Returns cumulative probabilities of the next word, [word, word]."""
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
  """Returns texts [text, t] of topics [text, word, word]."""
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
  """Returns text of a topic, another and the first again; and weights [t]."""
  home, other = make_topic(config, rng), make_topic(config, rng)
  parts = [
    write_text(topic[None], count, rng)[0]
    for topic, count in zip(
      (home, other, home), config.train_tokens, strict=True
    )
  ]
  tokens = np.concatenate(parts)
  weights = np.ones(len(tokens))
  # Home at the end counts as much as everything before it.
  back = config.train_tokens[-1]
  weights[-back:] = (len(tokens) - back) / back
  return tokens, weights


def run(config: HorizonConfig, workdir: str, mode: str) -> None:
  """Trains learners and reads streams with each set of levels."""
  report_files.check_mode(mode)
  store = cells_lib.open_store(pathlib.Path(workdir), config.results)
  found = {}
  for seed in range(config.num_seeds):
    for name, losses in _measure_seed(config, store, seed).items():
      means = {key: np.nanmean(x, axis=0) for key, x in losses.items()}
      found.setdefault(name, []).append(means)
  # Means over streams, [seed, ...].
  stacked = {
    name: {key: np.stack([one[key] for one in seeds]) for key in seeds[0]}
    for name, seeds in found.items()
  }
  around = stacked.pop(_RESTART)
  _write(config, store, stacked, around)


def _measure_seed(config, store, seed):
  """Returns losses by set of levels, and around a restart; [stream, ...]."""
  model = models.make_model(
    reading.make_config(config.learner, config.num_words, _LEVELS)
  )
  clocks = zip(config.inner.levels, config.train_clocks, strict=True)
  trained = tuple(
    dataclasses.replace(level, update_every=size) for level, size in clocks
  )
  settings = dataclasses.asdict(config)
  settings['model'] = dataclasses.asdict(model.config)
  del settings['num_seeds'], settings['results']

  @functools.cache
  def train():
    params, _ = reading.train(
      model,
      dataclasses.replace(config.inner, levels=trained),
      lambda rng: make_row(config, rng),
      config.learner,
      seed=seed,
      name=f'training, seed {seed}',
      file=store.workdir / 'parts' / f'parameters_{seed}.npz',
    )
    return params

  def measure(name, make_values):
    cell = cells_lib.measure(
      store,
      TASK,
      f'{report_files.key(name)}, seed {seed}',
      settings,
      make_values,
    )
    as_array = lambda x: np.asarray(x, np.float64)
    return {key: as_array(x) for key, x in cell.values.items()}

  def read(name, which):
    inner = reading.only(config.inner, which)
    return _read(config, model, inner, train(), seed, name)

  found = {
    name: measure(name, functools.partial(read, name, which))
    for name, which in _ARMS.items()
  }
  found[_RESTART] = measure(
    _RESTART, lambda: _around_restart(config, model, train(), seed)
  )
  return found


def _around_restart(config, model, params, seed):
  """Returns losses on home of the whole chain, unmixed, [stream] by name.

  After home, a period of the slow level is read, at whose end it steps.
  """
  size = levels.segment_size(levels.make_levels(config.inner, _LEVELS))
  learner = reading.make_reading(model, config.inner, segment_size=size)
  num, rng = config.num_streams, np.random.default_rng((1, seed))
  draw = lambda count: np.stack([make_topic(config, rng) for _ in range(count)])
  home, period = draw(num), config.inner.update_every[-1]
  probes = np.stack([write_text(home, size, rng) for _ in range(config.probes)])
  start = learner.start(params, num)

  chain = reading.make_unmixed(model, config.inner, segment_size=size)

  def ask(state):
    said = chain.ask(params, reading.unmixed(state), probes)
    return np.nanmean(said.losses, axis=(0, 2))

  state, losses = start, {'before home': ask(start)}
  others = draw(num * -(-period // config.topic_tokens))
  others = write_text(others, config.topic_tokens, rng).reshape(num, -1)
  for name, text in {
    'after home': write_text(home, config.home_tokens, rng),
    'before the restart': others[:, : period - size],
    'after the restart': others[:, period - size : period],
  }.items():
    _, state = learner.read(params, state, text)
    losses[name] = ask(state)
  return losses


def _read(config, model, inner, params, seed, name):
  """Returns losses on home and on the stream, 'asked' and 'read'.

  Both are [stream, 1 + d]: home before it was read and by distance; the tokens
  of home, and those since the distance before.
  """
  size = levels.segment_size(levels.make_levels(config.inner, _LEVELS))
  learner = reading.make_reading(model, inner, segment_size=size)
  num, rng = config.num_streams, np.random.default_rng((1, seed))
  draw = lambda count: np.stack([make_topic(config, rng) for _ in range(count)])
  home = draw(num)
  probes = [write_text(home, size, rng) for _ in range(config.probes)]
  probes = np.stack(probes)
  state = learner.start(params, num)

  def ask():
    losses = learner.ask(params, state, probes).losses
    return np.nanmean(losses, axis=(0, 2))

  scores = [ask()]
  said, state = learner.read(
    params, state, write_text(home, config.home_tokens, rng)
  )
  done, stream = 0, [np.nanmean(said.losses, axis=1)]
  for distance in config.distances:
    parts = [np.full((num, 1), np.nan)]
    while done < distance:
      # Many topics are generated at once and read one after the other.
      count = min((distance - done) // config.topic_tokens, 64)
      text = write_text(draw(num * count), config.topic_tokens, rng)
      said, state = learner.read(params, state, text.reshape(num, -1))
      parts.append(said.losses[:, 1:])
      done += count * config.topic_tokens
    scores.append(ask())
    if done:
      stream.append(np.nanmean(np.concatenate(parts, axis=1), axis=1))
    print(
      f'{name}: {np.mean(scores[-1]):.3f} nats after {distance:,} tokens',
      flush=True,
    )
    reading.print_warnings(state, name)
  return {'asked': np.stack(scores, axis=1), 'read': np.stack(stream, axis=1)}


def _write(config, store, found, around):
  asked = {name: one['asked'] for name, one in found.items()}
  start = asked['no level'][:, :1]
  best = min(np.mean(losses[:, 1]) for losses in asked.values())
  summary, rows = {'loss_before': float(np.mean(start))}, []
  summary['loss_best_after_home'] = float(best)
  gains = {name: start - losses[:, 1:] for name, losses in asked.items()}
  for name, gain in gains.items():
    row = [name]
    for i, distance in enumerate(config.distances):
      row.append(report_files.mean_and_spread(gain[:, i]))
      key = f'{report_files.key(name)}_gain_after_{distance}'
      summary |= report_files.summarize(key, gain[:, i])
    row.append(report_files.mean_and_spread(found[name]['read'][:, -1]))
    key = f'{report_files.key(name)}_loss_on_the_stream'
    summary |= report_files.summarize(key, found[name]['read'][:, -1])
    rows.append(row)
  whole = {
    name: around['before home'] - losses for name, losses in around.items()
  }
  for name, gain in whole.items():
    key = f'whole_chain_gain_{report_files.key(name)}'
    summary |= report_files.summarize(key, gain)
  last = {name: float(np.mean(gain[:, -1])) for name, gain in gains.items()}
  summary['keeps_most'] = max(last, key=last.get)
  reading.plot_lines(
    store.workdir / 'horizon.png',
    config.distances,
    gains,
    xlabel='tokens since home',
    ylabel='nats per token saved on home',
    floor=0.0,
  )
  cells_lib.write_page(
    store,
    TASK,
    config,
    module=__name__,
    summary=summary,
    sections=[
      '# How long a topic is kept',
      'Nats per token that having read home saves on other text of it, mean '
      f'and spread over {config.num_seeds} trainings with '
      f'{config.num_streams} streams each, by tokens of other topics since. '
      f'Levels step every {config.inner.update_every} tokens; before home, '
      f'the loss is {np.mean(start):.3f}. The last column is the loss on the '
      'stream itself, since the distance before the last.',
      report_files.table(
        (
          'levels that learn',
          *(f'{d:,}' for d in config.distances),
          'loss on the stream',
        ),
        rows,
      ),
      '![What is kept of home](horizon.png)',
      'The same for the whole chain, unmixed, around a restart of its levels '
      f'after {config.inner.update_every[-1]:,} tokens of other topics:',
      report_files.table(
        tuple(whole),
        [tuple(map(report_files.mean_and_spread, whole.values()))],
      ),
    ],
    plots=['horizon.png'],
  )
