"""Quotes the values in scripts for shells, here-documents and sbatch.

Every value in a script of a target or a sweep passes through this file: flags,
names of folders, environment variables. It arrives unchanged or is refused; it
never ends a quotation, a here-document or a line.
"""

from collections.abc import Iterable, Mapping
import re
import shlex

from nested_learning import errors


def quote(value: str) -> str:
  """Returns a value as one word of a shell.

  Raises:
    errors.UserError: The value has a null character, which no argument can.
  """
  if '\0' in value:
    raise errors.UserError(f'{value!r} holds a null character; leave it out.')
  return shlex.quote(value)


def join(words: Iterable[str]) -> str:
  """Returns the words of a command, quoted."""
  return ' '.join(map(quote, words))


def exports(environment: Mapping[str, str]) -> str:
  """Returns the commands that set environment variables."""
  return '\n'.join(
    f'export {name}={quote(value)}' for name, value in environment.items()
  )


def here_document(command: str, text: str, mark: str) -> str:
  """Returns a command that reads a text from its standard input.

  Args:
    command: The command, already quoted.
    text: The text; the shell does not expand it.
    mark: The line that ends it. Underscores are appended until the text has no
      such line.
  """
  lines = text.split('\n')
  while mark in lines:
    mark += '_'
  text = text if text.endswith('\n') else text + '\n'
  return f"{command} <<'{mark}'\n{text}{mark}\n"


def directive(option: str) -> str:
  """Returns an option of sbatch as a line of its script.

  Args:
    option: For instance `--partition=gpu`.

  Raises:
    errors.UserError: It is no option, or has a control character.
  """
  if not re.match(r'--?[A-Za-z]', option) or re.match(r'[\w-]+\s', option):
    raise errors.UserError(
      f'--sbatch={option} is no option of sbatch; write it as one word, as in '
      '--sbatch=--partition=NAME.'
    )
  return f'#SBATCH {quote(_check_line("--sbatch", option))}'


def log_directive(folder: str, name: str) -> str:
  """Returns the line with the path of Slurm's log.

  Args:
    folder: Folder of the log, taken literally.
    name: Name of the file, in which Slurm replaces %j and the like.

  Raises:
    errors.UserError: Slurm cannot write to such a folder.
  """
  _check_line('--workdir', folder)
  if '\\' in folder:  # Slurm would not replace %j any more
    raise errors.UserError(
      f'--workdir={folder} has a backslash, which Slurm does not allow in the '
      'path of a log; choose another name.'
    )
  return directive(f'--output={folder.replace("%", "%%")}/{name}')


def _check_line(flag: str, value: str) -> str:
  if re.search(r'[\x00-\x1f\x7f]', value):
    raise errors.UserError(
      f'{flag}={value!r} has a line break or another control character, '
      'which a line of a script cannot; remove it.'
    )
  return value
