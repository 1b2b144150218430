"""How an answer in text is scored.

References:
  Hsieh et al., RULER, arXiv:2404.06654, 2024 (string_match_all).
  Kuratov et al., BABILong, arXiv:2406.10149, 2024 (the one label named).
"""

from collections.abc import Sequence
import re


def string_match_all(output: str, references: Sequence[str]) -> float:
  """The share of references that the output contains, whatever their case."""
  output = output.lower()
  return sum(r.lower() in output for r in references) / len(references)


def names_only(
  output: str, reference: str, *, question: str, labels: Sequence[str]
) -> float:
  """Whether the first sentence of an output names the one right label.

  Args:
    output: What the model says.
    reference: The label that is right.
    question: Labels that it names do not count as named by the output.
    labels: Every label of the task.

  Returns:
    1.0 or 0.0.
  """
  first = re.split(r'[.\n]', output.strip(), maxsplit=1)[0]
  others = set(labels) - _words(question)
  named = _words(first) & others
  return float(named == {reference})


def _words(text: str) -> set[str]:
  return set(re.findall(r'[a-z]+', text.lower()))
