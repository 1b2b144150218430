import dataclasses
from typing import Literal

from absl.testing import absltest

from nested_learning import errors


@dataclasses.dataclass(frozen=True)
class _Config:
  read: Literal['token', 'chunk'] = 'token'
  kind: Literal['a'] | None = None
  size: int | Literal['all'] = 3

  def __post_init__(self):
    errors.check_choices(self)


class ErrorsTest(absltest.TestCase):
  def test_choices_are_read_off_the_annotations(self):
    _Config(read='chunk', kind='a', size=7)
    with self.assertRaisesWithLiteralMatch(
      errors.UserError, "read='tokens' must be one of 'token', 'chunk'."
    ):
      _Config(read='tokens')
    with self.assertRaisesRegex(errors.UserError, "kind='b' .* 'a', None"):
      _Config(kind='b')

  def test_a_field_is_named_without_self(self):
    with self.assertRaisesWithLiteralMatch(
      errors.UserError, 'size=3 must be at least 4.'
    ):
      errors.check_field(_Config(), 'size', False, 'at least 4')
