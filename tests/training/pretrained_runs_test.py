"""Runs that begin with pretrained weights, from import to export."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import pathlib
import shutil
import subprocess
import sys

from absl.testing import parameterized
import jax
import ml_dtypes
import numpy as np

from nested_learning import configs
from nested_learning import errors
from nested_learning import models
from nested_learning import pretrained
from nested_learning import training
from nested_learning.pretrained import gguf_tokenizer
from nested_learning.pretrained import tensors as tensors_lib
from nested_learning.training import modes
from nested_learning.training import pretrained_runs
from nested_learning.training import text_workload
from tests import compiling

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_DATA = _ROOT / 'tests' / 'pretrained' / 'data'
_LETTERS = 'abcdefghijklmnopqrstuvwxyz'
TEXT = 'a model reads what others wrote and learns from it '


def make_tokenizer(num_more=0):
  """Returns a tokenizer.json of letters and the space."""
  tokens = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '\u0120', *_LETTERS]
  tokens += _LETTERS[:num_more].upper()
  return gguf_tokenizer.make(
    {
      'tokenizer.ggml.model': 'gpt2',
      'tokenizer.ggml.tokens': tokens,
      'tokenizer.ggml.token_type': [3, 3, 3] + [1] * (len(tokens) - 3),
      'tokenizer.ggml.merges': [],
    }
  )


class Imports(parameterized.TestCase):
  """A workdir with an imported model."""

  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.workdir = self.root / 'base'

  def copy(self, name='llama', dtype=np.float32):
    """Copies a recorded model, with a tokenizer, in another type."""
    folder = self.root / name
    shutil.copytree(_DATA / name, folder)
    (folder / 'tokenizer.json').write_bytes(make_tokenizer())
    tensors = {
      n: tensors_lib.from_array(np.array(tensor.read()).astype(dtype))
      for n, tensor in tensors_lib.open_folder(folder).items()
    }
    tensors_lib.write_folder(folder, tensors)
    return folder

  def imported(self, **settings):
    """Imports a model; returns the experiment of its workdir."""
    pretrained_runs.import_run(str(self.copy(**settings)), self.workdir)
    return configs.load(str(self.workdir / 'config.json'))

  def restore(self, config, workdir):
    fingerprint = text_workload.make_tokenizer(config).fingerprint
    return modes.restore_params(config, workdir, fingerprint)[0]


class PretrainedRunsTest(Imports):
  @parameterized.parameters('llama', 'gpt2', 'gemma3')
  def test_an_import_has_the_logits_of_the_model(self, name):
    config = self.imported(name=name)
    self.assertEqual(
      sorted(path.name for path in self.workdir.iterdir()),
      ['config.json', 'pretrained'],
    )
    params = self.restore(config, self.workdir)
    reference = np.load(_DATA / name / 'reference.npz')
    forward = compiling.jit(models.make_model(config.model).forward)
    logits, _ = forward(params, None, reference['tokens'])
    np.testing.assert_allclose(logits, reference['logits'], atol=1e-4)

  def test_generates_as_the_files_say(self):
    folder = self.copy()
    (folder / 'generation_config.json').write_text(
      json.dumps(
        {'do_sample': True, 'temperature': 0.6, 'top_p': 0.9}
        | {'eos_token_id': [2, 0], 'top_k': 20}
      )
    )
    pretrained_runs.import_run(str(folder), self.workdir)
    config = configs.load(str(self.workdir / 'config.json'))
    generate = config.generate
    self.assertEqual(
      (generate.temperature, generate.top_p, generate.top_k, generate.stop),
      (0.6, 0.9, 20, ('<|im_end|>',)),
    )
    config = configs.override(
      config, ['generate.prompt=what', 'generate.num_tokens=5']
    )
    with compiling.quickly(), contextlib.redirect_stdout(io.StringIO()) as out:
      training.run(config, self.workdir, 'generate')
    self.assertStartsWith(out.getvalue(), 'what')
    wrong = configs.override(config, ['generate.stop=["</s>"]'])
    with self.assertRaisesRegex(
      errors.UserError, "generate.stop has '</s>', which is no special token"
    ):
      training.run(wrong, self.workdir, 'generate')

  def test_a_prompt_is_a_message_of_the_chat_template(self):
    if importlib.util.find_spec('jinja2') is None:
      self.skipTest('needs Jinja2: make extras')
    folder = self.copy()
    (folder / 'chat_template.jinja').write_text(
      "{{ '<|im_start|>' + messages[0]['content'] + '<|im_end|>' }}"
    )
    pretrained_runs.import_run(str(folder), self.workdir)
    config = configs.override(
      configs.load(str(self.workdir / 'config.json')),
      ['generate.prompt=ab', 'generate.template=chat'],
    )
    tokenizer = text_workload.make_tokenizer(config)
    prompt = text_workload.encode_prompt(config, tokenizer)
    np.testing.assert_array_equal(prompt, [[1, 4, 5, 2]])
    without = dataclasses.replace(config, base=None)
    with self.assertRaisesRegex(errors.UserError, "template='chat' needs the"):
      text_workload.encode_prompt(without, tokenizer)

  def test_training_begins_with_the_base_and_is_exported(self):
    base = self.imported(dtype=ml_dtypes.bfloat16)
    (self.root / 'text.txt').write_text(TEXT * 100)
    config = configs.override(
      base,
      [
        f'data.source={self.root / "text.txt"}',
        f'data.cache_dir={self.root / "cache"}',
        'data.sequence_length=16',
        'data.validation_fraction=0',
        'train.num_steps=1',
        'train.warmup_steps=0',
        'train.learning_rate=1e-3',
        'train.weight_decay=0',
        'generate.num_tokens=2',
        'generate.prompt=a',
      ],
    )
    workdir = self.root / 'tuned'
    with compiling.quickly(), contextlib.redirect_stdout(io.StringIO()):
      training.run(config, workdir, 'train')
    before = self.restore(base, self.workdir)
    after = self.restore(config, workdir)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after)
    largest = max(jax.tree.leaves(moved))
    self.assertBetween(largest, 1e-4, 1.1e-3)  # one step of Adam
    pretrained_runs.export_run(config, after, self.root / 'out')
    source = pretrained.open_source(self.root / 'out')
    self.assertEqual({x.dtype for x in source.tensors.values()}, {'BF16'})
    again = pretrained.load(self.root / 'out', dtype=np.float32)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8),
      again.params,
      after,
    )
    self.assertEqual(
      source.files['tokenizer.json'],
      (self.workdir / 'pretrained' / 'tokenizer.json').read_bytes(),
    )
    pretrained_runs.export_run(
      config, after, self.root / 'wide', dtype='float32'
    )
    again = pretrained.load(self.root / 'wide')
    self.assertEqual(again.source.config['dtype'], 'float32')
    jax.tree.map(np.testing.assert_array_equal, again.params, after)
    pretrained_runs.export_run(base, None, self.root / 'half', dtype='float16')
    again = pretrained.load(self.root / 'half', dtype=np.float32)
    tensors = again.source.tensors.values()
    self.assertEqual({x.dtype for x in tensors}, {'F16'})
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8, atol=1e-6),
      again.params,
      before,
    )

  @parameterized.parameters(
    ({}, 'is not an empty folder', 'base/mine'),
    ({'tokenizer': 'x.txt'}, 'is neither a .json nor a .model', None),
    ({'tokenizer': 'x.json'}, '--tokenizer=x.json cannot be read', None),
  )
  def test_refuses_imports(self, settings, message, file):
    folder = str(self.copy())
    if file:
      (self.root / file).parent.mkdir()
      (self.root / file).touch()
    with self.assertRaisesRegex(errors.UserError, message):
      pretrained_runs.import_run(folder, self.workdir, **settings)

  def test_refuses_tokenizers(self):
    folder = self.copy()
    (folder / 'tokenizer.json').unlink()
    with self.assertRaisesRegex(errors.UserError, 'with --tokenizer=FILE'):
      pretrained_runs.import_run(str(folder), self.workdir)
    other = self.root / 'other.json'
    other.write_bytes(make_tokenizer(num_more=10))
    with self.assertRaisesRegex(
      errors.UserError, 'other.json has 40 tokens, and the model 37; give'
    ):
      pretrained_runs.import_run(
        str(folder), self.workdir, tokenizer=str(other)
      )
    self.assertFalse(self.workdir.exists())
    self.assertEmpty(list(self.root.glob('draft-*')))
    other.write_bytes(make_tokenizer())
    pretrained_runs.import_run(str(folder), self.workdir, tokenizer=str(other))

  def test_refuses_bases_and_exports(self):
    config = self.imported()
    window = dataclasses.replace(config.model.mixer, window=8, num_sinks=2)
    windowed = dataclasses.replace(
      config, model=dataclasses.replace(config.model, mixer=window)
    )
    with self.assertRaisesRegex(
      errors.UserError, 'model.mixer.window=8 has no form in llama'
    ):
      pretrained_runs.export_run(windowed, None, self.root / 'out')
    without = dataclasses.replace(config, base=None)
    with self.assertRaisesRegex(errors.UserError, 'did not begin with pretr'):
      pretrained_runs.export_run(without, None, self.root / 'out')
    shutil.rmtree(self.workdir / 'pretrained')
    with self.assertRaisesRegex(errors.UserError, r'base=\S+: .*no such fo'):
      pretrained_runs.export_run(config, None, self.root / 'out')
    self.assertFalse((self.root / 'out').exists())

  def call(self, program, *arguments, code=0):
    done = subprocess.run(
      [sys.executable, _ROOT / 'launch' / program, *arguments],
      capture_output=True,
      text=True,
      cwd=self.root,
    )
    self.assertEqual(done.returncode, code, done.stderr)
    return done.stderr if code else done.stdout

  def test_the_programs(self):
    self.copy('qwen2')
    said = self.call('import.py', '--from=qwen2', '--workdir=base')
    self.assertIn('base: qwen2, 4,576 parameters, 2 layers of 16', said)
    said = self.call('export.py', '--workdir=base', '--to=out')
    self.assertIn('out: qwen2, 26 tensors.', said)
    for name in ('config.json', 'tokenizer.json', 'model.safetensors'):
      self.assertEqual(
        (self.root / 'out' / name).read_bytes(),
        (self.workdir / 'pretrained' / name).read_bytes(),
      )
    for program, arguments, message in (
      ('import.py', ['--workdir=new'], '--from is missing'),
      ('import.py', ['--from=qwen', '--workdir=new'], 'no such folder'),
      ('export.py', ['--workdir=out', '--to=new'], 'config'),
      ('export.py', ['--workdir=qwen', '--to=new'], 'holds no run'),
    ):
      said = self.call(program, *arguments, code=2)
      self.assertIn(message, said)
      self.assertLen(said.splitlines(), 1)
      self.assertFalse((self.root / 'new').exists())
