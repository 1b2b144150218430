"""A pretrained model on streams that it has not seen: what learning gives.

Command:
  python launch/run.py --config=experiments/pretrained/streams.py \
    --workdir=runs/pretrained_streams

The same command goes on where it was interrupted, and
--set=results=experiments/results/pretrained_streams also takes finished cells
from that folder and writes page and cells there. --set=arms=frozen,adam_3e-4
measures some of the arms. --mode=eval writes the page alone.

Hardware: an arm of 16,384 tokens takes 2 to 5 minutes of one CPU core, and the
training of memories or of an adapter an hour or two.
Results: experiments/results/pretrained_streams/README.md, with a few arms of
`streams.py:short` so far.

SmolLM2-135M reads this repository's own sources, which are younger than it,
once, with a window and attention sinks. Every token is predicted before it is
learned from. Arms let levels learn, memories beside attention, both, or
nothing. The controls: a temperature and a bias of the vocabulary, a cache of
n-grams, a window of four times the length, and an adapter of low rank that was
trained on the same tokens as the memories. Facts planted in the stream are
asked for at its end, and another text is read before and after.
"""

import dataclasses
import functools
import pathlib
from typing import Any, Literal

import jax

from experiments import cells as cells_lib
from experiments import report_files
from experiments.benchmarks import timing
from experiments.pretrained import reading
from experiments.pretrained import streams_report
from experiments.pretrained import texts
from nested_learning import configs
from nested_learning import errors
from nested_learning import levels
from nested_learning import models
from nested_learning import optimizers
from nested_learning import training
from nested_learning.training import modes
from nested_learning.training import pretrained_runs
from nested_learning.training import text_workload

_NUM_SINKS = 4


@dataclasses.dataclass(frozen=True)
class Arm:
  """Parts that learn beside a frozen model.

  Attributes:
    inner: How levels learn in the stream.
    window: Windows of attention, in units of `StreamsConfig.window`.
    levels: Names of the levels that MLPs become: two are those of the last
      quarter and those below it, more follow in turn; () for one level.
    trained: What was trained before, on other text.
  """

  inner: levels.InnerConfig = levels.InnerConfig()
  window: int = 1
  levels: tuple[str, ...] = ()
  trained: Literal['nothing', 'memory', 'lora'] = 'nothing'


_ADAM = optimizers.configs.AdamW()


def _learn(rate, optimizer=_ADAM, every=(256,), **settings):
  return levels.make_inner(
    every, learning_rate=rate, optimizer=optimizer, **settings
  )


# In the order in which they are measured. Rates are not searched: where an arm
# has several, all of them are on the page.
ARMS = {
  'frozen': Arm(),
  'adam_3e-4': Arm(_learn(3e-4)),
  'frozen_wide': Arm(window=4),
  'low_rank_1e-3': Arm(_learn(1e-3, learns='low_rank')),
  'adam_1e-4': Arm(_learn(1e-4)),
  'frozen_twice': Arm(window=2),
  'adam_twice': Arm(_learn(3e-4), window=2),
  'low_rank_3e-3': Arm(_learn(3e-3, learns='low_rank')),
  'output_3e-4': Arm(_learn(3e-4, learns='output')),
  'sgd_0.03': Arm(_learn(0.03, optimizers.configs.Sgd())),
  'sgd_0.1': Arm(_learn(0.1, optimizers.configs.Sgd())),
  'm3_1e-4': Arm(_learn(1e-4, optimizers.configs.M3())),
  'm3_3e-4': Arm(_learn(3e-4, optimizers.configs.M3())),
  'dgd_0.03': Arm(_learn(0.03, optimizers.configs.Dgd())),
  'dgd_0.1': Arm(_learn(0.1, optimizers.configs.Dgd())),
  'adam_all': Arm(_learn(3e-4, depth=1.0)),
  'every_128': Arm(_learn(3e-4, every=(128,))),
  'every_512': Arm(_learn(3e-4, every=(512,))),
  'three_levels': Arm(
    _learn(3e-4, every=(128, 512, 2048)), levels=('fast', 'middle', 'slow')
  ),
  'memory': Arm(trained='memory'),
  'lora': Arm(trained='lora'),
  # Layers with memories differ, and are one block; names say where it learns.
  'memory_adam_3e-4': Arm(
    _learn(3e-4, every=(256, None)), levels=('fast', 'slow'), trained='memory'
  ),
}


@dataclasses.dataclass(frozen=True)
class StreamsConfig:
  """The model, the streams and the arms."""

  source: str = 'smollm2'  # see `pretrained.open_source`
  arms: tuple[str, ...] = tuple(ARMS)
  texts: tuple[str, ...] = ('sources', 'pages')  # or paths of files
  num_tokens: int = 16_384  # of a stream
  other_tokens: int = 512  # of another text, which is read after a stream
  window: int = 512  # tokens of attention, beside sinks
  piece: int = 512  # tokens of a call
  # Training of memories and adapters, on text of the standard library.
  train_source: str = 'stdlib'
  train_tokens: int = 307_200
  train_length: int = 1024  # tokens of a row
  memory_layers: tuple[int, ...] = (24, 28)
  memory_heads: int = 4
  memory_dim: int = 64  # of a head
  lora_rank: int = 14  # as many parameters as the memories have
  learning_rate: float = 1e-3  # of both
  # Folder of earlier cells, to which page and cells are written as well.
  results: str | None = None

  def __post_init__(self):
    unknown = sorted(set(self.arms) - set(ARMS))
    rule = f'among {", ".join(ARMS)}'
    errors.check_field(self, 'arms', not unknown, rule)
    fine = self.num_tokens % self.piece == 0
    errors.check_field(
      self, 'num_tokens', fine, f'a multiple of piece={self.piece}'
    )


def get_config(arg: str | None = None) -> StreamsConfig:
  """Returns the experiment; 'short' reads streams of 4,096 tokens."""
  if arg not in (None, 'short'):
    raise errors.UserError(f"{arg!r} must be 'short', or nothing.")
  short = {'num_tokens': 4096, 'texts': ('sources',)}
  return StreamsConfig(**short if arg == 'short' else {})


def run(config: StreamsConfig, workdir: str, mode: str) -> None:
  """Measures every cell that is not finished (train), and writes the page."""
  if mode != 'eval':
    report_files.check_mode(mode)
  folder = pathlib.Path(workdir)
  store = cells_lib.open_store(folder, config.results)
  if mode == 'train':
    for arm in config.arms:
      for text in config.texts:
        _measure(config, store, arm, text)
  page = folder / 'results' if store.results is None else store.results
  summary = streams_report.write_page(store, page, tuple(ARMS))
  print(f'{page}/README.md has the results.')
  if mode == 'train':
    report_files.write(
      workdir,
      config,
      module=__name__,
      summary=summary,
      sections=['# Streams', f'The results are in {page}/README.md.'],
    )


def _measure(config, store, name, text) -> None:
  """Measures an arm on a text."""
  arm = ARMS[name]
  fields = ['source', 'num_tokens', 'other_tokens', 'window']
  if arm.trained != 'nothing':
    fields += ['train_source', 'train_tokens', 'train_length', 'learning_rate']
    fields += [x for x in vars(config) if x.startswith(arm.trained)]
  settings = {key: getattr(config, key) for key in fields}
  label = pathlib.Path(text).stem
  settings |= {'arm': configs.to_json(arm), 'text': label}
  cells_lib.measure(
    store,
    streams_report.TASK,
    f'{label} {name}',
    settings,
    functools.partial(_values, config, store.workdir, arm, text),
  )


def _values(config, workdir, arm, text) -> dict[str, Any]:
  """Reads a stream with an arm, asks for its facts, and reads another text."""
  base = import_base(config, workdir)
  tokenizer = text_workload.make_tokenizer(base)
  byte_lengths = text_workload.byte_lengths(base, tokenizer)
  stream = texts.make_stream(
    texts.read_text(text), tokenizer, config.num_tokens
  )
  other = next(x for x in (*config.texts, 'pages', 'sources') if x != text)
  other = texts.read_text(other)
  other = tokenizer.encode(other[: 16 * config.other_tokens])
  other = other[: config.other_tokens + 1]
  model, params = make_arm(config, workdir, base, arm)
  started = timing.work_time()
  losses, learned = reading.read(
    model, params, stream, piece=config.piece, size=_calibration_size(config)
  )
  seconds = timing.work_time() - started
  sizes = jax.tree.map(lambda x: x.nbytes, learned.state)
  own = sizes.levels if model.reader is not None else ()
  return {
    **reading.summarize(losses, stream, byte_lengths),
    **reading.ask(learned, stream),
    'other_bits_per_byte': reading.read_other(learned, other, byte_lengths),
    'level_bytes': sum(jax.tree.leaves(own)),
    'cpu_seconds': seconds,
  }


def _calibration_size(config) -> int:
  return min(256, config.piece)


def import_base(
  config: StreamsConfig, workdir: pathlib.Path
) -> training.ExperimentConfig:
  """Imports the pretrained model if it is not, with a window of attention."""
  folder = workdir / 'base'
  if not (folder / 'config.json').exists():
    pretrained_runs.import_run(config.source, folder)
  base = configs.load(str(folder / 'config.json'))
  return configs.override(
    base,
    [
      f'model.max_length={max(config.piece, config.train_length)}',
      f'model.mixer.window={config.window}',
      f'model.mixer.num_sinks={_NUM_SINKS}',
    ],
  )


def make_arm(
  config: StreamsConfig,
  workdir: pathlib.Path,
  base: training.ExperimentConfig,
  arm: Arm,
) -> tuple[models.Model, Any]:
  """Returns the model of an arm and its parameters; trains what is trained."""
  if arm.trained == 'nothing':
    made, folder = base, workdir / 'base'
  else:
    made = _training(config, base, arm.trained)
    folder = workdir / 'trained' / arm.trained
    if not (folder / 'summary.json').is_file():
      training.run(made, folder)
  tokenizer = text_workload.make_tokenizer(made)
  params, _ = modes.restore_params(made, folder, tokenizer.fingerprint)
  model = made.model
  if arm.levels:
    where = 'last_quarter' if len(arm.levels) == 2 else 'cycle'
    model, params = models.stack_levels(
      model, params, arm.levels, placement=where
    )
  mixer = dataclasses.replace(model.mixer, window=arm.window * config.window)
  model = dataclasses.replace(model, mixer=mixer)
  return models.make_model(model, arm.inner), params


def _training(config, base, kind) -> training.ExperimentConfig:
  """Returns the training of memories or of an adapter, alone."""
  changes = [
    f'data.source={config.train_source}',
    f'data.sequence_length={config.train_length}',
    'data.batch_size=1',
    f'train.num_steps={config.train_tokens // config.train_length}',
    f'train.learning_rate={config.learning_rate}',
    f'train.trainable={kind}',
    'evaluation.stream_tokens=0',
  ]
  if kind == 'lora':
    changes.append(f'train.lora_rank={config.lora_rank}')
  else:
    changes += place_memories(config)
  return configs.override(base, changes)


def place_memories(config: Any) -> list[str]:
  """Returns changes of a run that place memories as `memory_*` says."""
  layers = ','.join(map(str, config.memory_layers))
  return [
    'model.placement.memory=MemoryMixerConfig',
    f'model.placement.memory.num_heads={config.memory_heads}',
    f'model.placement.memory.head_dim={config.memory_dim}',
    f'model.placement.memory_layers={layers},',
  ]
