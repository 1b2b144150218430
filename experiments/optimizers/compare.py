"""Compares the optimisers in two trainings, with one learning-rate search.

The trainings are a Flax classifier of handwritten digits (scikit-learn's
bundled set), and the quickstart's language model on fewer tokens. Every
optimiser gets the same rates, initial parameters and batches.

Command (the digits need scikit-learn: pip install -c constraints.txt -e
'.[experiments]'):
  python launch/run.py --config=experiments/optimizers/compare.py \
    --workdir=runs/compare

`compare.py:digits` (a minute) and `compare.py:language` (20 minutes on two CPU
cores) run one of the two. Results (report.md, with plots) at the best of six
rates: validation loss on the digits over three seeds, and bits per byte of the
language model, one seed:

  M3                         0.030 +- 0.015   3.444
  Muon                       0.034 +- 0.011   3.446
  Adam                       0.024 +- 0.004   3.490
  M3, no second moment       0.034 +- 0.010   3.547
  preconditioned momentum    0.030 +- 0.002   3.555
  deep momentum              0.041 +- 0.007   3.617
  momentum                   0.040 +- 0.003   3.701
  delta momentum             0.041 +- 0.007   3.702
  gradient descent           0.055 +- 0.003   3.968
  DGD, erase 0.01            0.081 +- 0.002   4.305
  DGD                        1.087 +- 0.034   6.721

M3 and Muon are equal within noise; both are ahead of Adam on the language model
and behind it on the digits. DGD in the paper's form loses: erasing a map's
outputs is too strong a regulariser for data that comes again.
"""

import dataclasses
import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
from matplotlib import figure as mpl_figure
import numpy as np
import optax

from experiments import quickstart
from experiments import report_files
from experiments.optimizers import rules
from nested_learning import data as data_lib
from nested_learning import errors
from nested_learning import models


@dataclasses.dataclass(frozen=True)
class CompareConfig:
  """Trainings, their lengths, and the search."""

  tasks: tuple[str, ...] = ('digits', 'language')
  rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
  num_seeds: int = 3  # of the digits' initial parameters
  digits_steps: int = 300
  digits_batch: int = 64  # images
  language_mixer: str = 'hope'  # as the quickstart's argument
  language_steps: int = 60  # the quickstart has 600
  language_batch: int = 2  # rows; the quickstart has 4
  language_tokens: int = 512  # per row


def get_config(arg: str | None = None) -> CompareConfig:
  """Returns the experiment; `arg` is 'digits', 'language' or 'small'."""
  if arg is None:
    return CompareConfig()
  if arg in ('digits', 'language'):
    return CompareConfig(tasks=(arg,))
  if arg == 'small':
    return CompareConfig(
      rates=(1e-2, 1e-1),
      num_seeds=2,
      digits_steps=5,
      language_mixer='transformer',
      language_steps=2,
      language_tokens=32,
    )
  raise errors.UserError(f"{arg!r} must be 'digits', 'language' or 'small'.")


def run(config: CompareConfig, workdir: str, mode: str) -> None:
  """Trains with every optimiser on every task; writes tables and plots."""
  report_files.check_mode(mode)
  tasks = {'digits': _digits, 'language': _language}
  unknown = sorted(set(config.tasks) - set(tasks))
  if unknown:
    raise errors.UserError(f'tasks {unknown} are not among {sorted(tasks)}.')
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  summary, metrics = {}, []
  sections = [
    '# Optimisers on two real trainings',
    f'Every optimiser tries the rates {list(config.rates)}, decayed linearly '
    'to zero; the best has the lowest validation loss. Under DGD, Adam at 3e-3 '
    'trains all parameters that are no maps (embeddings, norms, biases).',
  ]
  for task in config.tasks:
    section, numbers, losses = _compare(task, tasks[task], config, folder)
    sections += section
    summary |= {f'{task}_{key}': value for key, value in numbers.items()}
    metrics += losses
  report_files.write(
    workdir,
    config,
    module=__name__,
    summary=summary,
    metrics=metrics,
    sections=sections,
  )


def _compare(task, make_task, config, folder):
  """Trains with every optimiser on one task, and draws its plot.

  Args:
    task: Name of the task.
    make_task: Function of the config that makes it.
    config: The experiment.
    folder: Folder of the plot.

  Returns:
    Sections of the report, numbers by name, and losses by optimiser and step.
  """
  loss_fn, params, batches, evaluate, title = make_task(config)
  evaluate = jax.jit(evaluate)
  rows, curves, scores, numbers, losses = {}, {}, {}, {}, []
  for name in rules.NAMES:
    sweep = rules.sweep(name, loss_fn, params, batches, rates=config.rates)
    measured = rules.measure(evaluate, sweep.params)  # leaves [rate, seed]
    scores[name] = np.mean(measured['validation_loss'], axis=1)
    found = rules.best(scores[name])
    picked = {key: value[found] for key, value in measured.items()}
    curves[name] = np.mean(sweep.losses[found], axis=0)  # [step]
    rate, prefix = config.rates[found], report_files.key(name)
    rows[name] = (name, f'{rate:g}', *map(_mean, picked.values()))
    for key, values in picked.items():
      numbers[f'{prefix}_{key}'] = float(np.mean(values))
    numbers[f'{prefix}_rate'] = float(rate)
    losses += [
      {'task': task, 'optimizer': name, 'step': i, 'loss': float(loss)}
      for i, loss in enumerate(curves[name])
    ]
    print(f'{task}: {rows[name]}', flush=True)
  _plot(folder / f'{task}.png', config, curves, scores)

  def validation_loss(name):  # diverged runs last
    loss = numbers[f'{report_files.key(name)}_validation_loss']
    return loss if np.isfinite(loss) else math.inf

  order = sorted(rules.NAMES, key=validation_loss)
  numbers['best'] = order[0]
  header = ('optimiser', 'best rate', *(k.replace('_', ' ') for k in measured))
  section = [
    f'## {title}',
    report_files.table(header, [rows[name] for name in order]),
    f'![Training loss, and validation loss by rate]({task}.png)',
  ]
  return section, numbers, losses


class _Classifier(nn.Module):
  """Three dense layers with layer norm."""

  @nn.compact
  def __call__(self, x):
    for _ in range(2):
      x = nn.relu(nn.LayerNorm()(nn.Dense(128)(x)))
    return nn.Dense(10)(x)


def _digits(config):
  try:
    from sklearn import datasets
  except ImportError as error:
    raise errors.UserError(
      "The digits need scikit-learn: pip install '.[experiments]', or leave "
      'them out with --config=experiments/optimizers/compare.py:language.'
    ) from error
  images, labels = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(labels))
  images, labels = images[order].astype(np.float32) / 16, labels[order]
  num_train = len(labels) - 500
  shape = config.digits_steps, config.digits_batch
  epochs = 1 + math.prod(shape) // num_train
  shuffles = [
    np.random.default_rng(1 + epoch).permutation(num_train)
    for epoch in range(epochs)
  ]
  picks = np.concatenate(shuffles)[: math.prod(shape)].reshape(shape)
  batches = {
    'image': jnp.array(images[picks]),
    'label': jnp.array(labels[picks]),
  }
  validation = {
    'image': jnp.array(images[num_train:]),
    'label': jnp.array(labels[num_train:]),
  }
  model = _Classifier()
  keys = jax.random.split(jax.random.key(0), config.num_seeds)
  params = jax.vmap(lambda key: model.init(key, batches['image'][0]))(keys)

  def loss_fn(params, batch):
    logits = model.apply(params, batch['image'])
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    )

  def evaluate(params):
    logits = model.apply(params, validation['image'])
    right = jnp.argmax(logits, -1) == validation['label']
    return {
      'validation_loss': loss_fn(params, validation),
      'accuracy': jnp.mean(right),
    }

  title = (
    f'Digits: {num_train} images, {config.digits_steps} steps of '
    f'{config.digits_batch}, {config.num_seeds} seeds'
  )
  return loss_fn, params, batches, evaluate, title


def _language(config):
  experiment = quickstart.get_config(config.language_mixer)
  data_config = dataclasses.replace(
    experiment.data,
    sequence_length=config.language_tokens,
    batch_size=config.language_batch,
  )
  model = models.make_model(experiment.model)
  batches = _read(data_config, 'train', config.language_steps)
  validation = _read(data_config, 'validation', 8)
  params = jax.vmap(model.init_params)(jax.random.key(0)[None])
  byte_lengths = jnp.array(
    data_lib.make_tokenizer(data_config.tokenizer).byte_lengths
  )

  def nats(params, batch):
    logits, _ = model.forward(
      params, None, batch['tokens'], reset=batch['reset']
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['targets']
    )
    return jnp.sum(loss * batch['mask'])

  def loss_fn(params, batch):
    return nats(params, batch) / jnp.maximum(jnp.sum(batch['mask']), 1)

  def evaluate(params):
    total = jnp.sum(jax.lax.map(lambda batch: nats(params, batch), validation))
    lengths = byte_lengths[validation['targets']] * validation['mask']
    return {
      'validation_loss': total / jnp.sum(validation['mask']),
      'bits_per_byte': total / jnp.log(2.0) / jnp.sum(lengths),
    }

  title = (
    f'Language model of the quickstart, {config.language_mixer}: '
    f'{config.language_steps} steps of {config.language_batch} x '
    f'{config.language_tokens} bytes'
  )
  return loss_fn, params, batches, evaluate, title


def _read(config, split, num_batches):
  iterator = data_lib.make_iterator(config, split=split)
  batches = [next(iterator) for _ in range(num_batches)]
  keys = ('tokens', 'targets', 'mask', 'reset')
  return {
    key: jnp.array(np.stack([batch[key] for batch in batches])) for key in keys
  }


def _mean(values):
  spread = f' ± {np.std(values):.2g}' if len(values) > 1 else ''
  return f'{np.mean(values):.4g}{spread}'


def _plot(path, config, curves, scores):
  """Plots training loss at the best rate, smoothed, and loss by rate."""
  figure = mpl_figure.Figure(figsize=(12, 4.5), layout='constrained')
  left, right = figure.subplots(1, 2)
  styles = ('-', '--')
  for i, name in enumerate(curves):
    style = {'color': f'C{i % 10}', 'linestyle': styles[i // 10]}
    width = max(1, len(curves[name]) // 30)
    smooth = np.convolve(curves[name], np.ones(width) / width, 'valid')
    left.plot(np.arange(len(smooth)) + width // 2, smooth, label=name, **style)
    right.plot(config.rates, scores[name], marker='.', label=name, **style)
  start = max(curve[0] for curve in curves.values())
  left.set(xlabel='step', ylabel='training loss', yscale='log')
  right.set(xlabel='learning rate', ylabel='validation loss', xscale='log')
  right.set_yscale('log')
  right.set_ylim(top=2 * start)
  right.legend(fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
  figure.savefig(path, dpi=110)
