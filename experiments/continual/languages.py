"""Two new languages, one after the other: what is left of the first?

This is the paper's continual translation (Figure 8) at a small scale. A
language is made from a seed (`grammar.py`) and taught by sentences with a
gloss: every word is followed by its meaning in English. A learner, trained on
other languages, reads sentences of one language, or of two in turn, and then
glosses new sentences. With no level, it learns only in its memories; every
further level is slower than those before it.

Command (needs sacrebleu: pip install -c constraints.txt -e '.[experiments]'):
  python launch/run.py --config=experiments/continual/languages.py \
    --workdir=runs/languages

Hardware: one CPU core, half an hour.
Results: experiments/results/continual/README.md.
"""

import dataclasses
import pathlib

import numpy as np

from experiments import report_files
from experiments.continual import grammar
from experiments.continual import reading
from nested_learning import errors
from nested_learning import levels
from nested_learning import models

_LEVELS = ('fast', 'middle', 'slow')
# Lessons before the questions, as indices of the languages A and B.
_ORDERS = {'A': (0,), 'B': (1,), 'A then B': (0, 1), 'B then A': (1, 0)}


@dataclasses.dataclass(frozen=True)
class LanguagesConfig:
  """Learners, lessons and questions."""

  learner: reading.LearnerConfig = reading.LearnerConfig(
    mlp_dim=128,
    connection='nested',
    batch_size=4,
    learning_rate=6e-3,
  )
  inner: levels.InnerConfig = levels.make_inner((16, 64, 256))
  num_levels: tuple[int, ...] = (0, 1, 2, 3)  # levels that learn
  # Steps of training without levels, where a step takes a fraction of the time.
  num_steps_alone: int = 3000
  train_sentences: int = 32  # of each of two languages, in a row of training
  review_sentences: int = 8  # of the first one again, at the end of the row
  sentences: int = 1000  # of a language in a stream
  questions: int = 30  # of each language
  num_streams: int = 8  # each has its own two languages
  num_seeds: int = 3  # of parameters, rows of training and languages


def get_config(arg: str | None = None) -> LanguagesConfig:
  """Returns the config; 'full' trains longer, 'small' is for tests."""
  config = LanguagesConfig()
  if arg is None:
    return config
  if arg == 'full':
    learner = dataclasses.replace(
      config.learner, num_steps=6000, batch_size=32, embed_dim=128, mlp_dim=512
    )
    return dataclasses.replace(config, learner=learner, num_streams=32)
  if arg == 'small':
    learner = reading.LearnerConfig(
      embed_dim=16, mlp_dim=16, num_steps=2, batch_size=2
    )
    return dataclasses.replace(
      config,
      learner=learner,
      num_levels=(0, 1),
      num_steps_alone=2,
      train_sentences=2,
      review_sentences=1,
      sentences=2,
      questions=2,
      num_streams=1,
      num_seeds=1,
    )
  raise errors.UserError(f"{arg!r} must be 'full' or 'small', or nothing.")


def run(config: LanguagesConfig, workdir: str, mode: str) -> None:
  """Trains each learner, teaches it languages and scores its glosses."""
  report_files.check_mode(mode)
  chrf = make_chrf()
  model = models.make_model(
    reading.make_config(config.learner, grammar.VOCAB_SIZE, _LEVELS)
  )
  scores, metrics, samples = {}, [], []
  for number in config.num_levels:
    found = []
    for seed in range(config.num_seeds):
      name = f'{number} levels, seed {seed}'
      inner = reading.only(config.inner, range(number))
      params, losses = _train(config, model, inner, seed, name)
      metrics += [
        {'learner': name, 'step': i, 'loss': float(loss)}
        for i, loss in enumerate(losses)
      ]
      taught, sample = _teach(config, model, inner, params, seed, chrf)
      found.append(_summarise(taught))
      samples.append((name, *sample))
      print(f'{name}: {found[-1]}', flush=True)
    scores[number] = {
      key: np.array([one[key] for one in found]) for key in found[0]
    }
  _write(config, workdir, scores, metrics, samples)


def _train(config, model, inner, seed, name):
  learner = config.learner
  if not inner.is_on:
    learner = dataclasses.replace(learner, num_steps=config.num_steps_alone)
  return reading.train(
    model,
    inner,
    lambda rng: make_row(config, rng),
    learner,
    seed=seed,
    name=name,
  )


def make_chrf():
  """Returns `chrf(answers, references)` of two lists of texts, 0 to 100."""
  try:
    from sacrebleu import metrics
  except ImportError as error:
    raise errors.UserError(
      'chrF needs sacrebleu, which is not installed: pip '
      "install -c constraints.txt -e '.[experiments]'."
    ) from error
  metric = metrics.CHRF()
  return lambda answers, references: (
    metric.corpus_score(answers, [references]).score
  )


def make_row(
  config: LanguagesConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Returns sentences of one language, another and the first; and weights."""
  first, second = grammar.make_languages(rng, 2)
  tokens = np.stack(
    [
      grammar.sentence(language, meaning)
      for language, count in (
        (first, config.train_sentences),
        (second, config.train_sentences),
        (first, config.review_sentences),
      )
      for meaning in grammar.make_meanings(rng, count)
    ]
  )
  weights = 0.02 + grammar.is_english(tokens)
  # The review counts as much as everything before it.
  review = weights[-config.review_sentences :]
  review *= (weights.sum() - review.sum()) / review.sum()
  return tokens.ravel(), weights.ravel()


def translate(learner, params, state, languages, meanings) -> list:
  """Returns glosses of sentences in each stream's language, [stream][sentence].

  Words are predicted one after the other, each given the words before it.
  """
  tokens = np.array(
    [[grammar.sentence(lang, m) for lang in languages] for m in meanings]
  )
  is_asked = grammar.is_english(tokens)
  tokens[is_asked] = grammar.PAD
  allowed = grammar.is_english(np.arange(grammar.VOCAB_SIZE))
  for place in range(1, grammar.SENTENCE, 2):
    said = learner.ask(params, state, tokens, allowed=allowed).answers
    asked = is_asked[..., place]
    tokens[asked, place] = said[asked, place]
  return [
    [grammar.to_text(row) for row in tokens[:, stream]]
    for stream in range(len(languages))
  ]


def _teach(config, model, inner, params, seed, chrf):
  """Returns chrF [stream] of A and B after each order, and one example."""
  learner = reading.make_reading(model, inner, segment_size=grammar.SENTENCE)
  rng = np.random.default_rng((1, seed))
  num = config.num_streams
  pairs = [grammar.make_languages(rng, 2) for _ in range(num)]
  languages = list(zip(*pairs, strict=True))  # [A or B][stream]

  def lesson(language):
    meanings = grammar.make_meanings(rng, config.sentences)
    return np.concatenate([grammar.sentence(language, m) for m in meanings])

  lessons = [np.stack([lesson(one) for one in spoken]) for spoken in languages]
  asked = grammar.make_meanings(rng, config.questions)
  wanted = [
    [
      [grammar.to_text(grammar.sentence(language, m)) for m in asked]
      for language in spoken
    ]
    for spoken in languages
  ]
  scores, sample = {}, None
  for order, parts in {'nothing': (), **_ORDERS}.items():
    state = learner.start(params, num)
    for part in parts:
      _, state = learner.read(params, state, lessons[part])
    for i, name in enumerate('AB'):
      texts = translate(learner, params, state, languages[i], asked)
      scores[order, name] = np.array(
        [chrf(*both) for both in zip(texts, wanted[i], strict=True)]
      )
      if (order, name) == ('A then B', 'A'):
        sample = wanted[0][0][0], texts[0][0]
  return scores, sample


def _summarise(scores):
  """Averages chrF of a language taught alone, first or last, over orders."""
  alone = (scores['A', 'A'] + scores['B', 'B']) / 2
  first = (scores['A then B', 'A'] + scores['B then A', 'B']) / 2
  last = (scores['A then B', 'B'] + scores['B then A', 'A']) / 2
  floor = (scores['nothing', 'A'] + scores['nothing', 'B']) / 2
  found = {
    'floor': floor,
    'alone': alone,
    'taught_first': first,
    'taught_last': last,
  }
  return {name: float(np.mean(values)) for name, values in found.items()}


def _write(config, workdir, scores, metrics, samples):
  numbers, names = list(scores), list(scores[config.num_levels[0]])
  summary = {}
  for number, found in scores.items():
    for name, values in found.items():
      summary |= report_files.summarize(f'{name}_{number}_levels', values)
  reading.plot_lines(
    pathlib.Path(workdir) / 'languages.png',
    numbers,
    {
      name.replace('_', ' '): np.stack([scores[n][name] for n in numbers], 1)
      for name in ('floor', 'alone', 'taught_first', 'taught_last')
    },
    xlabel='levels that learn',
    ylabel='chrF',
    log_x=False,
  )
  rows = [
    (number, *(report_files.mean_and_spread(scores[number][n]) for n in names))
    for number in numbers
  ]
  report_files.write(
    workdir,
    config,
    module=__name__,
    summary=summary,
    metrics=metrics,
    sections=[
      '# Two languages in turn',
      f'chrF of the glosses of {config.questions} new sentences after '
      f'{config.sentences} sentences of a language, mean and spread over '
      f'{config.num_seeds} seeds, each of {config.num_streams} pairs of '
      'languages in both orders.',
      report_files.table(
        ('levels', *(n.replace('_', ' ') for n in names)), rows
      ),
      '![chrF by the number of levels](languages.png)',
      '## A gloss of the first language after the second',
      report_files.table(('learner', 'reference', 'answer'), samples),
    ],
  )
