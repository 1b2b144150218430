"""A Transformer with two levels and a corpus; they train in a second."""

import atexit
import dataclasses
import functools
import pathlib
import shutil
import tempfile

import jax
from jax.experimental.compilation_cache import compilation_cache

from nested_learning import data
from nested_learning import evaluation
from nested_learning import inference
from nested_learning import layers
from nested_learning import models
from nested_learning import training

MODEL = models.ModelConfig(
  vocab_size=260,  # a few more than the tokenizer has
  num_layers=1,
  embed_dim=16,
  mixer=layers.AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
  levels=(
    models.LevelConfig('fast', mlp_dim=16),
    models.LevelConfig('slow', mlp_dim=16, train_every=512),
  ),
  max_length=128,
)


def write_corpus(folder: pathlib.Path) -> str:
  """Writes eight files of text and returns the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(8):
    lines = [f'line {j} of file {i}: {j * i} and {j + i}' for j in range(60)]
    (folder / f'{i}.txt').write_text('\n'.join(lines))
  return str(folder)


def experiment(root: pathlib.Path, **changes) -> training.ExperimentConfig:
  """Returns the experiment, with its text below `root`.

  Args:
    root: A folder of the test's own.
    **changes: Fields to change, as in train={'num_steps': 3} or seed=1.
  """
  root = pathlib.Path(root)
  config = training.ExperimentConfig(
    name='tiny',
    model=MODEL,
    data=data.DataConfig(
      source=write_corpus(root / 'text'),
      sequence_length=32,
      batch_size=8,
      validation_fraction=0.2,
      cache_dir=str(root / 'cache'),
    ),
    train=training.TrainConfig(
      num_steps=6,
      learning_rate=1e-2,
      warmup_steps=2,
      log_every=1,
      evaluate_every=100,
      checkpoint_every=100,
    ),
    evaluation=evaluation.EvaluationConfig(num_batches=2, stream_tokens=0),
    generate=inference.GenerateConfig(prompt='line', num_tokens=8),
  )
  for name, value in changes.items():
    if isinstance(value, dict):
      changes[name] = dataclasses.replace(getattr(config, name), **value)
  return dataclasses.replace(config, **changes)


def share_executables(test) -> None:
  """Lets the runs of all tests of this process share what they compile."""
  for name, value in (
    ('jax_compilation_cache_dir', _executables()),
    ('jax_persistent_cache_min_compile_time_secs', 0.0),
  ):
    test.addCleanup(jax.config.update, name, getattr(jax.config, name))
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  test.addCleanup(compilation_cache.reset_cache)


@functools.cache
def _executables() -> str:
  folder = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder
