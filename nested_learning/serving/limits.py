"""Limits of a server, and the errors of requests that exceed them."""

import dataclasses

from nested_learning import errors


@dataclasses.dataclass(frozen=True)
class Limits:
  """How much a server takes on."""

  num_slots: int = 8  # requests in work at a time
  max_queue: int = 64  # requests that wait for a slot
  # Texts that one program reads together. One at a time is exact: what a
  # session learns does not depend on others. None is 1 on CPUs, which read no
  # faster in rows, and num_slots elsewhere.
  read_rows: int | None = None
  max_read_tokens: int = 1_000_000  # tokens of one request, read
  max_draw_tokens: int = 4096  # tokens of one request, drawn
  max_sessions: int = 1000  # in memory and on the disk
  max_resident: int = 64  # sessions in memory
  idle_seconds: float = 600.0  # after which a session goes to the disk
  save_seconds: float = 30.0  # most that what was learned waits to be saved

  def __post_init__(self):
    for field in dataclasses.fields(self):
      may_be_zero = ('max_queue', 'idle_seconds', 'save_seconds')
      least = 0 if field.name in may_be_zero else 1
      value = getattr(self, field.name)
      fine = value is None or value >= least
      errors.check_field(self, field.name, fine, f'at least {least}')


class RequestError(errors.UserError):
  """A request that is refused or fails; the session stays as it was.

  Attributes:
    status: Status of HTTP.
    code: Short name of the reason, for programs.
  """

  def __init__(self, message: str, *, status: int = 400, code: str = 'invalid'):
    super().__init__(message)
    self.status, self.code = status, code
