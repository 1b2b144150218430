"""Tests of rows and grids."""

from absl.testing import absltest
from absl.testing import parameterized

from launch import sweeps
from nested_learning import errors


class GridTest(parameterized.TestCase):
  @parameterized.parameters(
    ('a.b=16,64', 'a.b', ('16', '64')),
    ('a = 1e-3, none', 'a', ('1e-3', 'none')),
    ('a=(k,v),(k,)', 'a', ('(k,v)', '(k,)')),
    ('a=[[1,2],[3]],()', 'a', ('[[1,2],[3]]', '()')),
    ('a="x, y",\'don"t\'', 'a', ('x, y', 'don"t')),
    ("a='',b=c", 'a', ('', 'b=c')),
    ('a={"n": [1, 2]},3', 'a', ('{"n": [1, 2]}', '3')),
  )
  def test_splits_values_outside_of_brackets(self, text, path, values):
    self.assertEqual(sweeps.parse_grid(text), (path, values))

  @parameterized.parameters(
    ('size', 'write path=value,value'),
    ('=1,2', 'write path=value,value'),
    ('size=', 'empty value'),
    ('size=1,,2', 'empty value'),
    ('size=1,2,1', "the value '1' twice"),
    ('roles=(k,v', 'a bracket without'),
    ("text=don't,do", "a quote ' without"),
  )
  def test_refuses(self, text, message):
    with self.assertRaisesRegex(errors.UserError, message):
      sweeps.parse_grid(text)


class SweepTest(parameterized.TestCase):
  def test_refuses_what_cannot_be_a_table(self):
    for kwargs, message in (
      ({'rows': (sweeps.Row('a'), sweeps.Row('a'))}, "the name 'a'"),
      ({'grid': ('size=1', 'size=2')}, 'size twice'),
      ({'metrics': ('loss:best',)}, 'must end in :min or :max'),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        sweeps.Sweep(**kwargs)

  @parameterized.parameters('', 'a/b', '.hidden', 'no DGD', '../up')
  def test_row_needs_the_name_of_a_folder(self, name):
    with self.assertRaisesRegex(errors.UserError, 'can be a folder'):
      sweeps.Row(name)


if __name__ == '__main__':
  absltest.main()
