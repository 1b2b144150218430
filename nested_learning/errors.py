"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
  """An error caused by a setting, a file or a flag, not by a bug.

  The message is one line that names the value and the way out. The launcher
  prints that line instead of a traceback and exits with code 2.
  """
