"""Times PyTorch implementations of Hope and Titans, for `peers.py`.

It runs in an environment of its own (see there), because the peer's package has
the same name as this one, and imports nothing of this repository.

    python peers_torch.py '{"num_layers": 2, "embed_dim": 256, ...}'

prints tokens per second of processor time by name, as JSON.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F

VOCAB_SIZE = 257


def main() -> None:
  """Times every model and prints the rates."""
  torch.set_num_threads(1)
  torch.manual_seed(0)
  sizes = json.loads(sys.argv[1])
  rates = {}
  for chunk in sizes['chunk_sizes']:
    hope = make_hope(sizes, chunk)
    rates[f'train_{chunk}'] = time_training(hope, sizes)
    rates[f'lmm_{chunk}'] = time_memory(sizes, chunk)
  rates['mac'] = time_mac(sizes)
  rates['decode'] = time_decoding(hope, sizes)
  print(json.dumps(rates))


def make_hope(sizes, chunk):
  """Makes self-modifying Hope, with a chain of two levels."""
  from nested_learning import levels
  from nested_learning import model

  return model.HOPEModel(
    model.ModelConfig(
      vocab_size=VOCAB_SIZE,
      dim=sizes['embed_dim'],
      num_layers=sizes['num_layers'],
      heads=sizes['num_heads'],
      titan_level=levels.LevelSpec('titan', 64),
      cms_levels=[levels.LevelSpec('fast', 64), levels.LevelSpec('slow', 256)],
      block_variant='hope_selfmod',
      self_mod_chunk_size=chunk,
      self_mod_use_skip=False,
    )
  )


def time_training(hope, sizes):
  """Times a step as its trainer takes it: a backward pass and writes by piece.

  A piece sees the writes of those before it; no gradient goes through writes.
  """
  from nested_learning import training

  optimizer = torch.optim.AdamW(hope.parameters(), lr=1e-3)
  tokens = torch.randint(0, 256, (1, sizes['num_tokens']))

  def step():
    optimizer.zero_grad()
    state = hope.init_fast_state()
    for piece, is_last in training._iter_online_token_chunks(
      tokens, chunk_size=64
    ):
      logits, _, outputs = hope.forward_with_block_outputs(
        piece, fast_state=state
      )
      loss = F.cross_entropy(logits[0, :-1], piece[0, 1:])
      signals = training._compute_layer_teach_signals(loss, outputs)
      loss.backward()
      with torch.no_grad():
        hope(
          piece,
          teach_signals=signals,
          fast_state=state,
          finalize_updates=is_last,
        )
    optimizer.step()

  return sizes['num_tokens'] / fastest(step, sizes['repeats'])


def time_decoding(hope, sizes):
  """Times greedy generation in which every token is also written."""
  from nested_learning import training

  hope.eval()
  state = hope.init_fast_state()

  @torch.no_grad()
  def decode():
    token = torch.zeros((1, 1), dtype=torch.long)
    for _ in range(sizes['decode_steps']):
      logits = hope(token, fast_state=state)
      following = logits[:, -1:].argmax(-1)
      signal = training.compute_teach_signal(
        hope, logits, token, next_tokens=following
      )
      hope(token, teach_signal=signal, fast_state=state)
      token = following

  return sizes['decode_steps'] / fastest(decode, sizes['repeats'])


def time_mac(sizes):
  """Times a gradient of Titans' memory as context, segments of 64 tokens."""
  import titans_pytorch

  heads = sizes['num_heads']
  model = titans_pytorch.MemoryAsContextTransformer(
    num_tokens=VOCAB_SIZE,
    dim=sizes['embed_dim'],
    depth=sizes['num_layers'],
    heads=heads,
    dim_head=sizes['embed_dim'] // heads,
    segment_len=64,
    neural_memory_segment_len=64,
    neural_memory_layers=tuple(range(1, sizes['num_layers'] + 1)),
    num_persist_mem_tokens=4,
    num_longterm_mem_tokens=4,
  )
  tokens = torch.randint(0, 256, (1, sizes['num_tokens'] + 1))

  def gradient():
    model.zero_grad()
    model(tokens, return_loss=True).backward()

  return sizes['num_tokens'] / fastest(gradient, sizes['repeats'])


def time_memory(sizes, chunk):
  """Times a gradient of Titans' memory layer alone, hidden layer 4x, a head."""
  import titans_pytorch

  dim = sizes['embed_dim']
  network = titans_pytorch.MemoryMLP(dim, depth=2, expansion_factor=4.0)
  memory = titans_pytorch.NeuralMemory(
    dim=dim, chunk_size=chunk, model=network, momentum=True
  )
  inputs = torch.randn(1, sizes['num_tokens'], dim, requires_grad=True)

  def gradient():
    memory.zero_grad()
    outputs, _ = memory(inputs)
    (outputs**2).sum().backward()

  return sizes['num_tokens'] / fastest(gradient, sizes['repeats'])


def fastest(function, repeats):
  """Returns the processor seconds of the fastest call after the first."""
  function()
  seconds = []
  for _ in range(repeats):
    begin = time.process_time()
    function()
    seconds.append(time.process_time() - begin)
  return min(seconds)


if __name__ == '__main__':
  main()
