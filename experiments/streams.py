"""Bits per byte of long streams: memories, levels that learn, and two controls.

Command:
  python launch/run.py --config=experiments/streams.py --workdir=runs/streams

The same command goes on where it was interrupted, and
--set=results=experiments/results/streams also takes finished cells from that
folder and writes page and cells there. --set=models=hope measures one model.

Hardware: one CPU core; nine trainings of two to four minutes, and half an hour
of reading.
Results: experiments/results/streams/README.md.

Every model is trained as `experiments/quickstart.py`, with the chain of its
Hope, the same number of parameters within 3 per cent, and several seeds, of
which the first one also picks the rates of what learns. Then it reads held-out
files end to end: with nothing written, with memories, and with memories and
levels. The controls: a temperature and a bias over the vocabulary learn in
place of the levels, and the files are read in another order.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import numpy as np

from experiments import calibration
from experiments import cells as cells_lib
from experiments import quickstart
from experiments import report_files
from experiments import streams_report
from experiments.ablations import hope
from nested_learning import data as data_lib
from nested_learning import errors
from nested_learning import evaluation
from nested_learning import levels
from nested_learning import models
from nested_learning import parameters
from nested_learning import training
from nested_learning.training import modes
from nested_learning.training import text_workload

MODELS = ('hope', 'gated_deltanet', 'transformer')
_SIZE = models.zoo.Size(2, 128, 4, mlp_dim=384, vocab_size=257)
_STEP = 3.0  # about the ratio of two rates of the search
_MOST_RATES = 4  # tried beyond the ends of the grid


@dataclasses.dataclass(frozen=True)
class StreamsConfig:
  """Models, streams, and the search for the rate of what learns."""

  models: tuple[str, ...] = MODELS
  num_tokens: int = 2**17  # of a stream
  num_streams: int = 2  # side by side
  piece: int = 512  # tokens of a call, also the window of attention
  update_every: tuple[int, ...] = (128, 512)  # of the levels, fastest first
  rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
  search_tokens: int = 2**14  # of the streams of the search
  num_seeds: int = 3  # of training; the first one picks the rates
  # Changes of the quickstart, for tests.
  source: str = 'stdlib'
  num_steps: int = 600
  # Folder of earlier cells, to which page and cells are written as well.
  results: str | None = None

  def __post_init__(self):
    unknown = sorted(set(self.models) - set(MODELS))
    rule = f'among {", ".join(MODELS)}'
    errors.check_field(self, 'models', not unknown, rule)
    for name in ('num_tokens', 'search_tokens'):
      fine = getattr(self, name) % self.piece == 0
      rule = f'a multiple of piece={self.piece}'
      errors.check_field(self, name, fine, rule)


def get_config() -> StreamsConfig:
  """Returns the experiment."""
  return StreamsConfig()


def run(config: StreamsConfig, workdir: str, mode: str) -> None:
  """Trains and reads what is not finished, and writes the page."""
  report_files.check_mode(mode)
  folder = pathlib.Path(workdir)
  store = cells_lib.open_store(folder, config.results)
  for name in config.models:
    rates = {}
    for seed in range(config.num_seeds):
      _measure(config, store, name, seed, rates)
  page = folder / 'results' if store.results is None else store.results
  summary = streams_report.write_page(store, page, MODELS)
  report_files.write(
    workdir,
    config,
    module=__name__,
    summary=summary,
    sections=['# Streams', f'The results are in {page}/README.md.'],
  )
  print(f'{page}/README.md has the results.')


def make_config(
  name: str, config: StreamsConfig, seed: int = 0
) -> training.ExperimentConfig:
  """Returns the training of a model: the quickstart with another mixer."""
  base = quickstart.get_config()
  if name == 'hope':
    model = base.model
  else:
    mixer = quickstart.get_config('transformer').model.mixer
    mixer = dataclasses.replace(mixer, window=config.piece)
    if name == 'gated_deltanet':
      mixer = models.zoo.make_sized(name, _SIZE).mixer
    model = hope.fit(
      dataclasses.replace(base.model, mixer=mixer),
      tuple(level.name for level in base.model.levels),
      parameters.count(models.make_model(base.model).table),
    )
  return dataclasses.replace(
    base,
    name=name,
    model=model,
    seed=seed,
    data=dataclasses.replace(base.data, source=config.source, seed=seed),
    train=dataclasses.replace(base.train, num_steps=config.num_steps),
    # Its streams are read here.
    evaluation=dataclasses.replace(base.evaluation, stream_tokens=0),
  )


def _measure(config, store, name, seed, rates) -> None:
  """Trains a model, searches missing rates, and reads the streams."""
  trained = make_config(name, config, seed)
  workdir = store.workdir / 'models' / f'{name}_{seed}'
  settings = {
    'streams': {
      key: getattr(config, key)
      for key in ('num_tokens', 'num_streams', 'piece', 'update_every')
    },
    'search': {'rates': config.rates, 'num_tokens': config.search_tokens},
    'model': dataclasses.asdict(trained.model),
    'num_params': parameters.count(models.make_model(trained.model).table),
    'num_steps': config.num_steps,
  }

  @functools.cache
  def load():
    """Returns the trained parameters and the text that is held out."""
    if not (workdir / 'summary.json').is_file():
      training.run(trained, workdir)
    tokenizer = text_workload.make_tokenizer(trained)
    params, _ = modes.restore_params(trained, workdir, tokenizer.fingerprint)
    return (
      params,
      _read_text(trained),
      text_workload.byte_lengths(trained, tokenizer),
    )

  def measure(cell, make_values, **more):
    return cells_lib.measure(
      store,
      'streams',
      streams_report.cell_name(name, seed, cell),
      settings | more,
      make_values,
    )

  def trained_values():
    load()
    summary = json.loads((workdir / 'summary.json').read_text())
    return {key: summary[key] for key in ('bits_per_byte', 'steps')}

  def read(kind, rate, order, num_tokens, skip=0):
    params, text, _ = load()
    batches = make_batches(
      text, config, num_tokens=num_tokens, skip=skip, order=order
    )
    evaluate = make(kind, 0.0 if kind == 'calibration' else rate)
    if kind == 'calibration':
      params = params, rate
    return _values(evaluate(params, batches), num_tokens)

  @functools.cache  # one program for the search and for both orders
  def make(kind, rate):
    return make_reading(kind, trained.model, config, rate, load()[2])

  def search(kind):
    """Returns the best rate; the grid goes on where an end is the best."""
    skip = config.num_streams * config.num_tokens
    found, tried = {}, list(config.rates)
    while tried:
      for rate in tried:
        cell = measure(
          f'{kind} search {rate:g}',
          lambda rate=rate: read(
            kind, rate, 'files', config.search_tokens, skip
          ),
        )
        found[rate] = sum(cell.values['bits'])
      best = min(found, key=found.get)
      tried = []
      if len(found) < len(config.rates) + _MOST_RATES:
        ends = {min(found): best / _STEP, max(found): best * _STEP}
        tried = [float(f'{ends[best]:.2g}')] if best in ends else []
    return best

  measure('trained', trained_values)
  kinds = ['nothing', 'memories'] if name != 'transformer' else ['nothing']
  for order in ('files', 'other'):
    for kind in (*kinds, 'levels', 'calibration'):
      if kind in ('levels', 'calibration') and kind not in rates:
        rates[kind] = search(kind)
      rate = rates.get(kind, 0.0)
      measure(
        f'{kind} {order}',
        functools.partial(read, kind, rate, order, config.num_tokens),
        rate=rate,
      )


def _read_text(trained) -> dict[str, np.ndarray]:
  """Returns the held-out text, end to end: arrays [tokens]."""
  batches = data_lib.make_iterator(trained.data, split='validation')
  tokens = np.concatenate([x['tokens'][x['mask']] for x in batches])
  tokenizer = text_workload.make_tokenizer(trained)
  return {'tokens': tokens, 'starts': tokens == tokenizer.document_id}


def make_batches(
  text: Mapping[str, np.ndarray],
  config: StreamsConfig,
  *,
  num_tokens: int,
  skip: int,
  order: str,
) -> list[dict[str, np.ndarray]]:
  """Cuts streams out of a text.

  Args:
    text: Tokens [n], and starts [n], True at a document's first token.
    config: Number of streams, and tokens of a piece.
    num_tokens: Tokens of a stream.
    skip: Tokens of the text before the streams.
    order: 'files' as in the text; 'other' shuffles the documents of each
      stream, with those at its ends as they were cut.

  Returns:
    Batches [stream, piece] as the evaluation reads them.

  Raises:
    errors.UserError: The text is too short.
  """
  total = config.num_streams * num_tokens
  if len(text['tokens']) <= skip + total:
    raise errors.UserError(
      f'the held-out text has {len(text["tokens"])} tokens, and the streams '
      f'need {skip + total + 1}; lower num_tokens or num_streams.'
    )
  rows = []
  for i in range(config.num_streams):
    begin = skip + i * num_tokens
    own = slice(begin, begin + num_tokens)
    row = np.append(text['tokens'][own], text['tokens'][begin + num_tokens])
    if order == 'other':
      documents = np.split(row[:-1], np.flatnonzero(text['starts'][own]))
      picked = np.random.default_rng(i).permutation(len(documents))
      row[:-1] = np.concatenate([documents[j] for j in picked])
    rows.append(row)
  rows = np.stack(rows)
  shape = config.num_streams, num_tokens
  arrays = {
    'tokens': rows[:, :-1],
    'targets': rows[:, 1:],
    'mask': np.ones(shape, bool),
    'reset': np.arange(num_tokens) == np.zeros((shape[0], 1)),
  }
  cuts = range(0, num_tokens, config.piece)
  return [
    {name: x[:, i : i + config.piece] for name, x in arrays.items()}
    for i in cuts
  ]


def make_reading(
  kind: str,
  model: models.ModelConfig,
  config: StreamsConfig,
  rate: float,
  byte_lengths: np.ndarray,
) -> Callable[[Any, Any], evaluation.Evaluation]:
  """Makes `evaluate(params, batches)` of one curve.

  Args:
    kind: 'nothing', 'memories', 'levels' or 'calibration', whose params are
      those of the model and a rate.
    model: The model.
    config: The clocks.
    rate: Rate of the levels.
    byte_lengths: int [v], bytes of text of each token.

  Returns:
    The function, see `evaluation.make_evaluate_streams`.
  """
  inner = levels.make_inner(config.update_every, learning_rate=rate)
  made = models.make_model(model, inner if kind == 'levels' else None)
  if kind == 'calibration':
    level = dataclasses.replace(inner.levels[0], learning_rate=1.0)
    made = calibrate(made, level)
  reading = evaluation.make_reading(made, byte_lengths, write=kind != 'nothing')
  return evaluation.make_evaluate_streams(reading)


def calibrate(
  model: models.Model, level: levels.InnerLevelConfig
) -> models.Model:
  """Returns a model whose logits are calibrated online.

  A temperature and a bias over the vocabulary take the steps that a level takes
  inside a sequence: logits are exp(scale) * logits + bias, and both start at 0.

  Args:
    model: A model without levels that learn.
    level: Clock, clip and optimiser, whose updates are proportional to its
      rate; the loss is that of the next token.

  Returns:
    The model. Its `losses` takes whole segments of `update_every` tokens, and
    as params those of the model and a factor of the rate.
  """
  own = calibration.make(level, model.config.vocab_size)

  def losses(params, state, tokens, targets, token_loss, *, reset=None):
    params, rate = params
    carry = (None, own.start(len(tokens))) if state is None else state
    logits, stream = model.forward(params, carry[0], tokens, reset=reset)
    logits, learned = own.read(rate, carry[1], logits, targets)
    return token_loss(logits, targets), (stream, learned)

  def init_state(params, batch_size):
    return model.init_state(params[0], batch_size), own.start(batch_size)

  return model._replace(losses=losses, init_state=init_state)


def _values(found: evaluation.Evaluation, num_tokens: int) -> dict[str, Any]:
  """Returns bits and bytes of each bin of positions."""
  edges = evaluation.stream_edges(num_tokens)
  sums = lambda x: np.add.reduceat(x, edges[:-1])
  bits = sums(found.totals.loss) / math.log(2)
  return {
    'edges': edges,
    'bits': bits,
    'bytes': sums(found.totals.num_bytes),
    'bits_per_byte': found.bits_per_byte,
  }
