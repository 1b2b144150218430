"""Classes that come in tasks, one after the other: who still knows the first?

Texts of 150 classes come in ten tasks of fifteen classes. Every text is read
once or a few times. Questions do not name the task: all classes seen so far are
candidates. The arms:

* in context: a stream of examples, read by memories only;
* levels: the same with levels that learn from the stream, each example once (a
  few twice, to fill the last segment of a task). Levels learn to tell a class
  from the other classes of their segment (the objective 'in_segment');
* fine-tuning of all parameters on task after task: plain; with elastic weight
  consolidation (EWC); with replay of a few examples of each earlier class; on
  all tasks so far (joint, with as many steps per task); and among the classes
  of a batch, like the levels;
* the nearest class mean in tf-idf space, which forgets nothing and learns only
  means.

Command (class means need scikit-learn: pip install -c constraints.txt -e
'.[experiments]'):
  python launch/run.py --config=experiments/continual/classes.py \
    --workdir=runs/classes
  python launch/run.py --config=experiments/continual/classes.py:clinc150 \
    --set=path=FOLDER --workdir=runs/clinc

The default is a generated corpus. `:clinc150` and `:banking77` read the real
ones from a folder, in the files in which they are distributed.

Hardware: one CPU core, an hour (a third of it training).
Results: experiments/results/continual/README.md.
"""

import dataclasses
import pathlib

import numpy as np
import tqdm

from experiments import report_files
from experiments.continual import class_tasks
from experiments.continual import classifier
from experiments.continual import fine_tuning
from experiments.continual import intents
from experiments.continual import reading
from nested_learning import errors
from nested_learning import levels

_LEVELS = ('fast', 'slow')


@dataclasses.dataclass(frozen=True)
class ClassesConfig:
  """The corpus, its tasks, the learner and the arms of fine-tuning."""

  path: str | None = None  # folder of a corpus; None generates one
  num_classes: int = 150  # drawn at random if the corpus has more
  num_tasks: int = 10
  train_per_class: int = 30  # maximum number of examples
  test_per_class: int = 10
  num_seeds: int = 3  # of orders of classes and of parameters
  learner: reading.LearnerConfig = reading.LearnerConfig(
    embed_dim=512, mlp_dim=1024, num_steps=120, batch_size=1, learning_rate=1e-3
  )
  num_steps_alone: int = 1000  # of training the learner without levels
  learning_rate_alone: float = 3e-3
  inner: levels.InnerConfig = levels.make_inner(
    (256, 1024),
    learning_rate=1.5,
    clip_norm=None,
    objective='in_segment',
    max_drift=10.0,
  )
  num_words: int = 8192  # places that words are hashed to
  row: classifier.RowConfig = classifier.RowConfig()  # of training
  tuning: fine_tuning.TuningConfig = fine_tuning.TuningConfig()


def get_config(arg: str | None = None) -> ClassesConfig:
  """Returns the config; the argument names a corpus or a size."""
  config = ClassesConfig()
  full = {'train_per_class': 1000, 'test_per_class': 1000}
  if arg is None:
    return config
  if arg == 'full':
    return dataclasses.replace(config, train_per_class=100, test_per_class=30)
  if arg == 'clinc150':
    return dataclasses.replace(config, **full)
  if arg == 'banking77':
    return dataclasses.replace(config, num_classes=77, num_tasks=7, **full)
  if arg == 'small':
    return dataclasses.replace(
      config,
      num_classes=4,
      num_tasks=2,
      train_per_class=4,
      test_per_class=2,
      num_seeds=2,
      learner=reading.LearnerConfig(
        embed_dim=16, mlp_dim=16, num_steps=2, batch_size=2
      ),
      num_steps_alone=2,
      inner=levels.make_inner((32, 64), objective='in_segment', max_drift=10.0),
      num_words=64,
      row=classifier.RowConfig(num_tasks=2, classes=2, examples=3, review=2),
      tuning=fine_tuning.TuningConfig(epochs=1, batch_size=4),
    )
  raise errors.UserError(
    f"{arg!r} must be 'full', 'clinc150', 'banking77' or 'small', or nothing."
  )


def make_tasks(config: ClassesConfig) -> class_tasks.Tasks:
  """Reads or generates the corpus and cuts it into tasks."""
  if config.path is None:
    corpus = intents.generate_intents(
      0,
      num_classes=config.num_classes,
      num_train=config.train_per_class,
      num_test=config.test_per_class,
    )
  else:
    corpus = intents.read_intents(config.path)
  return class_tasks.make_tasks(
    corpus,
    num_classes=config.num_classes,
    num_tasks=config.num_tasks,
    num_words=config.num_words,
    num_seeds=config.num_seeds,
    train_per_class=config.train_per_class,
    test_per_class=config.test_per_class,
  )


def run(config: ClassesConfig, workdir: str, mode: str) -> None:
  """Runs every arm and writes the measures."""
  report_files.check_mode(mode)
  tasks = make_tasks(config)
  matrices = {'nearest class mean, tf-idf': _nearest_mean(config, tasks)}
  metrics, params = [], {}
  model = classifier.make_classifier(config.learner, tasks.words, _LEVELS)
  row = lambda rng: classifier.make_row(tasks.words, rng, config.row)
  alone = dataclasses.replace(
    config.learner,
    num_steps=config.num_steps_alone,
    learning_rate=config.learning_rate_alone,
  )
  for name, inner, learner in (
    ('in context', reading.only(config.inner, ()), alone),
    ('levels', config.inner, config.learner),
  ):
    params[name], losses = reading.train(model, inner, row, learner, name=name)
    metrics += [
      {'arm': name, 'step': i, 'loss': float(x)} for i, x in enumerate(losses)
    ]
    matrices[name] = _stream(config, tasks, model, inner, params[name], name)
  for name in fine_tuning.METHODS:
    start = params['in context']
    matrices[name] = fine_tuning.tune(config.tuning, tasks, model, start, name)
  _write(config, workdir, tasks, matrices, metrics)


def _stream(config, tasks, model, inner, params, name):
  """Returns scores [seed, 1 + task, task] of a stream, with a row per seed."""
  size = levels.segment_size(levels.make_levels(config.inner, _LEVELS))
  if size % classifier.EXAMPLE:
    raise errors.UserError(
      f'inner.levels, with update_every={config.inner.update_every}, cut '
      f'segments of {size} tokens, no multiple of the {classifier.EXAMPLE} of '
      'an example.'
    )
  learner = reading.make_reading(model, inner, segment_size=size)
  state = learner.start(params, config.num_seeds)
  questions = tasks.test.copy()
  questions[:, -1] = tasks.words.pad  # hides the class
  questions = np.repeat(questions[:, None], config.num_seeds, axis=1)

  def answer(allowed):  # each row has candidates of its own
    said = learner.ask(params, state, questions, allowed=allowed[:, None])
    return said.answers[..., -1].T

  scores = [tasks.score(answer, -1)]
  per_segment = size // classifier.EXAMPLE
  for task in tqdm.trange(config.num_tasks, desc=name):
    rng = np.random.default_rng((3, task))
    parts = [
      rng.permutation(tasks.part(seed, task))
      for seed in range(config.num_seeds)
    ]
    # Rows have equally many examples, in whole segments; some come twice.
    longest = max(map(len, parts))
    longest += -longest % per_segment
    rows = [np.resize(part, longest) for part in parts]
    tokens = np.stack([tasks.train[part].ravel() for part in rows])
    _, state = learner.read(params, state, tokens)
    scores.append(tasks.score(answer, task))
  reading.print_warnings(state, name)
  return np.stack(scores, axis=1)


def _nearest_mean(config, tasks):
  """Returns scores [seed, 1 + task, task] of the nearest class mean."""
  try:
    from sklearn.feature_extraction import text
  except ImportError as error:
    raise errors.UserError(
      'the nearest class mean needs scikit-learn, which is not installed: pip '
      "install -c constraints.txt -e '.[experiments]'."
    ) from error
  train_texts, test_texts = tasks.texts
  features = text.TfidfVectorizer(sublinear_tf=True, token_pattern=r"[\w']+")
  train = features.fit_transform(train_texts)
  labels = tasks.train[:, -1]
  means = np.stack(
    [
      np.asarray(train[np.flatnonzero(labels == c)].mean(axis=0))[0]
      for c in range(config.num_classes)
    ]
  )
  means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
  near = features.transform(test_texts) @ means.T
  scores = [np.zeros((config.num_seeds, config.num_tasks))]
  for task in range(config.num_tasks):
    # A class that has not come yet has no mean.
    known = tasks.task_of <= task
    answers = [np.argmax(np.where(row, near, -1), axis=1) for row in known]
    scores.append(tasks.score(lambda _, found=answers: np.stack(found), task))
  return np.stack(scores, axis=1)


def _write(config, workdir, tasks, matrices, metrics):
  rows, summary, curves = [], {}, {}
  for name, matrix in matrices.items():
    measures = [
      class_tasks.continual_scores(scores[1:], scores[0]) for scores in matrix
    ]
    row = [name]
    for field in class_tasks.ContinualScores._fields:
      values = np.array([getattr(m, field) for m in measures])
      row.append(report_files.mean_and_spread(100 * values))
      key = f'{report_files.key(name)}_{field}'
      summary |= report_files.summarize(key, values)
    rows.append(row)
    curves[name] = np.stack(
      [
        [np.mean(scores[1 + i, : i + 1]) for i in range(config.num_tasks)]
        for scores in matrix
      ]
    )
  reading.plot_lines(
    pathlib.Path(workdir) / 'classes.png',
    range(1, config.num_tasks + 1),
    curves,
    xlabel='tasks learned',
    ylabel='accuracy on all of them',
    log_x=False,
  )
  source = 'a generated corpus' if config.path is None else 'the corpus'
  report_files.write(
    workdir,
    config,
    module=__name__,
    summary=summary,
    metrics=metrics,
    sections=[
      '# Classes in tasks',
      f'{config.num_classes} classes of {source} in {config.num_tasks} tasks, '
      f'{len(tasks.train):,} texts to learn from and {len(tasks.test):,} to '
      f'answer; percent, mean and spread over {config.num_seeds} seeds.',
      report_files.table(
        ('arm', *class_tasks.ContinualScores._fields),
        sorted(rows, key=lambda r: -summary[f'{report_files.key(r[0])}_final']),
      ),
      '![Accuracy on the classes so far](classes.png)',
    ],
  )
