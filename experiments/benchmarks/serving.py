"""Load on the server: tokens per second and latency by number of sessions.

Command:
  python launch/run.py --config=experiments/benchmarks/serving.py \
    --workdir=runs/serving

Hardware: CPU cores, or any accelerator.
Results: experiments/results/benchmarks/README.md.

Every session asks again as soon as it has its answer. The requests go to the
service in this process, without HTTP. summary.json has, for each of `sessions`
and each way to serve them,
  tokens_per_second_WAY_N: tokens read and drawn, by all N sessions;
  tokens_per_cpu_second_WAY_N: the same by processor time of all threads, which
    other work on the machine changes less;
  seconds_WAY_N_p50, _p95: from a request to its end;
  first_WAY_N_p50, _p95: from a request to its first token.
The ways are 'learning' on all slots, 'resting' with learn=False, and 'alone',
which is learning with a single slot: one request at a time. The soak has
  soak_growth: bytes of the process at the end over those after a tenth of the
    requests, of `soak_requests` on more sessions than fit the memory;
  soak_arrays: arrays on the devices at the end less those after a tenth;
  soak_failed: requests that failed, other than those that were cancelled.
experiments/benchmarks/serving.py:soak runs the soak alone.
"""

import dataclasses
import gc
import os
import pathlib
import tempfile
import time

import jax
import numpy as np
import tqdm

from experiments import report_files
from experiments.benchmarks import levels
from nested_learning import data
from nested_learning import errors
from nested_learning import inference
from nested_learning import serving


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """Sizes of the model and of the load."""

  num_layers: int = 4
  embed_dim: int = 256
  window: int = 512  # tokens of attention
  update_every: tuple[int, ...] = (128, 512)  # tokens
  sessions: tuple[int, ...] = (1, 8, 32)
  num_slots: int = 8
  requests: int = 4  # of each session
  prompt_tokens: int = 192
  answer_tokens: int = 64
  soak_requests: int = 10_000
  soak_sessions: int = 16
  soak_resident: int = 4  # of them in memory


def get_config(arg: str | None = None) -> BenchmarkConfig:
  """Returns the benchmark; 'soak' only soaks, 'small' is tiny."""
  small = BenchmarkConfig(
    num_layers=1,
    embed_dim=16,
    window=8,
    update_every=(8, 16),
    sessions=(1, 3),
    num_slots=2,
    requests=2,
    prompt_tokens=12,
    answer_tokens=4,
    soak_requests=60,
    soak_sessions=4,
    soak_resident=2,
  )
  if arg == 'small':
    return small
  if arg == 'soak':
    return dataclasses.replace(small, sessions=(), soak_requests=10_000)
  if arg is not None:
    raise errors.UserError(f"{arg!r} must be 'soak' or 'small', or nothing.")
  return BenchmarkConfig()


# Whether levels learn, and whether all slots are in use, by the way to serve.
_WAYS = {
  'learning': (True, True),
  'resting': (False, True),
  'alone': (True, False),
}


def run(config: BenchmarkConfig, workdir: str, mode: str) -> None:
  """Measures all ways with all numbers of sessions, and soaks."""
  report_files.check_mode(mode)
  checkpoint, summary = _make_checkpoint(config), {}
  for name, (learn, all_slots) in _WAYS.items():
    for count in tqdm.tqdm(config.sessions, desc=name):
      slots = config.num_slots if all_slots else 1
      found = _measure(config, checkpoint, count, learn=learn, slots=slots)
      for key, value in found.items():
        prefix, _, suffix = key.partition('|')
        summary[f'{prefix}_{name}_{count}{suffix}'] = value
  summary |= _soak(config)
  report_files.write_numbers(
    workdir,
    config,
    module=__name__,
    summary=summary,
    title=['# Serving'],
  )


def _make_checkpoint(config: BenchmarkConfig) -> serving.Checkpoint:
  names = [f'level_{i}' for i in range(len(config.update_every))]
  tokenizer = data.make_tokenizer('bytes')
  session = levels.make_session(
    config,
    dict.fromkeys(names, config.embed_dim),
    tokenizer_fingerprint=tokenizer.fingerprint,
  )
  return serving.Checkpoint('benchmark', session, tokenizer)


class _Client:
  """Asks again and again on a session; keeps the times of each request."""

  def __init__(self, config, service, entry, seed, *, learn, requests):
    self.config, self.service, self.entry = config, service, entry
    self.learn, self.left = learn, requests
    self.random = np.random.default_rng(seed)
    self.seconds, self.first, self.num_tokens = [], [], 0
    self.errors = []

  def ask(self) -> serving.Ticket:
    """Sends a request; its end sends the next one."""
    config, begin, seen = self.config, time.perf_counter(), []

    def on_text(*_):
      if not seen:
        seen.append(time.perf_counter() - begin)

    def on_end(result):
      if isinstance(result, Exception):
        self.errors.append(result)
        return
      self.seconds.append(time.perf_counter() - begin)
      self.first += seen
      self.num_tokens += result.num_read + len(result.drawn)
      if self.left:
        self.ask()

    self.left -= 1
    settings = inference.DrawSettings(int(self.random.integers(2**31)))
    running = self.service.start(
      serving.Request(
        'benchmark',
        text=self.random.integers(32, 127, config.prompt_tokens).tolist(),
        session=self.entry,
        learn=self.learn,
        measure=self.learn,  # as the server does
        draw=serving.Draw(config.answer_tokens, settings),
      ),
      on_end,
      on_text,
    )
    return running.ticket


def _measure(config, checkpoint, count, *, learn, slots) -> dict[str, float]:
  """Returns numbers of one way to serve; '|' stands for way and sessions."""
  limits = serving.Limits(num_slots=slots, max_queue=count)

  def serve(requests):
    with tempfile.TemporaryDirectory() as folder:
      service = serving.Service(checkpoint, pathlib.Path(folder), limits)
      clients = [
        _Client(
          config,
          service,
          service.store.create(),
          i,
          learn=learn,
          requests=requests,
        )
        for i in range(count)
      ]
      begin = time.perf_counter(), time.process_time()
      for client in clients:
        client.ask()
      while service.step():
        pass
      end = time.perf_counter(), time.process_time()
      service.close()
    for client in clients:
      for error in client.errors:
        raise error
    return clients, *np.subtract(end, begin)

  serve(1)  # compiles
  clients, seconds, cpu_seconds = serve(config.requests)
  num_tokens = sum(client.num_tokens for client in clients)
  waits = sum((client.seconds for client in clients), [])
  first = sum((client.first for client in clients), [])
  return {
    'tokens_per_second|': num_tokens / seconds,
    'tokens_per_cpu_second|': num_tokens / cpu_seconds,
    **{
      f'{name}|_p{p}': float(np.percentile(values, p))
      for name, values in (('seconds', waits), ('first', first))
      for p in (50, 95)
    },
  }


def _soak(config: BenchmarkConfig) -> dict[str, float]:
  """Serves many requests on sessions that come and go."""
  small = get_config('small')
  limits = serving.Limits(
    max_resident=config.soak_resident, idle_seconds=0, save_seconds=0
  )
  random, num_failed, before = np.random.default_rng(0), 0, None
  with tempfile.TemporaryDirectory() as folder:
    service = serving.Service(
      _make_checkpoint(small), pathlib.Path(folder), limits
    )
    store = service.store
    for i in tqdm.trange(config.soak_requests, desc='soak'):
      while len(store) < config.soak_sessions:
        store.create()
      entry = store.all()[random.integers(len(store))]
      num_failed += _soak_one(small, service, entry, i)
      if i % 5 == 0:
        store.delete(entry.id)
      if i == config.soak_requests // 10:
        before = _measure_memory(store)
    after = _measure_memory(store)
    service.close()
  return {
    'soak_requests': config.soak_requests,
    'soak_growth': after[0] / before[0],
    'soak_arrays': after[1] - before[1],
    'soak_failed': num_failed,
  }


def _soak_one(config, service, entry, i: int) -> bool:
  """Serves a request; returns whether it failed."""
  client = _Client(config, service, entry, i, learn=i % 3 > 0, requests=1)
  ticket = client.ask()
  if i % 7 == 0:  # a client that goes away
    service.step()
    service.engine.cancel(ticket)
  while service.step():
    pass
  return bool(client.errors) and not ticket.is_cancelled


def _measure_memory(store: serving.Store) -> tuple[int, int]:
  """Returns bytes of this process and arrays, with all sessions on the disk."""
  while store.num_resident:
    store.tick()
  gc.collect()
  fields = pathlib.Path('/proc/self/statm').read_text().split()
  resident = int(fields[1]) * os.sysconf('SC_PAGE_SIZE')
  return resident, len(jax.live_arrays())
