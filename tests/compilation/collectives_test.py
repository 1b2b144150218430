"""Tests finding collectives: kind, axes, bytes and loops."""

import functools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import accelerators
from nested_learning.compilation import analysis
from nested_learning.compilation import collectives
from nested_learning.compilation import hlo

_MESH = {'data': 2, 'fsdp': 2, 'model': 2}
_BYTES = 4 * 16 * 32  # of a device's array
_KINDS = {
  'all-reduce': (lambda x, axis: jax.lax.psum(x, axis), 2 * _BYTES / 2),
  'all-gather': (
    lambda x, axis: jax.lax.all_gather(x, axis, tiled=True),
    _BYTES,
  ),
  'reduce-scatter': (
    lambda x, axis: jax.lax.psum_scatter(x, axis, tiled=True),
    _BYTES / 2,
  ),
  'all-to-all': (
    lambda x, axis: jax.lax.all_to_all(x, axis, 0, 0, tiled=True),
    _BYTES / 2,
  ),
  'collective-permute': (
    lambda x, axis: jax.lax.ppermute(x, axis, [(0, 1), (1, 0)]),
    _BYTES,
  ),
}

_TPU = """HloModule jit_f

%add (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}}

%all-reduce-scatter.1 (p: f32[16,32]) -> f32[8,32] {{
  %p = f32[16,32]{{1,0}} parameter(0)
  %all-reduce.3 = f32[16,32]{{1,0}} all-reduce(%p), channel_id=1, \
{groups}, to_apply=%add
  ROOT %cut = f32[8,32]{{1,0}} slice(%all-reduce.3), slice={{[0:8], [0:32]}}
}}

%gather.1 (p: f32[16,32]) -> f32[32,32] {{
  %p = f32[16,32]{{1,0}} parameter(0)
  ROOT %all-gather.1 = f32[32,32]{{1,0}} all-gather(%p), channel_id=1, \
{groups}, dimensions={{0}}, frontend_attributes={{chain_id="0"}}
}}

%gather.2 (p: f32[16,32]) -> f32[32,32] {{
  %p = f32[16,32]{{1,0}} parameter(0)
  ROOT %all-gather.2 = f32[32,32]{{1,0}} all-gather(%p), channel_id=1, \
{groups}, dimensions={{0}}, frontend_attributes={{chain_id="0"}}
}}

ENTRY %main (a: f32[16,32]) -> f32[8,32] {{
  %a = f32[16,32]{{1,0}} parameter(0)
  %b = f32[32,32]{{1,0}} fusion(%a), kind=kOutput, calls=%gather.1
  %c = f32[32,32]{{1,0}} fusion(%a), kind=kOutput, calls=%gather.2
  %t = token[] after-all()
  %send.1 = (f32[16,32]{{1,0}}, u32[], token[]) send(%a, %t), channel_id=9, \
is_host_transfer=true, frontend_attributes={{\
_xla_host_transfer_handler_name="xla_megascale_runtime"}}
  %d = f32[8,32]{{1,0}} fusion(%a), kind=kCustom, \
calls=%all-reduce-scatter.1
  ROOT %e = f32[8,32]{{1,0}} fusion(%a), kind=kCustom, \
calls=%all-reduce-scatter.1
}}
"""

# As libtpu writes for tpu7x: another core of the chip gathers.
_OFFLOADED = """HloModule jit_f

%called (p: f32[16,32], q: token[]) -> f32[32,32] {
  %p = f32[16,32]{1,0} parameter(0)
  %q = token[] parameter(1)
  ROOT %all-gather.1 = f32[32,32]{1,0} all-gather(%p), channel_id=1, \
replica_groups=[4,2]<=[8], dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (a: f32[16,32]) -> f32[32,32] {
  %a = f32[16,32]{1,0} parameter(0)
  %t = token[] after-all()
  %start = ((f32[16,32]{1,0}, token[]), f32[32,32]{1,0}) call-start(%a, %t), \
async_execution_thread="sparsecore", to_apply=%called
  ROOT %done = f32[32,32]{1,0} call-done(%start)
}
"""


def _find(function, in_specs, out_specs):
  mesh = jax.make_mesh(
    tuple(_MESH.values()),
    tuple(_MESH),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )
  sharded = jax.shard_map(
    function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )
  x = jax.ShapeDtypeStruct((32, 32), np.float32)
  text = jax.jit(sharded).lower(x).compile().as_text()
  return analysis.analyze(text, _MESH)


class CollectivesTest(parameterized.TestCase):
  @parameterized.product(kind=tuple(_KINDS), axis=tuple(_MESH))
  def test_kind_axis_and_bytes(self, kind, axis):
    function, num_bytes = _KINDS[kind]
    specs = jax.P(axis), jax.P(axis)
    found = _find(functools.partial(function, axis=axis), *specs)
    self.assertEqual(found.sent_bytes, {(kind, axis): num_bytes})

  def test_several_axes_and_loops(self):
    def function(x):
      def body(carry, _):
        with jax.named_scope('memory'):
          return carry + jax.lax.psum(jnp.sin(carry), ('data', 'model')), None

      return jax.lax.scan(body, x, length=7)[0]

    found = _find(function, jax.P('fsdp'), jax.P('fsdp'))
    (collective,) = found.collectives
    self.assertEqual(collective.axes, ('data', 'model'))
    self.assertEqual(collective.times, 7)
    self.assertEqual(collective.num_bytes, 2 * _BYTES * 3 / 4)
    self.assertEqual(collective.spans, 6)  # devices 0, 1, 4, 5

  def test_finds_collectives_inside_a_scan_of_a_memory(self):
    def function(x, *, inside):
      def body(carry, _):
        total = jax.lax.psum(carry, 'data') if inside else carry
        return jnp.sin(total), None

      with jax.named_scope('memory'):
        x = jax.lax.scan(body, x, length=7)[0]
        return jax.lax.psum(x, 'data')

    for inside in (False, True):
      found = _find(
        functools.partial(function, inside=inside), jax.P('data'), jax.P('data')
      )
      self.assertLen(found.in_memory_loops, int(inside))

  @parameterized.parameters(
    ('jit(f)/memory/while/body/dot_general', True),
    ('jit(f)/transpose(jvp(vmap(memory)))/while', True),
    ('jit(f)/jvp(layer)/memory/while/body/add', True),
    ('jit(f)/memory_as_context/attention/dot_general', False),
    ('jit(f)/jvp(read_memory)/dot_general', False),
    ('jit(memory)/dot_general', False),
    ("state.params['memory']['kernel']", False),
  )
  def test_scope_of_a_memory(self, op_name, expected):
    self.assertEqual(analysis.is_of_memory(op_name), expected)

  @parameterized.parameters(
    ('replica_groups={{0,1},{2,3},{4,5},{6,7}}', ('model',)),
    ('replica_groups=[4,2]<=[8]', ('model',)),
    ('replica_groups=[4,2]<=[2,4]T(1,0)', ('data',)),
    ('replica_groups=[4,2]<=[2,2,2]T(0,2,1)', ('fsdp',)),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", ('model',)),
    (
      "replica_groups=mesh['axis_0'=2,'axis_1'=4], "
      "device_ids=([4,2]T(1,0)) {'axis_0'}",
      ('model',),
    ),
  )
  def test_parses_collectives_of_tpus(self, groups, axes):
    program = hlo.parse(_TPU.format(groups=groups))
    found = [
      (c.kind, c.axes, c.num_bytes) for c in collectives.find(program, _MESH)
    ]
    self.assertEqual(
      found,
      [
        ('all-gather', axes, 2 * _BYTES / 2),  # its clone is the same
        ('send', ('slices',), _BYTES),
        ('reduce-scatter', axes, _BYTES / 2),  # on the channel of the other
        ('reduce-scatter', axes, _BYTES / 2),
      ],
    )

  def test_counts_sends_of_another_core(self):
    found = analysis.analyze(_OFFLOADED, _MESH)
    self.assertEqual(found.sent_bytes, {('all-gather', 'model'): _BYTES})
    self.assertEqual(
      found.memory_bytes, 3 * _BYTES
    )  # its part read, and the whole written

  def test_estimates_seconds_of_collectives(self):
    text = _TPU.format(groups='replica_groups=[4,2]<=[8]')
    found = analysis.analyze(text, _MESH)
    topology = accelerators.find('v5e:2x4')
    chip = topology.generation.chip
    seconds = analysis.estimate_seconds(found, topology)
    self.assertAlmostEqual(
      seconds['link_seconds'], 2 * _BYTES / chip.link_bandwidth
    )
    self.assertAlmostEqual(
      seconds['network_seconds'], _BYTES / chip.network_bandwidth
    )
    on_chip = max(seconds['matmul_seconds'], seconds['hbm_seconds'])
    self.assertAlmostEqual(
      seconds['step_seconds'],
      on_chip + seconds['link_seconds'] + seconds['network_seconds'],
    )
    # Nodes of one GPU are joined by the network alone.
    nodes = accelerators.find('h100:8x1')
    far = analysis.estimate_seconds(found, nodes)
    self.assertEqual(far['link_seconds'], 0.0)
