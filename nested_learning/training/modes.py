"""What a run can do: train, evaluate, generate, describe."""

import json
import math
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import configs
from nested_learning import data as data_lib
from nested_learning import errors
from nested_learning import evaluation
from nested_learning import inference
from nested_learning import models
from nested_learning import parameters
from nested_learning import sharding
from nested_learning.training import checkpoints
from nested_learning.training import config as config_lib
from nested_learning.training import description
from nested_learning.training import interrupts
from nested_learning.training import metrics as metrics_lib
from nested_learning.training import report
from nested_learning.training import trainer


def run(
  config: config_lib.ExperimentConfig,
  workdir: str | pathlib.Path | None = None,
  mode: Literal['train', 'eval', 'generate', 'describe'] = 'train',
) -> None:
  """Runs an experiment in one of its modes.

  'train' goes on from the latest checkpoint in `workdir` or begins, and ends
  with an evaluation, a sample, report.md and, last of all, summary.json.
  'eval' evaluates the latest checkpoint with writes on and off and leaves
  evaluation.json, the table and the plot by position. 'generate' prints what
  follows the prompt. 'describe' prints sizes, and needs no workdir.

  Args:
    config: The experiment.
    workdir: The run's folder.
    mode: What to do.

  Raises:
    errors.UserError: Something the user can mend is wrong.
    SystemExit: After SIGTERM (code 143) or Ctrl-C (130), once all is saved.
  """
  if mode == 'describe':
    print(description.describe(config))
    return
  if workdir is None:
    raise errors.UserError(f'mode {mode!r} needs a workdir.')
  workdir = pathlib.Path(workdir)
  modes = {'train': _train, 'eval': _evaluate, 'generate': _generate}
  if mode not in modes:
    raise errors.UserError(
      f"{mode=} must be 'train', 'eval', 'generate' or 'describe'."
    )
  tokenizer = trainer.make_tokenizer(config)
  encode_prompt(config, tokenizer)  # refuses one that is too long, early
  modes[mode](config, workdir, tokenizer)


def restore_params(
  config: config_lib.ExperimentConfig,
  workdir: pathlib.Path,
  tokenizer_fingerprint: str,
) -> tuple[Any, int]:
  """Parameters of the latest checkpoint, on the config's mesh, and its step."""
  if not (workdir / 'checkpoints').is_dir():
    raise errors.UserError(
      f'{workdir} holds no checkpoint; run --mode=train first, or give the '
      '--workdir of a run.'
    )
  table = models.make_model(config.model).table
  mesh = trainer.make_mesh(config)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    parameters.abstract(table),
    sharding.param_shardings(table, mesh),
  )
  with checkpoints.open_manager(workdir, read_only=True) as manager:
    restored = checkpoints.restore(
      manager,
      {'params': abstract},
      config=config,
      tokenizer_fingerprint=tokenizer_fingerprint,
    )
  return restored.state['params'], restored.step


def encode_prompt(
  config: config_lib.ExperimentConfig, tokenizer: data_lib.Tokenizer
) -> np.ndarray:
  """The prompt as the start of a document, int32 [1, t]."""
  text = tokenizer.encode(config.generate.prompt)
  tokens = np.concatenate([[tokenizer.document_id], text]).astype(np.int32)
  inference.check_length(config.model, len(tokens), config.generate.num_tokens)
  return tokens[None]


def generate_text(
  config: config_lib.ExperimentConfig,
  params: Any,
  tokenizer: data_lib.Tokenizer,
) -> str:
  """The prompt and what the model writes after it."""
  settings = config.generate
  generate = inference.make_generate(
    models.make_model(config.model),
    num_tokens=settings.num_tokens,
    temperature=settings.temperature,
    top_k=settings.top_k,
    top_p=settings.top_p,
    stop_token=tokenizer.document_id,
    vocab_size=tokenizer.vocab_size,
  )
  prompt = jnp.asarray(encode_prompt(config, tokenizer))
  with jax.set_mesh(trainer.make_mesh(config)):
    generated = generate(params, prompt, jax.random.key(settings.seed))
  tokens = np.asarray(generated.tokens)[0, : int(generated.lengths[0])]
  return settings.prompt + tokenizer.decode(tokens)


def _train(config, workdir, tokenizer):
  workdir.mkdir(parents=True, exist_ok=True)
  config_path = workdir / 'config.json'
  if jax.process_index() == 0 and not config_path.exists():
    config_path.write_text(configs.to_json(config), encoding='utf-8')
  outcome = trainer.train(config, workdir)
  with interrupts.ending(trainer.trained_message(config, workdir)):
    _finish(config, workdir, tokenizer, outcome)


def _finish(config, workdir, tokenizer, outcome):
  """Evaluates, samples and reports; the summary is written last of all."""
  numbers = _evaluate_params(
    config, workdir, tokenizer, outcome.params, outcome.evaluation
  )
  sample = generate_text(config, outcome.params, tokenizer)
  if jax.process_index() != 0:
    return
  num_tokens = config.train.num_steps * config.batch_tokens
  lines = metrics_lib.read_metrics(workdir / 'metrics.jsonl')
  summary = {
    'name': config.name,
    'steps': config.train.num_steps,
    'tokens': num_tokens,
    'num_parameters': parameters.count(models.make_model(config.model).table),
    'loss': [line['loss'] for line in lines if 'loss' in line][-1],
    **numbers,
    'tokens_per_second': num_tokens / outcome.train_seconds,
    'train_seconds': outcome.train_seconds,
    'compile_seconds': outcome.compile_seconds,
    'device': jax.devices()[0].device_kind,
    'num_devices': trainer.make_mesh(config).size,
    'num_processes': jax.process_count(),
    'dtype': config.model.dtype,
  }
  (workdir / report.SAMPLE).write_text(sample, encoding='utf-8')
  report.write_report(workdir, config, summary)
  _write_json(workdir / 'summary.json', summary)
  print(report.verdict(summary))


def _evaluate(config, workdir, tokenizer):
  params, step = restore_params(config, workdir, tokenizer.fingerprint)
  numbers = _evaluate_params(config, workdir, tokenizer, params)
  if jax.process_index() == 0:
    _write_json(workdir / 'evaluation.json', {'steps': step, **numbers})
    summary_path = workdir / 'summary.json'
    if summary_path.exists():  # without one, the run is not finished
      summary = json.loads(summary_path.read_text(encoding='utf-8')) | numbers
      report.write_report(workdir, config, summary)
      _write_json(summary_path, summary)
    print(report.verdict(numbers))


def _generate(config, workdir, tokenizer):
  params, _ = restore_params(config, workdir, tokenizer.fingerprint)
  text = generate_text(config, params, tokenizer)
  if jax.process_index() == 0:
    (workdir / report.SAMPLE).write_text(text, encoding='utf-8')
    print(text)


def _evaluate_params(config, workdir, tokenizer, params, writes_on=None):
  """Evaluates with writes on and off; leaves table and plot by position."""
  model = models.make_model(config.model)
  mesh = trainer.make_mesh(config)
  lengths = trainer.byte_lengths(config, tokenizer)

  def evaluate(write):
    with jax.set_mesh(mesh):
      return evaluation.make_evaluate(
        model, lengths, write=write, carry=config.carries_state
      )(params, trainer.validation_batches(config, mesh))

  writes_on = writes_on or evaluate(True)
  writes_off = evaluate(False)
  if jax.process_index() == 0:
    for path, write in (
      (report.POSITION_TABLE, evaluation.write_table),
      (report.POSITION_PLOT, evaluation.plot),
    ):
      write(workdir / path, writes_on, writes_off)
  late = slice(config.data.sequence_length // 2, None)
  gain = writes_off.totals.loss[late].sum() - writes_on.totals.loss[late].sum()
  num_late = max(writes_on.totals.num_tokens[late].sum(), 1)
  return {
    'bits_per_byte': writes_on.bits_per_byte,
    'bits_per_byte_writes_off': writes_off.bits_per_byte,
    'validation_loss': writes_on.loss,
    'validation_loss_writes_off': writes_off.loss,
    'validation_tokens': writes_on.num_tokens,
    # At positions in the second half of the longest context.
    'late_gain_bits_per_token': gain / num_late / math.log(2),
  }


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
  temporary = path.with_suffix('.tmp')  # whole, or not at all
  temporary.write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')
  temporary.replace(path)
