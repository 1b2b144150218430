"""Opens the checkpoint of a run for serving."""

import pathlib

import numpy as np

from nested_learning import errors
from nested_learning import inference
from nested_learning import models
from nested_learning import tasks
from nested_learning.serving import engine as engine_lib
from nested_learning.serving import requests as requests_lib
from nested_learning.serving import service as service_lib
from nested_learning.training import config as config_lib
from nested_learning.training import modes
from nested_learning.training import pretrained_runs
from nested_learning.training import text_workload


def open_checkpoint(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path, *, name: str
) -> requests_lib.Checkpoint:
  """Opens the last checkpoint of a run, or the model that it was imported from.

  Args:
    config: The experiment. Levels learn as its `inner` says, or as sessions
      from the command line do by default.
    workdir: The run's folder.
    name: Name of the model in the API.

  Returns:
    The checkpoint.

  Raises:
    errors.UserError: There is no checkpoint, it is not of a language model, or
      its levels cannot learn.
  """
  if not isinstance(config, config_lib.ExperimentConfig) or isinstance(
    config.data, tasks.TaskDataConfig
  ):
    raise errors.UserError(
      f'{workdir} is not the run of a language model, and only texts can be '
      'served; give the --workdir of one.'
    )
  tokenizer = text_workload.make_tokenizer(config)
  params, _ = modes.restore_params(config, workdir, tokenizer.fingerprint)
  session = inference.Session(
    models.make_model(config.model),
    params,
    config.inner if config.inner.levels else config.default_inner,
    tokenizer_fingerprint=tokenizer.fingerprint,
  )
  checkpoint = requests_lib.Checkpoint(
    name,
    session,
    tokenizer,
    stop_tokens=text_workload.stop_tokens(config, tokenizer),
  )
  base = None if config.base is None else pretrained_runs.open_base(config)
  if base is None or base.chat_template is None:
    return checkpoint
  return checkpoint._replace(render_chat=base.render_chat, chat_stops=())


def warm_up(service: service_lib.Service) -> None:
  """Compiles the programs that requests need, by requests of its own.

  These are the programs for pieces of every width and, for each number of
  requests at a time, those that draw and that read several texts.

  Raises:
    Exception: What such a request failed of.
  """
  size = service.checkpoint.session.segment_size
  for i in range(size.bit_length()):
    _draw_together(service, 1, size >> i, learn=False)
  num_rows = 1
  while num_rows <= service.limits.num_slots:
    # A whole segment, then most of one, which the answer completes.
    _draw_together(service, num_rows, 2 * size - 1, learn=True)
    num_rows *= 2


def _draw_together(
  service: service_lib.Service, num_rows: int, num_tokens: int, *, learn: bool
) -> None:
  """Works on jobs that draw until all of them have drawn together."""
  limits, engine = service.limits, service.engine
  num_drawn = min(num_rows + 1, limits.max_draw_tokens)
  num_tokens = min(num_tokens, limits.max_read_tokens)
  if engine.max_stream is not None:
    num_tokens = min(num_tokens, max(engine.max_stream - num_drawn, 1))
  job = engine_lib.Job(
    lambda: service.store.base.now,
    np.full(num_tokens, service.checkpoint.tokenizer.document_id),
    learn=learn,
    draw=engine_lib.Draw(num_drawn),
  )
  tickets = [engine.submit(job) for _ in range(num_rows)]
  while engine.step():
    pass
  for ticket in tickets:
    if ticket.error is not None:
      raise ticket.error
