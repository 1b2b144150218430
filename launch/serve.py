"""Serves a checkpoint behind OpenAI's API, with sessions that learn.

    python launch/serve.py --workdir=runs/quickstart
    python launch/serve.py --workdir=runs/smollm2 --port=8080 \
      --api_key_file=key.txt

--workdir is a run of launch/run.py or launch/import.py. The sessions are kept
below it, or in --sessions. SIGTERM and Ctrl-C save all sessions and end the
server. nested_learning/serving/README.md describes the routes.
"""

import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if _ROOT not in sys.path:
  sys.path.insert(0, _ROOT)  # A checkout runs without being installed.

from launch import startup

if __name__ == '__main__':
  startup.begin(huge_pages=True)  # before the imports, which take longer

import contextlib
import ipaddress
import pathlib
import signal
import socket
import threading

from absl import flags

from launch import programs
from launch import workdirs
from nested_learning import errors

_SHUTDOWN_SECONDS = 5  # that requests in work have to end
_ANSWER_SECONDS = 3  # more, in which the others are told that they have not

_WORKDIR = flags.DEFINE_string('workdir', None, 'The folder of the run.')
_SET = flags.DEFINE_multi_string(
  'set', [], 'A change of the config, such as inner.levels=64,256. Repeatable.'
)
_SESSIONS = flags.DEFINE_string(
  'sessions', None, 'Folder of the sessions; by default WORKDIR/sessions.'
)
_NAME = flags.DEFINE_string(
  'name', None, 'Name of the model in the API; by default that of the workdir.'
)
_HOST = flags.DEFINE_string(
  'host',
  '127.0.0.1',
  'Address to listen at. Others than this machine need a key.',
)
_PORT = flags.DEFINE_integer(
  'port',
  8000,
  'Port; 0 for any that is free.',
  lower_bound=0,
  upper_bound=65535,
)
_KEY = flags.DEFINE_string(
  'api_key_file', None, 'A file whose first line requests must send as the key.'
)
_MAX_BYTES = flags.DEFINE_integer(
  'max_bytes', 16 * 2**20, 'Most bytes of a body.', lower_bound=1
)
_LIMITS = {
  'num_slots': 'Requests in work at a time.',
  'max_queue': 'Requests that wait for a slot.',
  'read_rows': 'Texts that one program reads; by default 1 on CPUs, else all.',
  'max_read_tokens': 'Most tokens that a request reads.',
  'max_draw_tokens': 'Most tokens that a request draws.',
  'max_sessions': 'Sessions in memory and on the disk.',
  'max_resident': 'Sessions in memory.',
}
for _name, _help in _LIMITS.items():
  flags.DEFINE_integer(_name, None, _help, lower_bound=0)
_SECONDS = {
  'idle_seconds': 'Seconds after which a session leaves the memory.',
  'save_seconds': 'Most seconds from a change of a session to its save.',
}
for _name, _help in _SECONDS.items():
  flags.DEFINE_float(_name, None, _help, lower_bound=0)


def main() -> None:
  """Parses the flags and serves."""
  programs.start(_run, example='--workdir=runs/quickstart')


def _run() -> None:
  if not _WORKDIR.value:
    raise errors.UserError('--workdir is missing; see --help.')
  programs.check_path('workdir', _WORKDIR.value, folder=True)
  programs.check_path('sessions', _SESSIONS.value, folder=True)
  workdir = workdirs.local(_WORKDIR.value)
  if not (workdir / 'config.json').is_file():
    raise errors.UserError(
      f'--workdir={workdir} holds no run; give the folder of one, such as '
      'runs/quickstart after `make demo`.'
    )
  key = _read_key()
  is_local = _is_loopback(_HOST.value)
  if not is_local and key is None:
    raise errors.UserError(
      f'--host={_HOST.value} lets other machines in; give a key with '
      '--api_key_file=FILE.'
    )
  # Importing takes seconds; mistakes in flags are answered before.
  with contextlib.closing(_listen()) as listener:
    _serve(workdir, listener, key=key, is_local=is_local)


def _serve(
  workdir: pathlib.Path,
  listener: socket.socket,
  *,
  key: str | None,
  is_local: bool,
) -> None:
  """Answers requests until a signal ends the server; saves all sessions."""
  try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn
  except ImportError as error:
    raise errors.UserError(
      f'the server needs the package {error.name}; install it with `pip '
      'install "nested-learning[serve]"`.'
    ) from error
  from nested_learning.serving import app as app_lib

  worker = _make_worker(workdir)
  try:
    hosts = {'hosts': ('*',)} if not is_local else {}
    config = app_lib.AppConfig(key=key, max_bytes=_MAX_BYTES.value, **hosts)
    server = uvicorn.Server(
      uvicorn.Config(
        app_lib.make_app(worker, config),
        log_level='warning',
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS + _ANSWER_SECONDS,
        server_header=False,
      )
    )
    _end_on_signals(server, worker)
    host, port = listener.getsockname()[:2]
    host = f'[{host}]' if ':' in host else host
    name = worker.service.checkpoint.name
    print(f'Serving {name} at http://{host}:{port}/v1', flush=True)
    server.run(sockets=[listener])
  finally:
    worker.stop()
  print(f'All {len(worker.service.store)} sessions are saved.')


def _make_worker(workdir: pathlib.Path):
  """Opens the checkpoint and the sessions in the thread that serves them."""
  import jax

  from nested_learning import configs
  from nested_learning import serving
  from nested_learning.serving import checkpoints
  from nested_learning.training import trainer

  config = configs.load_experiment(str(workdir / 'config.json')).config
  config = configs.override(config, list(_SET.value))
  given = {name: flags.FLAGS[name].value for name in (*_LIMITS, *_SECONDS)}
  limits = serving.Limits(**{k: v for k, v in given.items() if v is not None})
  folder = pathlib.Path(_SESSIONS.value or workdir / 'sessions')
  name = _NAME.value or workdir.resolve().name

  def make_service():
    checkpoint = checkpoints.open_checkpoint(config, workdir, name=name)
    service = serving.Service(checkpoint, folder, limits)
    checkpoints.warm_up(service)
    return service

  return serving.Worker(
    make_service, context=lambda: jax.set_mesh(trainer.make_mesh(config))
  )


def _read_key() -> str | None:
  if _KEY.value is None:
    return None
  try:
    lines = pathlib.Path(_KEY.value).read_text(encoding='utf-8').splitlines()
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or 'it is not text'
    raise errors.UserError(
      f'--api_key_file={_KEY.value} cannot be read ({reason}).'
    ) from error
  key = lines[0].strip() if lines else ''
  if not key or not key.isascii():
    raise errors.UserError(
      f'--api_key_file={_KEY.value} must begin with a line of ASCII, the key.'
    )
  return key


def _is_loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == 'localhost'


def _listen() -> socket.socket:
  host, port = _HOST.value, _PORT.value
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family)
  except OSError as error:
    reason = error.strerror or error
    raise errors.UserError(
      f'cannot listen at --host={host} --port={port} ({reason}); name another '
      'port, or 0 for any.'
    ) from error


def _end_on_signals(server, worker) -> None:
  """Lets the first signal end the server, and a second one its requests."""
  server.capture_signals = contextlib.nullcontext

  def end_requests():
    with contextlib.suppress(errors.UserError):  # it has ended
      worker.call(worker.service.end_requests)

  def end(number, _):
    server.force_exit = server.should_exit
    if not server.should_exit:
      timer = threading.Timer(_SHUTDOWN_SECONDS, end_requests)
      timer.daemon = True
      timer.start()
    server.should_exit = True

  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, end)


if __name__ == '__main__':
  main()
