"""The workload of a text: bits per byte of rows, and of long streams."""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import data as data_lib
from nested_learning import errors
from nested_learning import evaluation
from nested_learning import inference
from nested_learning import levels
from nested_learning import models
from nested_learning.training import config as config_lib
from nested_learning.training import pretrained_runs
from nested_learning.training import workload as workload_lib

_POSITION_PLOT = 'loss_by_position.png'
_POSITION_TABLE = 'loss_by_position.csv'
_BY_POSITION = f"""## Loss by position in the context

Mean loss by the number of tokens of the document before. With writes off the \
memories keep their learned initial values, so the difference is the gain from \
writing.

![Loss by position, writes on and off]({_POSITION_PLOT})

The numbers are in [{_POSITION_TABLE}]({_POSITION_TABLE})."""

_STREAM_PLOT = 'stream.png'
_STREAM_TABLE = 'stream.csv'
_BY_STREAM = f"""## Streams

Held-out text end to end, with the state carried from its first token to its \
last: nothing written, memories written, and memories written while levels \
learn.

![Bits per byte by position in the stream]({_STREAM_PLOT})

The numbers are in [{_STREAM_TABLE}]({_STREAM_TABLE})."""
# Labels of the curves, by the end of their names in the summary.
_CURVES = {
  '_writes_off': 'nothing written',
  '': 'memories',
  '_levels_learning': 'memories and levels',
}


token_loss = evaluation.cross_entropy


def make_workload(
  config: config_lib.ExperimentConfig,
) -> workload_lib.Workload:
  """Makes the workload of an experiment on text; see `make_workload.py`."""
  tokenizer = make_tokenizer(config)
  encode_prompt(config, tokenizer)  # refuses a long one before training
  model = models.make_model(config.model, config.inner)
  for warning in _clock_warnings(config):
    logging.warning('%s', warning)
  lengths = byte_lengths(config, tokenizer)

  @functools.cache  # rows and streams share their programs
  def make_reading(inner, write):
    made = models.make_model(config.model, inner if inner.is_on else None)
    return evaluation.make_reading(made, lengths, write=write)

  def make_evaluate(write):
    reading = make_reading(config.inner, write)
    return evaluation.make_evaluate(reading, carry=config.carries_state)

  def summarize(params, mesh, evaluated):
    if not config.has_validation:
      return workload_lib.Summary({})
    batches = lambda: workload_lib.validation_batches(
      workload, config.evaluation.num_batches, mesh
    )
    with jax.set_mesh(mesh):
      writes_on = evaluated or workload.evaluate(params, batches())
      _check_finite(writes_on, 'writes on')
      writes_off = make_evaluate(False)(params, batches())
      _check_finite(writes_off, 'writes off')
      curves = _read_streams(config, workload, make_reading, params, mesh)

    def write_files(workdir):
      for path, write in (
        (_POSITION_TABLE, evaluation.write_by_position),
        (_POSITION_PLOT, evaluation.plot_by_position),
      ):
        write(workdir / path, writes_on, writes_off)
      if curves:
        evaluation.write_curves(
          workdir / _STREAM_TABLE,
          {f'bits_per_byte{name}': x for name, x in curves.items()},
        )
        evaluation.plot_curves(
          workdir / _STREAM_PLOT,
          {_CURVES[name]: x for name, x in curves.items()},
        )

    numbers = _summarize(writes_on, writes_off) | _summarize_streams(curves)
    return workload_lib.Summary(numbers, write_files)

  def sample(params, mesh):
    with jax.set_mesh(mesh):
      return generate_text(config, params, tokenizer)

  workload = workload_lib.Workload(
    model=model,
    fingerprint=tokenizer.fingerprint,
    row=make_row(config),
    token_loss=token_loss,
    make_batches=functools.partial(_make_batches, config.data),
    evaluate=make_evaluate(True),
    summarize=summarize,
    sample=sample,
    verdict=verdict,
    sections=_sections,
    watched=('bits_per_byte', 'bits per byte'),
  )
  return workload


def make_row(config: config_lib.ExperimentConfig) -> workload_lib.RowSpec:
  """Returns shape and dtype of a row of each array of a batch."""
  shape = (config.data.sequence_length,)
  return {
    'tokens': (shape, np.int32),
    'targets': (shape, np.int32),
    'mask': (shape, np.bool_),
    'reset': (shape, np.bool_),
  }


def make_tokenizer(config: config_lib.ExperimentConfig) -> data_lib.Tokenizer:
  """Makes the tokenizer of an experiment.

  Raises:
    errors.UserError: It has more tokens than the model.
  """
  tokenizer = data_lib.make_tokenizer(config.data.tokenizer)
  if tokenizer.vocab_size > config.model.vocab_size:
    raise errors.UserError(
      f'data.tokenizer={config.data.tokenizer!r} has {tokenizer.vocab_size} '
      f'tokens, more than model.vocab_size={config.model.vocab_size}; set '
      f'model.vocab_size to at least {tokenizer.vocab_size}.'
    )
  return tokenizer


def byte_lengths(
  config: config_lib.ExperimentConfig, tokenizer: data_lib.Tokenizer
) -> np.ndarray:
  """Returns the bytes of each token of the model, int32 [v]; 0 if unused."""
  unused = config.model.vocab_size - tokenizer.vocab_size
  return np.pad(tokenizer.byte_lengths, (0, unused))


def encode_prompt(
  config: config_lib.ExperimentConfig, tokenizer: data_lib.Tokenizer
) -> np.ndarray:
  """Encodes the prompt as the start of a document, int32 [1, t]."""
  tokens = encode_document(config, tokenizer, config.generate.prompt)
  inference.check_length(config.model, len(tokens), config.generate.num_tokens)
  return tokens[None]


def encode_document(
  config: config_lib.ExperimentConfig,
  tokenizer: data_lib.Tokenizer,
  prompt: str,
) -> np.ndarray:
  """Encodes a prompt as the start of a document, or as a message.

  Args:
    config: The experiment; `generate.template` says which.
    tokenizer: Its tokenizer.
    prompt: The text.

  Returns:
    int32 [t].

  Raises:
    errors.UserError: The run has no chat template.
  """
  if config.generate.template == 'none':
    text = tokenizer.encode(prompt)
    return np.concatenate([[tokenizer.document_id], text]).astype(np.int32)
  if config.base is None:
    raise errors.UserError(
      "generate.template='chat' needs the chat template of a pretrained model "
      '(base=None); set it to none.'
    )
  message = {'role': 'user', 'content': prompt}
  text = pretrained_runs.open_base(config).render_chat([message])
  return tokenizer.encode_marked(text)


def stop_tokens(
  config: config_lib.ExperimentConfig, tokenizer: data_lib.Tokenizer
) -> tuple[int, ...]:
  """Returns the tokens that end a text.

  Raises:
    errors.UserError: The tokenizer has no special token of a name in
      generate.stop.
  """
  for name in config.generate.stop:
    if name not in tokenizer.special:
      known = ', '.join(list(tokenizer.special)[:5]) or 'none'
      raise errors.UserError(
        f'generate.stop has {name!r}, which is no special token of '
        f'data.tokenizer={config.data.tokenizer!r}; it has {known}.'
      )
  named = (tokenizer.special[name] for name in config.generate.stop)
  return tokenizer.document_id, *named


def generate_text(
  config: config_lib.ExperimentConfig,
  params: Any,
  tokenizer: data_lib.Tokenizer,
) -> str:
  """Returns the prompt and a continuation by the model."""
  settings = config.generate
  generate = inference.make_generate(
    models.make_model(config.model, config.inner),
    num_tokens=settings.num_tokens,
    temperature=settings.temperature,
    top_k=settings.top_k,
    top_p=settings.top_p,
    stop_token=stop_tokens(config, tokenizer),
    vocab_size=tokenizer.vocab_size,
  )
  prompt = encode_prompt(config, tokenizer)
  generated = generate(
    params, jnp.asarray(prompt), jax.random.key(settings.seed)
  )
  tokens = np.asarray(generated.tokens)[0, : int(generated.lengths[0])]
  answer = tokenizer.decode_after(prompt[0], tokens)
  return join_answer(settings, settings.prompt, answer)


def join_answer(
  settings: inference.GenerateConfig, prompt: str, answer: str
) -> str:
  """Joins a prompt and its continuation, or a message and its answer."""
  return prompt + ('' if settings.template == 'none' else '\n') + answer


def verdict(summary: Mapping[str, Any]) -> str:
  """Returns sentences on what writes and levels that learn gain.

  The first is on streams, if any were read, and the last on rows.
  """
  if 'bits_per_byte' not in summary:
    return 'Not evaluated: data.validation_fraction=0 holds no text out.'
  on, off = summary['bits_per_byte'], summary['bits_per_byte_writes_off']
  if on == off:
    rows = (
      f'{on:.4f} bits per byte of validation text. Writes on or off makes no '
      'difference: this model writes no memory.'
    )
  else:
    better = 'better' if on < off else 'WORSE'
    rows = (
      f'{on:.4f} bits per byte of validation text with memory writes on, '
      f'{off:.4f} with writes off: writing is {abs(off - on):.4f} bits per '
      f'byte ({abs(off - on) / off:.1%}) {better}.'
    )
  if 'stream_tokens' not in summary:
    return rows
  numbers = [
    f'{summary[key]:.3f} with {what}'
    for key, what in (
      ('stream_bits_per_byte_writes_off', 'writes off'),
      ('stream_bits_per_byte', 'memory writes'),
      ('stream_bits_per_byte_levels_learning', 'levels learning as well'),
    )
    if key in summary
  ]
  return (
    f'Bits per byte on streams of {summary["stream_tokens"]:,} tokens of '
    f'validation text: {", ".join(numbers)}.\n{rows}'
  )


def _clock_warnings(config: config_lib.ExperimentConfig) -> list[str]:
  length = config.data.sequence_length
  trained = {
    'document': length,
    'stream': config.data.stream_tokens,
    'never': config.train.num_steps * length,
  }
  found = levels.clock_warnings(config.inner, trained[config.data.reset])
  if config.stream_tokens:
    found += levels.clock_warnings(
      config.evaluation.inner, config.stream_tokens, field='evaluation.inner'
    )
  return found


def _sections(summary: Mapping[str, Any]) -> list[str]:
  sections = [_BY_STREAM] if 'stream_tokens' in summary else []
  return sections + ([_BY_POSITION] if 'bits_per_byte' in summary else [])


def _read_streams(
  config, workload, make_reading, params, mesh
) -> dict[str, evaluation.Evaluation]:
  """Reads the same streams in every way; returns the curves by name."""
  num_tokens, inner = config.stream_tokens, config.stream_inner
  if not num_tokens:
    return {}
  rest = config.inner if not config.inner.is_on else levels.InnerConfig()
  readings = {
    '_writes_off': make_reading(rest, False),
    '': make_reading(rest, True),
  }
  length = config.data.sequence_length
  if inner.is_on:
    reading = readings['_levels_learning'] = make_reading(inner, True)
    size = reading.model.reader.segment_size
    length = max(length // size, 1) * size
  data = dataclasses.replace(config.data, reset='never', sequence_length=length)
  source = workload._replace(
    make_batches=functools.partial(_make_batches, data)
  )
  curves = {}
  for name, reading in readings.items():
    batches = workload_lib.validation_batches(
      source, -(-num_tokens // length), mesh
    )
    evaluate = evaluation.make_evaluate_streams(reading)
    curves[name] = evaluate(params, batches)
    _check_finite(curves[name], f'{_CURVES[name]} on a stream')
  return curves


def _summarize_streams(
  curves: Mapping[str, evaluation.Evaluation],
) -> dict[str, float]:
  if not curves:
    return {}
  return {
    'stream_tokens': int((curves[''].totals.num_tokens > 0).sum()),
    **{
      f'stream_bits_per_byte{name}': curve.bits_per_byte
      for name, curve in curves.items()
    },
  }


def _make_batches(data, split, *, process_index, process_count):
  return data_lib.make_iterator(
    data, split=split, process_index=process_index, process_count=process_count
  )


def _check_finite(evaluated: evaluation.Evaluation, how: str) -> None:
  if not math.isfinite(evaluated.loss):  # which no plot can show
    raise FloatingPointError(
      f'the validation loss with {how} is {evaluated.loss}'
    )


def _summarize(
  writes_on: evaluation.Evaluation, writes_off: evaluation.Evaluation
) -> dict[str, float]:
  late = slice(len(writes_on.totals.loss) // 2, None)
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
