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
import urllib.error
import urllib.request

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from nested_learning import errors
from nested_learning import levels
from nested_learning import serving
from nested_learning import training
from nested_learning.serving import checkpoints
from tests import compiling
from tests.training import tiny

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def train(test):
  """Trains a model for a step; returns its config and its folder."""
  root = pathlib.Path(test.create_tempdir().full_path)
  config = tiny.experiment(
    root,
    train={'num_steps': 1},
    inner=levels.make_inner((16, 32), learning_rate=0.3),
  )
  with contextlib.redirect_stdout(io.StringIO()):
    training.run(config, root / 'run', 'train')
  return config, root / 'run'


class CheckpointTest(absltest.TestCase):
  def test_opens_the_last_checkpoint_of_a_run(self):
    with compiling.quickly():
      config, workdir = train(self)
      checkpoint = checkpoints.open_checkpoint(config, workdir, name='tiny')
      service = serving.Service(
        checkpoint, workdir / 'sessions', serving.Limits()
      )
      self.addCleanup(service.close)
      checkpoints.warm_up(service)
      found = []
      draw = serving.Draw(4)
      entry = service.store.create()
      request = serving.Request(
        'x', text='line 3 of file', session=entry, learn=True, draw=draw
      )
      service.start(request, found.append)
      while service.step():
        pass
    self.assertEqual(found[0].num_read, 15)
    self.assertEqual(found[0].steps, {'fast': 1, 'slow': 0})
    with self.assertRaisesRegex(errors.UserError, 'no checkpoint'):
      checkpoints.open_checkpoint(config, workdir / 'no', name='tiny')


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
    _, workdir = train(self)
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


if __name__ == '__main__':
  absltest.main()
