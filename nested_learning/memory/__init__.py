"""The memory engine: associative memories that are written while they are read.

Imports JAX and, of this package, the parameter table, shardings, errors and
Newton-Schulz.
"""

from nested_learning.memory.chunk_scan import chunk_scan
from nested_learning.memory.interface import Feed
from nested_learning.memory.interface import init_state
from nested_learning.memory.interface import Result
from nested_learning.memory.interface import Rule
from nested_learning.memory.interface import State
from nested_learning.memory.networks import make_matrix
from nested_learning.memory.networks import make_mlp
from nested_learning.memory.networks import Network
from nested_learning.memory.objectives import ACTIVATIONS
from nested_learning.memory.objectives import OBJECTIVES
from nested_learning.memory.objectives import RETENTION_MAPS
from nested_learning.memory.token_loop import token_loop
