from absl.testing import absltest

from nested_learning import markdown


class MarkdownTest(absltest.TestCase):
  def test_cells_are_padded_and_escaped(self):
    self.assertEqual(
      markdown.table(('a', 'long'), [('x|y', '1'), ('two\nlines', '')]),
      '| a         | long |\n'
      '| --------- | ---- |\n'
      r'| x\|y      | 1    |' + '\n'
      '| two lines |      |',
    )

  def test_a_fence_does_not_occur_in_the_text(self):
    self.assertEqual(markdown.fenced('```\n'), '````\n```\n````')
