"""Two new languages, one after the other: what is left of the first?

The paper's continual translation of a new language, in small. A language is
made from a seed (`grammar.py`), and is taught by pairs of a sentence and what
it means in English. A learner, trained on pairs of other languages, reads those
of one language, or of two in turn, and then translates sentences that it has
not seen. With no level, all that it learns is in its memories; every further
level is slower than those before it.

Command (needs sacrebleu: pip install -c constraints.txt -e '.[experiments]'):
  python launch/run.py --config=experiments/continual/languages.py \
    --workdir=runs/languages

Result: not run to its end yet with these settings.
"""

import dataclasses
import pathlib

import numpy as np

from experiments import report_files
from experiments.continual import grammar
from experiments.continual import reading
from nested_learning import errors
from nested_learning import levels

_LEVELS = ('fast', 'middle', 'slow')
# What is read before what is asked, by the order of two languages A and B.
_ORDERS = {'A': (0,), 'B': (1,), 'A then B': (0, 1), 'B then A': (1, 0)}


@dataclasses.dataclass(frozen=True)
class LanguagesConfig:
  """Learners, how much they are taught, and what they are asked."""

  learner: reading.LearnerConfig = reading.LearnerConfig(
    num_layers=2,
    embed_dim=48,
    num_heads=2,
    connection='nested',
    learning_rate=6e-3,
  )
  inner: levels.InnerConfig = levels.InnerConfig(
    (grammar.PAIR, 4 * grammar.PAIR, 16 * grammar.PAIR), (1.0,)
  )
  num_levels: tuple[int, ...] = (0, 1, 2, 3)  # that learn, fastest first
  train_pairs: int = 24  # of each of two languages in a row of training
  review_pairs: int = 6  # of the first one again, at the row's end
  pairs: int = 160  # of a language, in the order in which they are taught
  questions: int = 30  # of each language
  num_streams: int = 8  # each with two languages of its own
  seed: int = 0  # of parameters and of rows of training


def get_config(arg: str | None = None) -> LanguagesConfig:
  """The experiment; 'full' trains for longer, 'small' is for tests."""
  config = LanguagesConfig()
  if arg is None:
    return config
  if arg == 'full':
    learner = dataclasses.replace(
      config.learner, num_steps=6000, batch_size=32, embed_dim=128, mlp_dim=256
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
      train_pairs=2,
      review_pairs=1,
      pairs=2,
      questions=2,
      num_streams=1,
    )
  raise errors.UserError(f"{arg!r} must be 'full' or 'small', or nothing.")


def run(config: LanguagesConfig, workdir: str, mode: str) -> None:
  """Trains each learner, teaches it, has it translate; writes what it made."""
  report_files.check_mode(mode)
  chrf = make_chrf()
  model = reading.make_model(config.learner, grammar.VOCAB_SIZE, _LEVELS)
  scores, metrics, samples = {}, [], []
  for number in config.num_levels:
    name = f'{number} levels'
    inner = reading.only(config.inner, range(number))
    params, losses = reading.train(
      model,
      inner,
      lambda rng: make_row(config, rng),
      config.learner,
      seed=config.seed,
      name=name,
    )
    metrics += [
      {'learner': name, 'step': i, 'loss': float(loss)}
      for i, loss in enumerate(losses)
    ]
    scores[number], sample = _teach(config, model, inner, params, chrf)
    samples.append((name, *sample))
    print(f'{name}: {_means(scores[number])}', flush=True)
  _write(config, workdir, scores, metrics, samples)


def make_chrf():
  """`chrf(answers, references)`, two lists of texts, from 0 to 100."""
  try:
    from sacrebleu import metrics
  except ImportError as error:
    raise errors.UserError(
      'translations are judged by sacrebleu, which is not installed: pip '
      "install -c constraints.txt -e '.[experiments]'."
    ) from error
  metric = metrics.CHRF()
  return lambda answers, references: (
    metric.corpus_score(answers, [references]).score
  )


def make_row(
  config: LanguagesConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Pairs of one language, of another and of the first; and their weights."""
  pairs = []
  first, second = (grammar.make_language(rng) for _ in range(2))
  for language, count in (
    (first, config.train_pairs),
    (second, config.train_pairs),
    (first, config.review_pairs),
  ):
    meanings = grammar.make_meanings(rng, count)
    pairs += [grammar.pair(language, meaning) for meaning in meanings]
  tokens = np.stack([tokens for tokens, _ in pairs])
  starts = np.array([start for _, start in pairs])
  places = np.arange(grammar.PAIR)
  weights = (places >= starts[:, None]) & (tokens != grammar.PAD)
  weights = 0.02 + weights.astype(np.float32)
  weights[-config.review_pairs :] *= config.train_pairs / config.review_pairs
  return tokens.ravel(), weights.ravel()


def translate(config, learner, params, state, languages, meanings) -> list:
  """English of each sentence in each stream's language, [stream][sentence]."""
  pairs = [[grammar.pair(lang, m) for lang in languages] for m in meanings]
  tokens = np.array([[t for t, _ in row] for row in pairs])
  starts = np.array([[start for _, start in row] for row in pairs])
  places = np.arange(grammar.PAIR)
  tokens[places >= starts[..., None]] = grammar.PAD
  size = learner.segment_size
  tokens = np.pad(tokens, ((0, 0), (0, 0), (0, size - grammar.PAIR)))
  is_english = grammar.is_english(np.arange(grammar.VOCAB_SIZE))
  for i in range(grammar.MAX_ENGLISH):
    said = learner.ask(params, state, tokens, allowed=is_english)
    place = starts[..., None] + i
    word = np.take_along_axis(said.answers, place, axis=-1)
    np.put_along_axis(tokens, place, word, axis=-1)
  texts = [
    [
      grammar.to_text(tokens[i, row, starts[i, row] :][: grammar.MAX_ENGLISH])
      for i in range(len(meanings))
    ]
    for row in range(len(languages))
  ]
  return texts


def _teach(config, model, inner, params, chrf):
  """chrF [stream] of A and of B after each order, and one translation."""
  learner = reading.make_reading(model, inner, segment_size=grammar.PAIR)
  rng = np.random.default_rng(1)
  num = config.num_streams
  languages = [[grammar.make_language(rng) for _ in range(num)] for _ in 'AB']
  lessons = []
  for spoken in languages:
    lesson = [
      np.concatenate(
        [
          grammar.pair(language, meaning)[0]
          for meaning in grammar.make_meanings(rng, config.pairs)
        ]
      )
      for language in spoken
    ]
    lessons.append(np.stack(lesson))
  asked = grammar.make_meanings(rng, config.questions)
  wanted = [grammar.to_text(grammar.to_english(m)) for m in asked]
  scores, sample = {}, None
  for order, parts in {'nothing': (), **_ORDERS}.items():
    state = learner.start(params, num)
    for part in parts:
      _, state = learner.read(params, state, lessons[part])
    for name, spoken in zip('AB', languages, strict=True):
      texts = translate(config, learner, params, state, spoken, asked)
      scores[order, name] = np.array([chrf(text, wanted) for text in texts])
      if (order, name) == ('A', 'A'):
        sample = wanted[0], texts[0][0]
  return scores, sample


def _means(scores):
  return ', '.join(
    f'{name} after {order} {np.mean(values):.1f}'
    for (order, name), values in scores.items()
    if order == 'nothing' or name in order
  )


def _summarise(scores):
  """chrF of a language taught last, first and alone, and what was kept."""
  alone = (scores['A', 'A'] + scores['B', 'B']) / 2
  first = (scores['A then B', 'A'] + scores['B then A', 'B']) / 2
  last = (scores['A then B', 'B'] + scores['B then A', 'A']) / 2
  floor = (scores['nothing', 'A'] + scores['nothing', 'B']) / 2
  return {
    'floor': floor,
    'alone': alone,
    'taught_first': first,
    'taught_last': last,
    'kept': first / np.maximum(alone, 1e-9),
  }


def _write(config, workdir, scores, metrics, samples):
  found = {number: _summarise(values) for number, values in scores.items()}
  summary = {
    f'{name}_{number}_levels': float(np.mean(values))
    for number, row in found.items()
    for name, values in row.items()
  }
  numbers = list(found)
  reading.plot_lines(
    pathlib.Path(workdir) / 'languages.png',
    numbers,
    {
      name.replace('_', ' '): np.stack([found[n][name] for n in numbers], 1)
      for name in ('floor', 'alone', 'taught_first', 'taught_last')
    },
    xlabel='levels that learn',
    ylabel='chrF',
    log_x=False,
  )
  names = list(found[numbers[0]])
  rows = [
    (number, *(reading.mean_and_spread(found[number][n]) for n in names))
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
      f'chrF of {config.questions} new sentences after {config.pairs} pairs, '
      f'mean and spread over {config.num_streams} pairs of languages, in both '
      'orders. Kept is the language taught first over the same one alone.',
      report_files.table(
        ('levels', *(n.replace('_', ' ') for n in names)), rows
      ),
      '![chrF by the number of levels](languages.png)',
      '## What they say after one language',
      report_files.table(('learner', 'wanted', 'said'), samples),
    ],
  )
