"""Runs that begin with pretrained weights: import, loading and export."""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np

from nested_learning import configs
from nested_learning import data as data_lib
from nested_learning import errors
from nested_learning import files
from nested_learning import inference
from nested_learning import models
from nested_learning import parameters
from nested_learning import pretrained
from nested_learning import sharding
from nested_learning import subtrees
from nested_learning.pretrained import source as source_lib
from nested_learning.pretrained import tensors as tensors_lib
from nested_learning.training import config as config_lib
from nested_learning.training import trainable

_FOLDER = 'pretrained'  # below the workdir of an import
_MAX_LENGTH = 2048  # tokens, unless --max_length says another number
_SEQUENCE_LENGTH = 1024  # tokens of a row, in training and evaluation
_LEARNING_RATE = 2e-5  # of all parameters; usual for fine-tuning
_DTYPES = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}


def import_run(
  path: str,
  workdir: pathlib.Path,
  *,
  tokenizer: str | None = None,
  max_length: int | None = None,
  ignore: Sequence[str] = (),
) -> str:
  """Imports a pretrained model into a new workdir, whole or not at all.

  The workdir gets the weights in `pretrained/`, in their own type, the
  tokenizer, chat template and generation settings beside them, and a
  config.json. Tensors are copied one at a time.

  Args:
    path: See `pretrained.open_source`.
    workdir: A folder that does not exist yet, or is empty.
    tokenizer: File of the tokenizer; None for the one beside the weights.
    max_length: See `pretrained.to_model_config`; None for the model's, and at
      most 2048.
    ignore: Keys of config.json to leave out that are not known.

  Returns:
    A line that says what was imported.

  Raises:
    errors.UserError: The model cannot be imported, or the workdir holds
      something.
  """
  source = pretrained.open_source(path)
  config = {k: v for k, v in source.config.items() if k not in ignore}
  model = pretrained.to_model_config(config)
  length = max_length or min(model.max_length, _MAX_LENGTH)
  model = pretrained.to_model_config(config, max_length=length)
  found = source_lib.make_map(config, model)
  found.check(source.tensors)
  companions = dict(source.files)
  if tokenizer is not None:
    companions |= _read_tokenizer(tokenizer)
  name = source_lib.find_tokenizer(companions)
  if name is None:
    raise errors.UserError(
      f'{files.shown(source.path)} has no tokenizer that can be read; give its '
      'tokenizer.json or tokenizer.model with --tokenizer=FILE.'
    )
  home = workdir.absolute() / _FOLDER

  with source_lib.new_folder(workdir) as draft:
    folder = draft / _FOLDER
    folder.mkdir()
    for companion, content in companions.items():
      (folder / companion).write_bytes(content)
    # Before the weights, which take longer.
    made = source_lib.check_tokenizer(
      folder / name,
      model.vocab_size,
      shown=tokenizer or files.shown(source.path / name),
    )
    experiment = _make_experiment(
      source._replace(files=companions), model, made, home / name
    )
    text = configs.to_json(experiment)
    (draft / 'config.json').write_text(text, encoding='utf-8')
    tensors = {n: source.tensors[n] for n in found.places}
    tensors_lib.write_folder(folder, tensors)
    source_lib.write_config(folder, config)
  count = parameters.count(found.table)
  return (
    f'{workdir}: {config["model_type"]}, {count:,} parameters, '
    f'{model.num_layers} layers of {model.embed_dim}, {model.vocab_size:,} '
    f'tokens. Try --workdir={workdir} --mode=generate.'
  )


def load_base(
  config: config_lib.ExperimentConfig, table: parameters.Table, mesh: Any
) -> Any:
  """Loads the pretrained weights that a run begins with.

  Args:
    config: The experiment.
    table: Parameters of its model.
    mesh: The mesh over which they are sharded.

  Returns:
    The parameters, without those that are added to the pretrained model, in
    float32 and, if they are frozen, in their own type; None if the run begins
    with random ones.

  Raises:
    errors.UserError: They are gone, damaged, or of another model.
  """
  if config.base is None:
    return None
  is_trained = trainable.make_filter(config, table)
  return source_lib.load_params(
    open_base(config),
    config.model,
    dtype=np.float32,
    keep=lambda path: not is_trained(path),
    shardings=sharding.param_shardings(table, mesh),
  )


def load_params(
  config: config_lib.ExperimentConfig, model: models.Model, mesh: Any
) -> Any:
  """Returns all parameters at the start of a run with a base."""
  base = load_base(config, model.table, mesh)

  def start(key, base):
    return trainable.combine(*trainable.start(config, model, key, base))

  shardings = sharding.param_shardings(model.table, mesh)
  start = jax.jit(start, out_shardings=shardings, donate_argnums=1)
  return start(jax.random.key(config.seed), base)


def load_frozen(
  config: config_lib.ExperimentConfig, model: models.Model, mesh: Any
) -> Any:
  """Returns the parameters that are frozen; None if all are trained."""
  if not trainable.is_partial(config):
    return None
  is_trained = trainable.make_filter(config, model.table)
  shardings = subtrees.select(
    sharding.param_shardings(model.table, mesh),
    lambda path: not is_trained(path),
  )
  start = jax.jit(
    lambda key, base: trainable.start(config, model, key, base)[1],
    out_shardings=shardings,
    donate_argnums=1,
  )
  base = load_base(config, model.table, mesh)
  return start(jax.random.key(config.seed), base)


def abstract_base(
  config: config_lib.ExperimentConfig, table: parameters.Table
) -> Any:
  """Returns shapes and types of `load_base`, or None; reads no weight.

  Types matter where some parameters are frozen.
  """
  if not trainable.is_partial(config):
    return None
  source = open_base(config)
  found = source_lib.make_map(source.config, config.model)
  found.check(source.tensors)
  dtypes = found.dtypes(source.tensors)
  is_trained = trainable.make_filter(config, table)
  shapes = subtrees.select(parameters.abstract(table), dtypes.__contains__)

  def leaf(path, x):
    name = parameters.path_name(path)
    return x if is_trained(name) else x.update(dtype=dtypes[name])

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def export_run(
  config: config_lib.ExperimentConfig,
  params: Any,
  folder: pathlib.Path,
  *,
  dtype: str | None = None,
) -> str:
  """Writes a model as a folder that transformers loads.

  Args:
    config: The experiment; its `base` has the config.json, the tokenizer and
      the type of every tensor.
    params: Its parameters; None for those of the base, copied bit by bit.
    folder: A folder that does not exist yet, or is empty.
    dtype: 'float32', 'bfloat16' or 'float16'; None for the types of the base.

  Returns:
    A line that says what was exported.

  Raises:
    errors.UserError: The run has no base, or its model no form in the family.
  """
  source, written = check_exportable(config)
  found = source_lib.make_map(source.config, config.model)
  found.check(source.tensors)
  dtypes = {name: source.tensors[name].dtype for name in found.places}
  if dtype is not None:
    dtypes = dict.fromkeys(dtypes, _DTYPES[dtype])
    written |= {'dtype': dtype}
    written.pop('torch_dtype', None)
  if params is None:  # tensor by tensor, however large the model is
    tensors = {
      name: tensors_lib.cast(source.tensors[name], dtypes[name])
      for name in found.places
    }
  else:
    tensors = found.dump(params, dtypes)
  source_lib.write(folder, written, tensors, source.files)
  return f'{folder}: {written["model_type"]}, {len(tensors)} tensors.'


def check_exportable(
  config: config_lib.ExperimentConfig,
) -> tuple[source_lib.Source, dict[str, Any]]:
  """Checks that the model of a run has a form in the family of its base.

  Args:
    config: The experiment.

  Returns:
    The open base, and the object of the config.json to write.

  Raises:
    errors.UserError: The run has no base, or its model no form in the family.
  """
  if getattr(config, 'base', None) is None:
    raise errors.UserError(
      'this run did not begin with pretrained weights (base=None); only runs '
      'that begin with the import of launch/import.py can be exported.'
    )
  source = open_base(config)
  return source, pretrained.to_hf_config(config.model, source.config)


def open_base(config: config_lib.ExperimentConfig) -> source_lib.Source:
  """Opens the pretrained model that a run begins with."""
  try:
    return pretrained.open_source(config.base)
  except errors.UserError as error:
    raise errors.UserError(f'base={config.base}: {error}') from error


def _make_experiment(
  source: source_lib.Source,
  model: models.ModelConfig,
  tokenizer: data_lib.Tokenizer,
  path: pathlib.Path,
) -> config_lib.ExperimentConfig:
  """Makes the experiment of an imported model."""
  return config_lib.ExperimentConfig(
    name=source.path.stem,
    model=model,
    data=data_lib.DataConfig(
      tokenizer=str(path),
      sequence_length=min(_SEQUENCE_LENGTH, model.max_length),
      batch_size=1,
    ),
    train=config_lib.TrainConfig(learning_rate=_LEARNING_RATE),
    generate=_make_generate(source.generation, model, tokenizer),
    base=str(path.parent),
  )


def _make_generate(
  generation, model: models.ModelConfig, tokenizer: data_lib.Tokenizer
) -> inference.GenerateConfig:
  """Makes the settings of generation, as transformers takes them."""
  default = inference.GenerateConfig()
  ends = generation.get('eos_token_id')
  ends = ends if isinstance(ends, list) else [ends]
  names = {i: name for name, i in tokenizer.special.items()}
  stop = tuple(
    names[i] for i in ends if i in names and i != tokenizer.document_id
  )
  settings = {'temperature': 0.0}
  if generation.get('do_sample'):
    keys = {'temperature': 1.0, 'top_k': 50, 'top_p': 1.0}
    settings = {key: generation.get(key, usual) for key, usual in keys.items()}
    settings['top_k'] = settings['top_k'] or None
  return dataclasses.replace(
    default,
    num_tokens=min(default.num_tokens, max(model.max_length // 2, 1)),
    stop=stop,
    **settings,
  )


def _read_tokenizer(path: str) -> dict[str, bytes]:
  """Returns the file of a tokenizer under the name that it has in a folder."""
  file = pathlib.Path(os.path.expanduser(path))
  if file.suffix not in ('.json', '.model'):
    raise errors.UserError(
      f'--tokenizer={path} is neither a .json nor a .model; give the file of a '
      'tokenizer.'
    )
  try:
    return {f'tokenizer{file.suffix}': file.read_bytes()}
  except OSError as error:
    raise errors.UserError(
      f'--tokenizer={path} cannot be read ({error.strerror}); check the path.'
    ) from error
