"""A model of ours as a model of EleutherAI's lm-evaluation-harness.

    lm = harness.make_lm(model, params, tokenizer, batch_size=8)
    lm_eval.simple_evaluate(lm, tasks=['wikitext'])

This is the one module that needs the package lm_eval. What the numbers mean is
in `scoring` and `continuation`.
"""

from collections.abc import Sequence
from typing import Any

from nested_learning import data as data_lib
from nested_learning import errors
from nested_learning import models
from nested_learning.evaluation import continuation
from nested_learning.evaluation import requests as requests_lib
from nested_learning.evaluation import scoring


def import_package() -> Any:
  """The package lm_eval.

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


def make_lm(
  model: models.Model,
  params: Any,
  tokenizer: data_lib.Tokenizer,
  *,
  batch_size: int = 8,
  max_length: int | None = None,
  seed: int = 0,
  mesh: Any = None,
  progress: bool = True,
) -> Any:
  """Makes an `lm_eval.api.model.LM`.

  Args:
    model: From `models.make_model`.
    params: Its parameters.
    tokenizer: The one that it was trained with.
    batch_size: Texts that are read together.
    max_length: Tokens of one call; the longest stream of a model that has a
      longest. None for model.max_length.
    seed: Of what is drawn where a task samples.
    mesh: Devices to spread the rows over, with the parameters on it; None for
      where the parameters are.
    progress: Whether to show progress bars.

  Returns:
    The harness' model. It answers in the order of the requests.

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
  write = continuation.make_write(
    model,
    tokenizer,
    batch_size=batch_size,
    max_length=max_length,
    seed=seed,
    mesh=mesh,
  )

  def score_pairs(pairs, description):
    requests = [requests_lib.encode_pair(tokenizer, *pair) for pair in pairs]
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
      return [tuple(score) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any]):
      texts = [('', r.args[0]) for r in requests]
      return [s.log_likelihood for s in score_pairs(texts, 'texts')]

    def generate_until(self, requests: Sequence[Any]):
      groups = {}
      for i, request in enumerate(requests):
        config = continuation.parse_settings(request.args[1])
        groups.setdefault(config, []).append(i)
      texts = [''] * len(requests)
      for config, places in groups.items():
        written = write(
          params,
          [requests[i].args[0] for i in places],
          config,
          description='generation' if progress else None,
        )
        for i, text in zip(places, written, strict=True):
          texts[i] = text
      return texts

  return HarnessModel()
