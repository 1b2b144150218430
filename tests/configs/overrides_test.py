"""Tests of typed changes to single fields."""

import dataclasses
from typing import ClassVar, Literal

from absl.testing import parameterized

from nested_learning import configs
from nested_learning import errors


@dataclasses.dataclass(frozen=True)
class Attention:
  num_heads: int = 4
  window: int | None = None


@dataclasses.dataclass(frozen=True)
class Titans:
  chunk_size: int = 64


@dataclasses.dataclass(frozen=True)
class Rated:
  NAME: ClassVar = 'rated_mixer'

  rate: float


@dataclasses.dataclass(frozen=True)
class Level:
  name: str
  chunk_size: int = 16

  RENAMED: ClassVar = {'period': 'chunk_size'}


@dataclasses.dataclass(frozen=True)
class Inner:
  every: int | None = None
  rate: float = 1.0

  SHORT: ClassVar = 'every'

  def __post_init__(self):
    errors.check_field(self, 'every', self.every != 1, 'at least 2')


@dataclasses.dataclass(frozen=True)
class Model:
  embed_dim: int = 32
  mixer: Attention | Titans | Rated = Attention()
  levels: tuple[Level, ...] = (Level('fast'), Level('slow', 256))

  def __post_init__(self):
    heads = getattr(self.mixer, 'num_heads', 1)
    if self.embed_dim % heads:
      raise ValueError(f'{self.embed_dim=} is not a multiple of {heads=}.')


@dataclasses.dataclass(frozen=True)
class Train:
  num_steps: int = 100
  learning_rate: float = 1e-3
  resume: bool = True
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  sizes: tuple[int, ...] = (1, 2)
  betas: tuple[float, float] = (0.9, 0.95)
  names: tuple[str, ...] = ()
  limit: int | float | None = None
  label: str | None = 'x'


@dataclasses.dataclass(frozen=True)
class Config:
  name: str = 'test'
  model: Model = Model()
  train: Train = Train()
  extra: Titans | None = None
  inner: tuple[Inner, ...] = ()


class OverrideTest(parameterized.TestCase):
  @parameterized.parameters(
    ('num_steps=50', 50),
    ('num_steps=1_000', 1000),
    ('num_steps=-1', -1),
    ('learning_rate=3e-4', 3e-4),
    ('learning_rate=1', 1.0),
    ('resume=false', False),
    ('resume=True', True),
    ('dtype=bfloat16', 'bfloat16'),
    ('sizes=4,5,6', (4, 5, 6)),
    ('sizes=(4,)', (4,)),
    ('sizes=[4, 5]', (4, 5)),
    ('sizes=7', (7,)),
    ('sizes=()', ()),
    ('sizes.1=9', (1, 9)),
    ('betas=0.5,1', (0.5, 1.0)),
    ('names=a,b', ('a', 'b')),
    ("names=('a', 'b')", ('a', 'b')),
    ('limit=none', None),
    ('limit=2', 2),
    ('limit=2.5', 2.5),
    ('label=none', None),
    ('label=a=b, c', 'a=b, c'),
    ('label=', ''),
  )
  def test_value_is_read_by_the_type_of_its_field(self, assignment, expected):
    train = configs.override(Config(), [f'train.{assignment}']).train
    value = getattr(train, assignment.split('=')[0].split('.')[0])
    self.assertEqual(value, expected)
    self.assertIs(type(value), type(expected))
    if isinstance(expected, tuple):
      self.assertEqual([type(v) for v in value], [type(v) for v in expected])

  def test_changes_one_field_and_leaves_the_rest(self):
    changed = configs.override(Config(), ['model.levels.1.chunk_size=512'])
    levels = (Level('fast'), Level('slow', 512))
    self.assertEqual(changed, Config(model=Model(levels=levels)))
    self.assertEqual(Config().model.levels[1].chunk_size, 256)

  @parameterized.parameters(
    (['inner=8,none'], (Inner(8), Inner(None))),
    (['inner=4', 'inner.0.rate=2'], (Inner(4, 2.0),)),
    (['inner=4,8', 'inner.1.rate=3', 'inner.all.rate=2'],
     (Inner(4, 2.0), Inner(8, 3.0))),
    (['inner=4,8', 'inner.1=16'], (Inner(4), Inner(16))),
    (['inner=()'], ()),
  )  # fmt: skip
  def test_makes_entries_of_a_tuple_from_one_field(self, assignments, expected):
    self.assertEqual(configs.override(Config(), assignments).inner, expected)

  def test_entries_keep_their_other_fields(self):
    config = Config(inner=(Inner(4, 2.0),))
    changed = configs.override(config, ['inner=8,16'])
    self.assertEqual(changed.inner, (Inner(8, 2.0), Inner(16)))

  def test_last_assignment_wins(self):
    changed = configs.override(
      Config(), ['train.num_steps=1', 'train.num_steps=2']
    )
    self.assertEqual(changed.train.num_steps, 2)

  def test_chooses_a_class_by_name_and_sets_its_fields(self):
    changed = configs.override(
      Config(), ['model.mixer=Titans', 'model.mixer.chunk_size=8']
    )
    self.assertEqual(changed.model.mixer, Titans(8))
    changed = configs.override(
      Config(), ['model.mixer=Rated', 'model.mixer.rate=3']
    )
    self.assertEqual(changed.model.mixer, Rated(3.0))

  def test_chooses_a_class_by_its_plain_name(self):
    changed = configs.override(
      Config(), ['model.mixer=rated_mixer', 'model.mixer.rate=3']
    )
    self.assertEqual(changed.model.mixer, Rated(3.0))

  def test_optional_config_is_made_and_dropped(self):
    made = configs.override(Config(), ['extra=Titans'])
    self.assertEqual(made.extra, Titans())
    self.assertIsNone(configs.override(made, ['extra=none']).extra)

  def test_changes_are_validated_together(self):
    both = ['model.embed_dim=9', 'model.mixer.num_heads=3']
    for assignments in (both, both[::-1]):
      changed = configs.override(Config(), assignments)
      self.assertEqual(changed.model.embed_dim, 9)
    with self.assertRaisesRegex(
      errors.UserError, 'model: self.embed_dim=9 is not a multiple of heads=4'
    ):
      configs.override(Config(), ['model.embed_dim=9'])

  @parameterized.parameters(
    ('num_steps=5', r'nearest field is train\.num_steps.*Config has: name'),
    ('train.num_step=5', r'train\.num_step .*nearest .* train\.num_steps\.'),
    ('model.mixr=Titans', r'nearest .* model\.mixer\..*Model has: embed_dim'),
    ('train.rate=2', r'nearest .* train\.learning_rate\.'),
    ('model.heads=2', r'nearest .* model\.mixer\.num_heads'),
    ('model.mixer.heads=2', r'nearest .* model\.mixer\.num_heads'),
    ('model.levels.0.chunksize=2', r'nearest .* model\.levels\.0\.chunk_size'),
    ('model.levels.0.period=2', r'is now called model\.levels\.0\.chunk_size'),
    ('model.levels.2.chunk_size=2', r'model\.levels has 2 entries, 0 to 1'),
    ('inner.0.rate=2', r'inner has 0 entries\. Set inner to the every of each'),
    ('inner.all.rate=2', r'inner\.all .* inner has 0 entries'),
    ('model.levels.-1.chunk_size=2', r'model\.levels has 2 entries, 0 to 1'),
    (
      'model.mixer.rate=2',
      r'mixer.rate .*is Attention. Set model.mixer=rated_mixer before it',
    ),
    ('name.first=a', "name is 'test' and has no fields"),
    ('extra.chunk_size=2', 'extra is None and has no fields'),
  )
  def test_unknown_field_names_the_nearest(self, assignment, message):
    with self.assertRaisesRegex(errors.UserError, message):
      configs.override(Config(), [assignment])

  @parameterized.parameters(
    ('train.num_steps=abc', r'num_steps=abc .* is int, now 100\.'),
    ('train.num_steps=1e3', 'is int'),
    ('train.num_steps=1.5', 'is int'),
    ('train.num_steps=', 'is int'),
    ('train.learning_rate=fast', 'is float'),
    ('train.resume=1', 'is bool'),
    ('train.dtype=float16', 'is one of float32, bfloat16'),
    ('train.sizes=1,b', r'sizes=b does not fit'),
    ('train.betas=0.5', r'is tuple\[float, float\]'),
    ('train.limit=x', 'is int or float or none'),
    (
      'model.mixer=Mamba',
      'Titans or rated_mixer, now Attention. The nearest is',
    ),
    ('model.mixer=rated', r'The nearest is model\.mixer=rated_mixer\.'),
    ('model.mixer=Rated', r'not complete: set model\.mixer\.rate too'),
    ('model=big', 'Set one of its fields, such as model.embed_dim'),
    ('model.levels=3', r'such as model\.levels\.0\.name'),
    ('model.levels.0=Level', r'not complete: set model\.levels\.0\.name'),
    ('model.levels.0=slow', r'such as model\.levels\.0\.name'),
  )
  def test_value_of_the_wrong_type(self, assignment, message):
    with self.assertRaisesRegex(errors.UserError, message) as caught:
      configs.override(Config(), [assignment])
    self.assertNotIn('\n', str(caught.exception))

  @parameterized.parameters('train.num_steps', '=3', '')
  def test_text_without_an_assignment(self, text):
    with self.assertRaisesRegex(errors.UserError, 'write path=value'):
      configs.override(Config(), [text])
