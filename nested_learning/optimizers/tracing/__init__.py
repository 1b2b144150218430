"""Follows the parameters of a model through its traced loss.

`matrices.py` finds which parameters are matrices, and which axes are contracted
with data; `capture.py` measures the inputs of linear maps in the backward pass.
"""
