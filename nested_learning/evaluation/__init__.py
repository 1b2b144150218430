"""Bits per byte, and what the memory gains by position in the context."""

from nested_learning.evaluation.by_position import bin_edges
from nested_learning.evaluation.by_position import gain_by_position
from nested_learning.evaluation.by_position import mean_over_bins
from nested_learning.evaluation.by_position import plot
from nested_learning.evaluation.by_position import write_table
from nested_learning.evaluation.evaluate import context_position
from nested_learning.evaluation.evaluate import Evaluation
from nested_learning.evaluation.evaluate import EvaluationConfig
from nested_learning.evaluation.evaluate import make_evaluate
from nested_learning.evaluation.evaluate import Totals
