"""A session from the command line: reads files, answers a prompt."""

import math
import pathlib
from typing import Any

import jax
import numpy as np
import tqdm

from nested_learning import data as data_lib
from nested_learning import errors
from nested_learning import inference
from nested_learning import levels
from nested_learning import models
from nested_learning.data import sources
from nested_learning.inference import session_files
from nested_learning.training import config as config_lib
from nested_learning.training import text_workload

_SEGMENTS = 4  # read between two moves of the progress bar


def run_session(config: config_lib.ExperimentConfig, params: Any) -> None:
  """Opens a session or begins one, feeds it, prompts it, and saves it.

  The file is replaced as a whole after every text that was read; the checkpoint
  does not change. The file is locked meanwhile, so that two of these commands
  on one session cannot lose what the other learned.

  Args:
    config: The experiment; `session` says what to do, `inner` how levels learn
      (default: `config.default_inner`).
    params: The parameters of its checkpoint.

  Raises:
    errors.UserError: If a file cannot be read, the session is in use, or it
      belongs to another checkpoint; then nothing was fed.
  """
  settings = config.session
  if settings.path is None:
    raise errors.UserError(
      '--mode=session needs a file that keeps what is learned: '
      '--session=runs/NAME.session.'
    )
  if not settings.feed and settings.prompt is None:
    raise errors.UserError(
      'nothing to read; give --feed=FILE, --prompt=TEXT, or both.'
    )
  tokenizer = text_workload.make_tokenizer(config)
  texts = [(path, _read(path)) for path in settings.feed]
  with session_files.lock(settings.path):
    _run(config, params, tokenizer, texts)


def _run(config, params, tokenizer, texts):
  settings, frozen, sizes = config.session, None, {}
  session = _open(config, params, tokenizer)
  is_guarded = settings.guard is not None and config.base is not None
  if is_guarded and session.inner.is_on:
    model = models.make_model(config.model)
    frozen = inference.FrozenReader(model, params)
  begun = 'Going on after' if session.clock[0] else 'Beginning after'
  print(f'{begun} {session.clock[0]:,} tokens: {settings.path}')
  for path, text in texts:
    try:
      said = _feed(session, tokenizer, text, path, frozen, settings.guard)
    except errors.UserError:  # of the guard: what was good is kept
      session.save(settings.path, lock=False)
      raise
    print(f'{path}: {said}')
    sizes = session.save(settings.path, lock=False)
  if settings.prompt is not None:
    prompt = text_workload.encode_document(config, tokenizer, settings.prompt)
    answer = _answer(session, config, tokenizer, prompt)
    print(text_workload.join_answer(config.generate, settings.prompt, answer))
    session.feed(prompt, reset=_starts(prompt))
    sizes = session.save(settings.path, lock=False)
  shown = (f'{name} {size / 1e6:,.1f} MB' for name, size in sizes.items())
  print(f'{settings.path}: {", ".join(shown)}')
  for name, level in session.health().items():
    print(
      f'level {name}: {int(level.num_updates[0]):,} updates, '
      f'{float(level.drift[0]):.2%} from its start'
    )
  for warning in levels.health_warnings(session.health()):
    print(f'WARNING: {warning}')


def _open(config, params, tokenizer) -> inference.Session:
  model = models.make_model(config.model)
  path, given = config.session.path, config.inner
  names = {'tokenizer_fingerprint': tokenizer.fingerprint}
  if not session_files.resolve(path).exists():
    inner = given if given.levels else config.default_inner
    return inference.Session(model, params, inner, **names)
  session = inference.Session.load(path, model, params, **names)
  if given.levels and session.inner != given:
    raise errors.UserError(
      f'the session {path} was begun with {session.inner}, and this config has '
      f'{given}; leave out inner, or begin another --session.'
    )
  if session.num_rows > 1:
    raise errors.UserError(
      f'the session {path} has {session.num_rows} rows; the command line feeds '
      'one, see `Session.split`.'
    )
  return session


def _read(path: str) -> str:
  """Reads a text as training does, line endings included."""
  try:
    text = sources.read_text(pathlib.Path(path))
  except ValueError as error:  # UserError, or NUL in the path
    reason = getattr(error.__cause__, 'strerror', None)
    raise errors.UserError(
      f'--feed={path!r} cannot be read ({reason or "it is not UTF-8 text"}); '
      'nothing was fed.'
    ) from error
  if not text:
    raise errors.UserError(f'--feed={path} is empty; nothing was fed.')
  return text


def _document(tokenizer: data_lib.Tokenizer, text: str) -> np.ndarray:
  return np.concatenate([[tokenizer.document_id], tokenizer.encode(text)])


def _starts(tokens: np.ndarray) -> np.ndarray:
  return np.arange(len(tokens)) == 0


def _feed(session, tokenizer, text, name, frozen, tolerance) -> str:
  """Reads a text as a document; returns how well it was predicted.

  With a reader of the frozen model, the session returns to where it was not
  worse, and an error is raised, when learning makes it so.
  """
  tokens = _document(tokenizer, text)
  reset, losses, others = _starts(tokens), [], []
  guard = None if frozen is None else inference.Guard(tolerance)
  session.mark()
  step = _SEGMENTS * session.segment_size
  first = step - int(session.clock[0]) % step  # so that calls end at borders
  cuts = range(first, len(tokens), step)
  with tqdm.tqdm(total=len(tokens), desc=name, unit='token') as bar:
    for place in np.split(np.arange(len(tokens)), cuts):
      found = session.feed(tokens[place], reset=reset[place])
      losses.append(found[0])
      if guard is not None:
        others.append(frozen.losses(tokens[place], reset[place]))
        guard.add(losses[-1], others[-1])
        if guard.excess > guard.tolerance:
          session.rollback()
        guard.check(name)
        if guard.excess <= 0:
          session.mark()
      bar.update(len(place))
      bar.set_postfix_str(f'loss {np.nanmean(found):.3f}')

  def per_byte(losses):
    bits = np.nansum(np.concatenate(losses), dtype=np.float64) / math.log(2)
    return f'{bits / len(text.encode()):.3f}'

  without = f' ({per_byte(others)} without learning)' if others else ''
  return (
    f'{len(tokens):,} tokens, {per_byte(losses)} bits per byte while it was '
    f'read{without}'
  )


def _answer(session, config, tokenizer, prompt) -> str:
  settings = config.generate
  generated = session.generate(
    settings.num_tokens,
    prompt=prompt,
    reset=_starts(prompt),
    key=jax.random.key(settings.seed),
    temperature=settings.temperature,
    top_k=settings.top_k,
    top_p=settings.top_p,
    stop_token=text_workload.stop_tokens(config, tokenizer),
    vocab_size=tokenizer.vocab_size,
  )
  tokens = np.asarray(generated.tokens)[0, : int(generated.lengths[0])]
  return tokenizer.decode_after(prompt, tokens)
