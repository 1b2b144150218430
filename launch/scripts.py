"""Values in scripts: every value that a target writes passes through here.

A value is whatever a user typed or a folder is called. It arrives unchanged, or
is refused; it never ends a quotation, a here-document or a line.
"""

from collections.abc import Iterable, Mapping
import re
import shlex

from nested_learning import errors


def quote(value: str) -> str:
  """Returns a value as one word of a shell.

  Raises:
    errors.UserError: It holds the null character, which no argument can.
  """
  if '\0' in value:
    raise errors.UserError(f'{value!r} holds a null character; leave it out.')
  return shlex.quote(value)


def join(words: Iterable[str]) -> str:
  """Returns a command as a shell reads it."""
  return ' '.join(map(quote, words))


def exports(environment: Mapping[str, str]) -> str:
  """Returns the commands that set environment variables."""
  return '\n'.join(
    f'export {name}={quote(value)}' for name, value in environment.items()
  )


def here_document(command: str, text: str, mark: str) -> str:
  """Returns a command that reads a text from its standard input.

  Args:
    command: The command, quoted.
    text: The text; the shell changes nothing in it.
    mark: The line that ends it. Where the text has such a line, the mark gets
      underscores until it has none.
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
    errors.UserError: It is no option, or holds what a line cannot.
  """
  if not re.match(r'--?[A-Za-z]', option) or re.match(r'[\w-]+\s', option):
    raise errors.UserError(
      f'--sbatch={option} is no option of sbatch; write it as one word, as in '
      '--sbatch=--partition=NAME.'
    )
  return f'#SBATCH {quote(_check_line("--sbatch", option))}'


def log_directive(folder: str, name: str) -> str:
  """Returns the line that says where Slurm writes its log.

  Args:
    folder: Folder of the log, to the letter.
    name: The file, in which %j and the like stand for numbers.

  Raises:
    errors.UserError: Slurm cannot have such a folder.
  """
  _check_line('--workdir', folder)
  if '\\' in folder:  # it would switch off the numbers in the name
    raise errors.UserError(
      f'--workdir={folder} has a backslash, which Slurm does not take in the '
      'name of a log; choose another name.'
    )
  return directive(f'--output={folder.replace("%", "%%")}/{name}')


def _check_line(flag: str, value: str) -> str:
  if re.search(r'[\x00-\x1f\x7f]', value):
    raise errors.UserError(
      f'{flag}={value!r} holds a line break or another control character, '
      'which no line of a script can; leave it out.'
    )
  return value
