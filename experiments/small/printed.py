"""What the paper prints for the tasks that have a small version here.

Its models have hundreds of millions of parameters or more, or it does not say
how many; none of these numbers is one that a small run should give.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, Tables 1, 3, 4 and 5.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Printed(NamedTuple):
  """Numbers of a column.

  Attributes:
    where: The table and what its numbers are.
    values: By family, as printed.
  """

  where: str
  values: Mapping[str, str]


_MAD = 'Table 4, accuracy in per cent'
_LANGUAGES = (
  'Table 5, strings all right in per cent, of training lengths / of 51 to 100'
)

PRINTED = {
  's_niah_1': Printed(
    'Table 1, S-NIAH-1 at 4K / 8K / 16K tokens, per cent',
    {
      'transformer': '88.6 / 76.4 / 79.8',
      'titans': '100 / 100 / 100',
      'hope': '100 / 100 / 100',
    },
  ),
  'documents': Printed(
    'Table 3, SWDE / FDA, per cent',
    {
      'transformer': '71.4 / 67.3',
      'hope': '65.9 / 41.9',
    },
  ),
  'compression': Printed(_MAD, {'transformer': '49.4', 'hope': '51.2'}),
  'fuzzy_recall': Printed(
    _MAD, {'transformer': '47.9', 'titans': '50.0', 'hope': '52.1'}
  ),
  'selective_copying': Printed(
    _MAD, {'transformer': '96.2', 'titans': '99.4', 'hope': '99.7'}
  ),
  'parity': Printed(
    _LANGUAGES,
    {
      'transformer': '46.4 / 0',
      'linear_attention': '78.1 / 0',
      'deltanet': '98.2 / 10.1',
      'hope': '100 / 100',
    },
  ),
  'aa': Printed(
    _LANGUAGES,
    {
      'transformer': '0 / 0',
      'linear_attention': '0 / 0',
      'deltanet': '0 / 0',
      'hope': '100 / 100',
    },
  ),
}
