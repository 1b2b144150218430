"""Nested Learning in JAX: memories, levels, optimisers and models.

Import the part you need, for example `from nested_learning import models`;
this file imports nothing, so that `import nested_learning` stays light.
"""

__version__ = '0.1.0'
