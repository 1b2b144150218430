"""Tests counting the bytes that programs move, against counts by hand."""

from absl.testing import parameterized

from nested_learning import accelerators
from nested_learning.compilation import analysis
from nested_learning.compilation import flops
from nested_learning.compilation import hlo
from nested_learning.compilation import memory_traffic

# A scan of 18 steps, as libtpu writes it: a step's fusion hands the whole stack
# of inputs to a fusion inside of it, which converts and slices it; and one of
# its results is a stack, of which a fusion inside of it writes a slice.
_NESTED = """HloModule jit_f, is_scheduled=true

%take (s: bf16[18,8,48], i: s32[]) -> f32[8,48] {
  %s = bf16[18,8,48]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %wide = f32[18,8,48]{2,1,0:T(8,128)} convert(%s)
  %zero = s32[]{:T(128)} constant(0)
  %cut = f32[1,8,48]{2,1,0:T(8,128)} dynamic-slice(%wide, %i, %zero, %zero)
  ROOT %row = f32[8,48]{1,0:T(8,128)} bitcast(%cut)
}

%put (o: f32[18,8,48], r: f32[8,48], i: s32[]) -> f32[18,8,48] {
  %o = f32[18,8,48]{2,1,0:T(8,128)} parameter(0)
  %r = f32[8,48]{1,0:T(8,128)} parameter(1)
  %i = s32[]{:T(128)} parameter(2)
  %one = f32[1,8,48]{2,1,0:T(8,128)} bitcast(%r)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %new = f32[18,8,48]{2,1,0:T(8,128)} dynamic-update-slice(%o, %one, %i, \
%zero, %zero)
}

%step (s: bf16[18,8,48], c: f32[8,48], o: f32[18,8,48], i: s32[]) -> \
(f32[8,48], f32[18,8,48]) {
  %s = bf16[18,8,48]{2,1,0:T(8,128)(2,1)} parameter(0)
  %c = f32[8,48]{1,0:T(8,128)} parameter(1)
  %o = f32[18,8,48]{2,1,0:T(8,128)} parameter(2)
  %i = s32[]{:T(128)} parameter(3)
  %x = f32[8,48]{1,0:T(8,128)} fusion(%s, %i), kind=kLoop, calls=%take
  %y = f32[8,48]{1,0:T(8,128)} add(%x, %c)
  %all = f32[18,8,48]{2,1,0:T(8,128)} fusion(%o, %y, %i), kind=kLoop, \
calls=%put
  ROOT %both = (f32[8,48]{1,0:T(8,128)}, f32[18,8,48]{2,1,0:T(8,128)}) \
tuple(%y, %all)
}

%body (p: (s32[], bf16[18,8,48], f32[8,48], f32[18,8,48])) -> (s32[], \
bf16[18,8,48], f32[8,48], f32[18,8,48]) {
  %p = (s32[]{:T(128)S(6)}, bf16[18,8,48]{2,1,0:T(8,128)(2,1)}, \
f32[8,48]{1,0:T(8,128)}, f32[18,8,48]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%p), index=0
  %s = bf16[18,8,48]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %c = f32[8,48]{1,0:T(8,128)} get-tuple-element(%p), index=2
  %o = f32[18,8,48]{2,1,0:T(8,128)} get-tuple-element(%p), index=3
  %f = (f32[8,48]{1,0:T(8,128)}, f32[18,8,48]{2,1,0:T(8,128)}) \
fusion(%s, %c, %o, %i), kind=kLoop, calls=%step, \
metadata={op_name="jit(f)/memory/while/body/add"}, \
backend_config={"estimated_cycles":"250"}
  %d = f32[8,48]{1,0:T(8,128)} get-tuple-element(%f), index=0
  %e = f32[18,8,48]{2,1,0:T(8,128)} get-tuple-element(%f), index=1
  ROOT %next = (s32[], bf16[18,8,48]{2,1,0:T(8,128)(2,1)}, \
f32[8,48]{1,0:T(8,128)}, f32[18,8,48]{2,1,0:T(8,128)}) tuple(%i, %s, %d, %e)
}

%condition (q: (s32[], bf16[18,8,48], f32[8,48], f32[18,8,48])) -> pred[] {
  %q = (s32[]{:T(128)S(6)}, bf16[18,8,48]{2,1,0:T(8,128)(2,1)}, \
f32[8,48]{1,0:T(8,128)}, f32[18,8,48]{2,1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)S(6)} get-tuple-element(%q), index=0
  %end = s32[]{:T(128)S(6)} constant(18)
  ROOT %less = pred[]{:T(512)S(6)} compare(%j, %end), direction=LT
}

ENTRY %main (a: s32[], b: bf16[18,8,48], c: f32[8,48], d: f32[18,8,48]) -> \
f32[8,48] {
  %a = s32[]{:T(128)S(6)} parameter(0)
  %b = bf16[18,8,48]{2,1,0:T(8,128)(2,1)} parameter(1)
  %c = f32[8,48]{1,0:T(8,128)} parameter(2)
  %d = f32[18,8,48]{2,1,0:T(8,128)} parameter(3)
  %start = (s32[], bf16[18,8,48]{2,1,0:T(8,128)(2,1)}, \
f32[8,48]{1,0:T(8,128)}, f32[18,8,48]{2,1,0:T(8,128)}) tuple(%a, %b, %c, %d)
  %loop = (s32[], bf16[18,8,48]{2,1,0:T(8,128)(2,1)}, \
f32[8,48]{1,0:T(8,128)}, f32[18,8,48]{2,1,0:T(8,128)}) while(%start), \
condition=%condition, body=%body
  ROOT %out = f32[8,48]{1,0:T(8,128)} get-tuple-element(%loop), index=2
}
"""

# As libtpu writes a kernel, shortened; the numbers are what the kernel states.
_KERNEL = """HloModule jit_f

ENTRY %main (a: f32[64,128]) -> f32[64,128] {
  %a = f32[64,128]{1,0:T(8,128)} parameter(0)
  ROOT %k = f32[64,128]{1,0:T(8,128)} custom-call(%a), \
custom_call_target="tpu_custom_call", backend_config=\
{"custom_call_config":{"body":"TUz","cost_estimate":{"flops":"4096",\
"transcendentals":"3","bytes_accessed":"77000"}}}
}
"""


class MemoryTrafficTest(parameterized.TestCase):
  def test_follows_slices_into_nested_fusions(self):
    found = analysis.analyze(_NESTED, {'data': 1})
    # A step reads a slice in bfloat16 and the sum, and writes the sum and a
    # slice of the result.
    self.assertEqual(found.memory_bytes, 18 * 8 * 48 * (2 + 4 + 4 + 4))
    # A row of 48 numbers fills a tile of 128.
    self.assertEqual(found.padded_bytes, 18 * 8 * 128 * (2 + 4 + 4 + 4))
    self.assertEqual(found.traffic_share, 1.0)

  def test_reads_everything_that_some_user_needs(self):
    text = _NESTED.replace(
      '%y = f32[8,48]{1,0:T(8,128)} add(%x, %c)',
      '%y = f32[8,48]{1,0:T(8,128)} custom(%x, %c, %s)',
    )
    found = analysis.analyze(text, {'data': 1})
    expected = 18 * 8 * 48 * (18 * 2 + 4 + 4 + 4)
    self.assertEqual(found.memory_bytes, expected)

  def test_adds_the_cycles_that_the_compiler_estimates(self):
    found = analysis.analyze(_NESTED, {'data': 1})
    self.assertEqual(found.cycles, 18 * 250)
    self.assertEqual(found.memory_cycles, 18 * 250)
    seconds = analysis.estimate_seconds(found, accelerators.find('v5e:2x4'))
    self.assertAlmostEqual(seconds['compiler_seconds'], 18 * 250 / 1.5e9)
    tiled = seconds['hbm_seconds_padded'] / seconds['hbm_seconds']
    self.assertAlmostEqual(tiled, 128 / 48)
    unknown = analysis.estimate_seconds(found, accelerators.find('v6e:2x4'))
    self.assertNotIn('compiler_seconds', unknown)

  @parameterized.parameters(
    ('f32[3,5]{1,0:T(8,128)}', 8 * 128),
    ('f32[3,5]{0,1:T(8,128)}', 128 * 8),  # the first axis is the fastest
    ('bf16[2,3,130]{2,1,0:T(8,128)(2,1)S(1)}', 2 * 8 * 256),
    ('f32[300]{0:T(256)}', 512),
    ('f32[3,5]{1,0}', 15),
    ('s32[]{:T(128)}', 1),
  )
  def test_pads_to_tiles(self, text, num_entries):
    (shape,) = hlo._shapes(text)
    self.assertEqual(shape.padded().num_entries, num_entries)

  def test_takes_the_word_of_a_kernel(self):
    program = hlo.parse(_KERNEL)
    self.assertEqual(memory_traffic.num_bytes(program), 77000)
    main = program.computations['main']
    found = flops.instruction_flops(main['k'], [main['a'].shapes[0]])
    self.assertEqual(found, 4096)
    # A call that states nothing reads its operands and writes its result.
    silent = hlo.parse(_KERNEL.replace('cost_estimate', 'other'))
    self.assertEqual(memory_traffic.num_bytes(silent), 2 * 4 * 64 * 128)
