"""The tokenizer of a GGUF file, as a tokenizer.json."""

from collections.abc import Mapping
from typing import Any

from nested_learning import errors

# How texts are split before byte pairs are merged, in the notation of the
# package tokenizers, by `tokenizer.ggml.pre`.
_WORDS = {
  'llama-bpe': (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
  ),
  'qwen2': (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
  ),
}
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens


def make(fields: Mapping[str, Any]) -> bytes | None:
  """Makes a tokenizer.json.

  Args:
    fields: Metadata of a GGUF file.

  Returns:
    Its content; None if the file has no byte-level BPE, or splits texts in a
    way that is not known here.

  Raises:
    errors.UserError: The package tokenizers is not installed.
  """
  kind = fields.get('tokenizer.ggml.pre', 'gpt-2')
  known = {'gpt-2', 'smollm', *_WORDS}
  if fields.get('tokenizer.ggml.model') != 'gpt2' or kind not in known:
    return None
  try:
    import tokenizers
  except ImportError as error:
    raise errors.UserError(
      'a tokenizer in a GGUF needs the package tokenizers; install it with '
      '`pip install "nested-learning[tokenizers]"`.'
    ) from error
  tokens = fields['tokenizer.ggml.tokens']
  types = fields.get('tokenizer.ggml.token_type') or [1] * len(tokens)
  merges = [
    tuple(merge.split(' ')) for merge in fields['tokenizer.ggml.merges']
  ]
  model = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={token: i for i, token in enumerate(tokens)}, merges=merges
    )
  )
  split = tokenizers.pre_tokenizers
  byte_level = split.ByteLevel(
    add_prefix_space=False, use_regex=kind not in _WORDS
  )
  if kind == 'smollm':
    first = [split.Digits(individual_digits=True)]
  elif kind in _WORDS:
    words = tokenizers.Regex(_WORDS[kind])
    first = [split.Split(words, behavior='isolated')]
  else:
    first = []
  model.pre_tokenizer = split.Sequence([*first, byte_level])
  model.decoder = tokenizers.decoders.ByteLevel()
  if kind == 'qwen2':
    model.normalizer = tokenizers.normalizers.NFC()
  added = [
    tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
    for token, kind in zip(tokens, types, strict=True)
    if kind in (_CONTROL, _USER_DEFINED)
  ]
  model.add_tokens(added)
  return model.to_str().encode()
