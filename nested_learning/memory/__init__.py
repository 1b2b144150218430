"""The memory engine: associative memories that are written while they are read.

Of this package it imports the parameter table, shardings and errors alone; an
extension may import more, and the kernel counts its operations.
"""

from nested_learning.memory.chunk_scan import scan_chunks
from nested_learning.memory.extension import Extension
from nested_learning.memory.fused import scan_fused
from nested_learning.memory.networks import make_matrix
from nested_learning.memory.networks import make_mlp
from nested_learning.memory.networks import Network
from nested_learning.memory.objectives import ACTIVATIONS
from nested_learning.memory.objectives import OBJECTIVES
from nested_learning.memory.objectives import RETENTION_MAPS
from nested_learning.memory.rule import init_state
from nested_learning.memory.rule import Result
from nested_learning.memory.rule import Rule
from nested_learning.memory.rule import State
from nested_learning.memory.rule import WriteInputs
from nested_learning.memory.token_loop import scan_tokens
