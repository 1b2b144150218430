"""Markdown as the reports and pages of this package write it."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Returns a table, its columns padded to be read in a terminal as well.

  Args:
    header: The names of the columns.
    rows: The cells, as many per row as there are columns. A bar is escaped and
      a line break becomes a space.

  Returns:
    The table, without a line break at its end.
  """
  lines = [[_cell(cell) for cell in line] for line in (header, *rows)]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  lines.insert(1, ['-' * max(width, 3) for width in widths])
  return '\n'.join(
    '| '
    + ' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))
    + ' |'
    for line in lines
  )


def fenced(text: str, language: str = '') -> str:
  """Returns a code block, with a fence that does not occur in the text."""
  fence = '```'
  while fence in text:
    fence += '`'
  return f'{fence}{language}\n{text.rstrip()}\n{fence}'


def _cell(text: str) -> str:
  return ' '.join(text.replace('|', r'\|').splitlines())
