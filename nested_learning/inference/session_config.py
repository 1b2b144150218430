"""What a session does where nobody says how."""

import dataclasses

from nested_learning import levels
from nested_learning import models


def default_inner(config: models.ModelConfig) -> levels.InnerConfig:
  """All levels of a chain learn, every 128, 512, 2K, ... tokens.

  The papers begin at 512, for models of 10^8 parameters and more. A Transformer
  of half a million, on 16K bytes of code that it was not trained on, comes from
  2.60 nats per byte to 1.95 with steps every 128 and to 2.15 every 512, where
  all its blocks learn (`depth=1.0`; here it is the last quarter of them, which
  is cheaper, see `levels.InnerConfig`).
  """
  sizes = tuple(128 * 4**i for i in range(len(config.levels)))
  return levels.InnerConfig(sizes)


@dataclasses.dataclass(frozen=True)
class SessionConfig:
  """What to do with a session from the terminal."""

  path: str | None = None  # file of the session; begun where there is none
  feed: tuple[str, ...] = ()  # files of text, read in this order
  prompt: str | None = None  # text that is answered, then read
