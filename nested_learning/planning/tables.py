"""Renders the summary of a compiled experiment as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from nested_learning import markdown
from nested_learning.training import config as config_lib
from nested_learning.training import description

_SENT = 'collective_bytes_'
# Label, key in the summary, and format, see `_cell`.
_ROWS = (
  ('fits', 'fits', None),
  ('needs, GiB per device', 'peak_bytes', 'gib'),
  ('of it arguments', 'argument_bytes', 'gib'),
  ('of it results', 'output_bytes', 'gib'),
  ('of it temporaries', 'temporary_bytes', 'gib'),
  ('of it code', 'code_bytes', 'gib'),
  ('the compiler says', 'compiler', None),
  ('FLOPs by operation count', 'flops', 'e'),
  ('FLOPs of the model alone', 'model_flops', 'e'),
  ('FLOPs per device, compiled', 'flops_per_device', 'e'),
  ('compiled over counted', 'flops_ratio', 'f'),
  ('share of memories in them', 'flops_in_memories', 'f'),
  ('memory traffic, GiB per device', 'memory_traffic_bytes', 'gib'),
  ('in whole tiles, GiB', 'memory_traffic_bytes_padded', 'gib'),
  ('share of memories in the entries', 'traffic_in_memories', 'f'),
  ('and in results, each once', 'results_in_memories', 'f'),
  ('sent, GiB per device', 'collective_bytes', 'gib'),
  ('share of all bytes that is sent', 'collective_share', 'f'),
  ("collectives in memories' scans", 'collectives_in_memory_scans', None),
  ('matmuls, ms', 'matmul_seconds', 'ms'),
  ('memory traffic, ms', 'hbm_seconds', 'ms'),
  ('memory traffic in whole tiles, ms', 'hbm_seconds_padded', 'ms'),
  ("the compiler's estimate, cycles", 'cycles', 'e'),
  ('share of memories in them', 'cycles_in_memories', 'f'),
  ("the compiler's estimate, ms", 'compiler_seconds', 'ms'),
  ('links, ms', 'link_seconds', 'ms'),
  ('network, ms', 'network_seconds', 'ms'),
  ('step, ms', 'step_seconds', 'ms'),
  ('step with all overlapped, ms', 'step_seconds_overlapped', 'ms'),
  ('tokens/s per device', 'tokens_per_second_per_device', 'e'),
  ('MFU', 'mfu_estimate', 'f'),
  ('MFU with all overlapped', 'mfu_bound', 'f'),
  ('compile time, s', 'compile_seconds', 's'),
  ('of one core, s', 'compile_cpu_seconds', 's'),
)


def describe(
  config: config_lib.ExperimentConfig, summary: Mapping[str, Any]
) -> str:
  """Renders a summary as Markdown tables.

  Args:
    config: The experiment.
    summary: The result of `ahead_of_time.compile_for`.

  Returns:
    The text.
  """
  mesh = ' x '.join(f'{axis} {size}' for axis, size in summary['mesh'].items())
  programs = {'training': summary, 'decoding': summary['decode']}
  rows = [
    (label, *(_cell(program.get(name), form) for program in programs.values()))
    for label, name, form in _ROWS
  ]
  sections = [
    f'# {summary["name"]} on {summary["topology"]}',
    f'{summary["parameters"]:,} parameters; {summary["batch_tokens"]:,} tokens '
    f'per step, micro-batches: {summary["accumulate"]}; mesh {mesh} of devices '
    f'with {summary["hbm_bytes"] / 2**30:.1f} GiB.',
    markdown.table(('', *programs), rows),
  ]
  sent = [
    (program, name.removeprefix(_SENT), f'{size / 2**20:,.1f}')
    for program, numbers in programs.items()
    for name, size in numbers.items()
    if name.startswith(_SENT)
  ]
  if sent:
    header = 'program', 'collective, mesh axes', 'MiB sent per device'
    sections.append(markdown.table(header, sent))
  axes = tuple(summary['mesh'])
  sizes = tuple(summary['mesh'].values())
  abstract = jax.sharding.AbstractMesh(sizes, axes)
  sections.append(description.layout(config, abstract))
  if 'tried' in summary:
    sections += ['Tried, in this order:', describe_tried(summary['tried'])]
  sections.append(
    'Assumed: ' + '; '.join(summary['assumptions']) + '. Nothing was run.'
  )
  return '\n\n'.join(sections)


def describe_tried(tried: Sequence[Mapping[str, Any]]) -> str:
  """Renders the attempts of `suggestions.find` as a Markdown table."""
  rows = [
    (
      ' '.join(f'--set=mesh.{axis}={n}' for axis, n in one['mesh'].items())
      + f' --set=train.accumulate={one["accumulate"]}',
      'yes' if one['fits'] else one['compiler'],
    )
    for one in tried
  ]
  return markdown.table(('mesh', 'fits'), rows)


def _cell(value: Any, form: str | None) -> str:
  """Formats a number: GiB, milliseconds, significant digits, or as it is."""
  if value is None:
    return ''
  match form:
    case 'gib':
      return f'{value / 2**30:,.3f}'
    case 'ms':
      return f'{value * 1e3:,.2f}'
    case 'e':
      return f'{value:.3g}'
    case 'f':
      return f'{value:.3f}'
    case 's':
      return f'{value:.0f}'
  return ('NO', 'yes')[value] if isinstance(value, bool) else str(value)
