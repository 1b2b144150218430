"""Chat templates, against the text that transformers makes of them."""

import importlib.util
import json
import pathlib
import sys
import unittest
from unittest import mock

from absl.testing import absltest
import pytest

from nested_learning import errors
from nested_learning import pretrained
from nested_learning.pretrained import chat

_CHATML = (
  '{% for message in messages %}'
  "{% if loop.first and messages[0]['role'] != 'system' %}"
  "{{ '<|im_start|>system\\nHelp.<|im_end|>\\n' }}{% endif %}"
  "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
  "'<|im_end|>' + '\\n'}}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_HELLO = [{'role': 'user', 'content': 'Who & <what>?'}]


@pytest.mark.extra
@unittest.skipUnless(
  importlib.util.find_spec('jinja2'), 'needs Jinja2: make extras'
)
class ChatTest(absltest.TestCase):
  def test_renders_messages(self):
    self.assertEqual(
      chat.render(_CHATML, _HELLO),
      '<|im_start|>system\nHelp.<|im_end|>\n'
      '<|im_start|>user\nWho & <what>?<|im_end|>\n'
      '<|im_start|>assistant\n',
    )

  def test_takes_names_and_functions_of_transformers(self):
    template = (
      '{{ bos_token }}\n'
      '  {% for m in messages %}\n'
      '  {% if loop.index > 1 %}{% break %}{% endif %}\n'
      '{{ m | tojson }}\n'
      '  {% endfor %}\n'
      "{{ strftime_now('%%') }}{{ add_generation_prompt }}"
    )
    self.assertEqual(
      chat.render(
        template, _HELLO * 2, bos_token='<s>', add_generation_prompt=False
      ),
      '<s>\n{"role": "user", "content": "Who & <what>?"}\n%False',
    )

  def test_refuses_templates(self):
    for template, message in (
      ('{% for %}', 'cannot be rendered'),
      ("{{ raise_exception('no system') }}", r'rendered \(no system\)'),
      ("{{ ''.__class__.__mro__ }}", 'cannot be rendered'),  # the sandbox
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        chat.render(template, _HELLO)

  def test_a_source_knows_its_tokens(self):
    settings = {
      'chat_template': '{{ bos_token }}{{ eos_token }}{{ unk_token }}',
      'bos_token': '<s>',
      'eos_token': {'content': '</s>'},
    }
    source = pretrained.Source(
      pathlib.Path('x'),
      {},
      {},
      {'tokenizer_config.json': json.dumps(settings).encode()},
    )
    self.assertEqual(source.render_chat(_HELLO), '<s></s>')


class WithoutTemplateTest(absltest.TestCase):
  def test_refuses(self):
    source = pretrained.Source(pathlib.Path('x'), {}, {}, {})
    with self.assertRaisesRegex(errors.UserError, 'x has no chat template'):
      source.render_chat(_HELLO)
    with (
      mock.patch.dict(sys.modules, {'jinja2': None}),
      self.assertRaisesRegex(errors.UserError, r'nested-learning\[chat\]'),
    ):
      chat.render(_CHATML, _HELLO)
