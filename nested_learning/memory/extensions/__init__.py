"""Other ways to write a memory, each from one paper.

Each is a frozen dataclass behind the protocol `memory.Extension` and is set as
`Rule.extension`. The engine imports none of them.
"""

from nested_learning.memory.extensions.local_targets import LocalTargets
from nested_learning.memory.extensions.omega import Omega
