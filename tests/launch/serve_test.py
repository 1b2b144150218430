"""Tests of launch/serve.py: mistakes in flags, kills and restarts."""

import contextlib
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import urllib.request

from absl.testing import parameterized
import pytest

from nested_learning import levels
from nested_learning import training
from tests.training import tiny

_ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.extra
class ServeTest(parameterized.TestCase):
  def start(self, *args):
    process = subprocess.Popen(
      [sys.executable, 'launch/serve.py', *map(str, args)],
      cwd=_ROOT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    self.addCleanup(process.kill)
    return process

  def ask(self, url, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {'content-type': 'application/json'}
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=100) as response:
      return json.load(response)

  @parameterized.parameters(
    ((), '--workdir is missing'),
    (('--workdir=DIR',), 'holds no run'),
    (('--workdir=DIR/run', '--host=0.0.0.0'), '--api_key_file'),
    (('--workdir=DIR/run', '--api_key_file=DIR/no'), 'No such file'),
    (('--workdir=DIR/run', '--port=PORT'), 'cannot listen'),
  )
  def test_mistakes_in_flags_get_one_line(self, args, message):
    folder = self.create_tempdir().full_path
    run = pathlib.Path(folder, 'run')
    run.mkdir()
    (run / 'config.json').write_text('{}')
    busy = self.enterContext(socket.create_server(('127.0.0.1', 0)))
    args = [x.replace('DIR', folder) for x in args]
    args = [x.replace('PORT', str(busy.getsockname()[1])) for x in args]
    process = self.start(*args)
    _, stderr = process.communicate()
    self.assertEqual(process.returncode, 2)
    self.assertIn(message, stderr)
    self.assertLen(stderr.splitlines(), 1)

  @pytest.mark.slow
  def test_sessions_survive_kills_and_ends(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    config = tiny.experiment(
      root,
      train={'num_steps': 1},
      inner=levels.make_inner((16, 32), learning_rate=0.3),
    )
    workdir = root / 'run'
    with contextlib.redirect_stdout(io.StringIO()):
      training.run(config, workdir, 'train')
    flags = f'--workdir={workdir}', '--port=0', '--save_seconds=0'
    body = {'prompt': 'line 3', 'max_tokens': 4, 'user': 'me', 'seed': 1}
    tokens = 0
    for end in (signal.SIGKILL, signal.SIGTERM, signal.SIGTERM):
      process = self.start(*flags)
      url = process.stdout.readline().split()[-1]
      listed = self.ask(f'{url}/sessions')['data']
      self.assertEqual(
        [x['tokens'] for x in listed], [tokens] if tokens else []
      )
      answer = self.ask(f'{url}/completions', body)
      tokens = answer['session']['tokens']
      session = f'{url}/sessions/{answer["session"]["id"]}'
      while not self.ask(session)['saved']:
        pass
      fingerprint = self.ask(f'{session}/health')['fingerprint']
      process.send_signal(end)
      stdout, stderr = process.communicate()
      killed = end == signal.SIGKILL
      self.assertEqual(process.returncode, -end if killed else 0, stderr)
      if not killed:
        self.assertEqual(stdout, 'All 1 sessions are saved.\n')
    self.assertLen(fingerprint, 64)
