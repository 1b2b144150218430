"""Adapter to EleutherAI's lm-evaluation-harness.

    lm = harness.make_lm(model, params, tokenizer, batch_size=8)
    lm_eval.simple_evaluate(lm, tasks=['wikitext'])

Only `import_package` and `make_lm` need the package lm_eval.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
import jax

from nested_learning import data as data_lib
from nested_learning import errors
from nested_learning import models
from nested_learning.evaluation import continuation
from nested_learning.evaluation import scoring

# Names of the limit in tasks, the one that counts first.
_MAX_TOKENS = (
  'max_gen_toks',
  'max_new_tokens',
  'max_tokens',
  'max_completion_tokens',
)


def import_package() -> Any:
  """Imports the package lm_eval.

  Raises:
    errors.UserError: If it is not installed.
  """
  try:
    import lm_eval
    import lm_eval.api.model
    import lm_eval.evaluator
    import lm_eval.tasks
  except ImportError as error:
    raise errors.UserError(
      f'lm-evaluation-harness cannot be imported ({error}). Install it with '
      '`pip install "nested-learning[lm-eval]"`, in a checkout with `make '
      'harness`.'
    ) from error
  return lm_eval


def parse_settings(
  settings: Mapping[str, Any],
) -> continuation.GenerateUntilConfig:
  """Reads the generation settings of a task of the harness.

  Args:
    settings: `until` (a string or several), `max_gen_toks` or another name of
      it, `do_sample`, `temperature`, `top_k`, `top_p`. Without `do_sample`, a
      temperature above 0 samples; with it and no temperature, that is 1.

  Returns:
    The config. Settings that are not known here are named in a warning.
  """
  known = {'until', 'do_sample', 'temperature', 'top_k', 'top_p', *_MAX_TOKENS}
  unknown = sorted(set(settings) - known)
  if unknown:
    logging.log_first_n(
      logging.WARNING, 'Settings %s of a task are ignored.', 1, unknown
    )
  until = settings.get('until') or ()
  given = [settings[k] for k in _MAX_TOKENS if settings.get(k) is not None]
  temperature = settings.get('temperature')
  do_sample = settings.get('do_sample')
  if do_sample is None:
    do_sample = bool(temperature)
  if temperature is None:
    temperature = 1.0
  top_k, top_p = settings.get('top_k'), settings.get('top_p')
  return continuation.GenerateUntilConfig(
    until=(until,) if isinstance(until, str) else tuple(filter(None, until)),
    max_tokens=int(given[0])
    if given
    else continuation.GenerateUntilConfig.max_tokens,
    temperature=float(temperature) if do_sample else 0.0,
    top_k=int(top_k) if top_k and top_k > 0 else None,
    top_p=1.0 if top_p is None else float(top_p),
  )


def make_lm(
  model: models.Model,
  params: Any,
  tokenizer: data_lib.Tokenizer,
  *,
  batch_size: int = 8,
  max_length: int | None = None,
  seed: int = 0,
  mesh: jax.sharding.Mesh | None = None,
  progress: bool = True,
) -> Any:
  """Makes an `lm_eval.api.model.LM`.

  Args:
    model: From `models.make_model`.
    params: Its parameters.
    tokenizer: The tokenizer that it was trained with.
    batch_size: Texts that are read together.
    max_length: Most tokens of one call, and of one stream for models that have
      a longest; None for model.max_length.
    seed: Seed of what is drawn where a task samples.
    mesh: Devices to spread the rows over, with the parameters on it; None for
      where the parameters are.
    progress: Whether to show progress bars.

  Returns:
    A model of the harness, which answers in the order of the requests.

  Raises:
    errors.UserError: If lm_eval is not installed, batch_size or max_length is
      out of range, or the model has fewer tokens than the tokenizer.
  """
  package = import_package()
  score = scoring.make_score(
    model,
    batch_size=batch_size,
    max_length=max_length,
    vocab_size=tokenizer.vocab_size,
    mesh=mesh,
  )
  generate = continuation.make_generate_until(
    model,
    tokenizer,
    batch_size=batch_size,
    max_length=max_length,
    seed=seed,
    mesh=mesh,
  )

  def score_pairs(pairs, description):
    requests = [scoring.encode_pair(tokenizer, *pair) for pair in pairs]
    return score(
      params, requests, description=description if progress else None
    )

  class HarnessModel(package.api.model.LM):
    """See `make_lm`."""

    @property
    def tokenizer_name(self) -> str:
      return tokenizer.fingerprint

    def loglikelihood(self, requests: Sequence[Any]):
      scores = score_pairs([r.args for r in requests], 'log-likelihood')
      return [(s.log_likelihood, s.is_greedy) for s in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any]):
      texts = [('', r.args[0]) for r in requests]
      return [s.log_likelihood for s in score_pairs(texts, 'texts')]

    def generate_until(self, requests: Sequence[Any]):
      groups = {}
      for i, request in enumerate(requests):
        config = parse_settings(request.args[1])
        groups.setdefault(config, []).append(i)
      texts = [''] * len(requests)
      for config, places in groups.items():
        generated = generate(
          params,
          [requests[i].args[0] for i in places],
          config,
          description='generation' if progress else None,
        )
        for i, text in zip(places, generated, strict=True):
          texts[i] = text
      return texts

  return HarnessModel()
