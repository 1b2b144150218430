"""Tests parsing programs: loops, lengths, shapes."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import compilation
from nested_learning.compilation import analysis
from nested_learning.compilation import flops
from nested_learning.compilation import hlo
from nested_learning.compilation import memory_traffic

# As libtpu writes a scan: its length is a constant of the condition.
_LOOP = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %sine = f32[8,128]{1,0:T(8,128)} sine(%x), metadata={op_name="jit(f)/sin"}
  ROOT %next = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%i, %sine)
}

%condition (q: (s32[], f32[8,128])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %end = s32[]{:T(128)} constant(18)
  ROOT %less = pred[]{:T(512)} compare(%j, %end), direction=LT
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[], f32[8,128]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[8,128]{1,0}) while(%start), condition=%condition, \
body=%body, metadata={op_name="jit(f)/while"}
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""
# As libtpu writes products of 4 matrices each: a convolution along the batch.
_CONVOLUTION = """HloModule jit_f

ENTRY %main (a: f32[4,64,256], b: f32[4,770,256]) -> f32[4,64,770] {
  %a = f32[4,64,256]{2,1,0} parameter(0)
  %b = f32[4,770,256]{2,1,0} parameter(1)
  ROOT %c = f32[4,64,770]{2,1,0:T(8,128)} convolution(%a, %b), \
window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf, \
operand_precision={highest,highest}
}
"""


def _compile(function, *args):
  text = jax.jit(function).lower(*args).compile().as_text()
  return analysis.analyze(text, {'data': 1})


class HloTest(parameterized.TestCase):
  def test_loop_length_is_read_from_the_condition(self):
    program = hlo.parse(_LOOP)
    (sine,) = (x for x in hlo.walk(program) if x.instruction.opcode == 'sine')
    self.assertEqual(sine.times, 18)
    self.assertEqual(sine.loops, ('jit(f)/while',))
    self.assertEqual(sine.instruction.op_name, 'jit(f)/sin')
    self.assertEqual(sine.instruction.shapes[0].num_bytes, 4 * 8 * 128)

  def test_distinguishes_fast_and_slow_memory(self):
    body = hlo.parse(_LOOP).computations['body']
    self.assertFalse(body['x'].shapes[0].is_far)
    self.assertTrue(body['sine'].shapes[0].is_far)
    # 18 times 4 KiB written; what is read lies in fast memory.
    found = analysis.analyze(_LOOP, {'data': 1})
    self.assertEqual(found.memory_bytes, 18 * 4096)

  def test_finds_operations_of_memories_by_scope(self):
    found = analysis.analyze(_LOOP, {'data': 1})
    self.assertEqual((found.traffic_share, found.result_share), (0.0, 0.0))
    named = _LOOP.replace('jit(f)/sin', 'jit(f)/memory/while/body/sin')
    found = analysis.analyze(named, {'data': 1})
    # The compare of the condition writes its result, too.
    self.assertBetween(found.traffic_share, 0.99, 1.0)
    self.assertBetween(found.result_share, 0.99, 1.0)
    program = hlo.parse(_LOOP)
    is_sine = lambda instruction: instruction.opcode == 'sine'
    self.assertEqual(memory_traffic.num_bytes(program, is_sine), 18 * 4096)
    self.assertEqual(memory_traffic.result_bytes(program, is_sine), 4096)

  def test_counts_the_products_of_a_convolution(self):
    program = hlo.parse(_CONVOLUTION)
    main = program.computations['main']
    operands = [main[name].shapes[0] for name in ('a', 'b')]
    expected = 2 * 4 * 64 * 256 * 770
    self.assertEqual(flops.instruction_flops(main['c'], operands), expected)
    self.assertEqual(flops.precision(main['c'], operands), 'highest')

  def test_rejects_other_text(self):
    with self.assertRaisesRegex(ValueError, 'no compiled program'):
      hlo.parse('module @jit_f {}')

  @parameterized.parameters('plain', 'scan', 'nested', 'gradient')
  def test_counts_as_the_traced_function(self, kind):
    def plain(a, b):
      return jnp.einsum('hij,jk->hik', a, b)

    def scan(a, b, length=5):
      body = lambda carry, _: (jnp.tanh(plain(carry, b)), None)
      return jax.lax.scan(body, a, length=length)[0]

    def nested(a, b):
      body = lambda carry, _: (scan(carry, b), None)
      return jax.lax.scan(body, a, length=3)[0]

    def gradient(a, b):
      return jax.grad(lambda b: jnp.sum(scan(a, b) ** 2))(b)

    function = locals()[kind]
    a = jax.ShapeDtypeStruct((2, 32, 64), np.float32)
    b = jax.ShapeDtypeStruct((64, 64), np.float32)
    found = _compile(function, a, b)
    self.assertEqual(
      found.total_flops, compilation.matmul_flops(function, a, b)
    )

  def test_a_step_reads_only_its_slice_of_a_stack(self):
    def total(stack):
      body = lambda carry, x: (carry + x, None)
      return jax.lax.scan(body, jnp.zeros(stack.shape[1:]), stack)[0]

    stack = jax.ShapeDtypeStruct((100, 64, 64), np.float32)
    found = _compile(total, stack).memory_bytes
    # Each step reads a slice and the sum, and writes the sum.
    least = 100 * 3 * 4 * 64 * 64
    self.assertBetween(found, least, 2.5 * least)
