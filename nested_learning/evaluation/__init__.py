"""Bits per byte, the loss by position in the context, answers to tasks."""

from nested_learning.evaluation.accuracy import Answer
from nested_learning.evaluation.accuracy import cross_entropy
from nested_learning.evaluation.accuracy import ErrorEvaluation
from nested_learning.evaluation.accuracy import make_count
from nested_learning.evaluation.accuracy import squared_error
from nested_learning.evaluation.accuracy import TaskEvaluation
from nested_learning.evaluation.accuracy import write_answers
from nested_learning.evaluation.by_position import bin_edges
from nested_learning.evaluation.by_position import gain_by_position
from nested_learning.evaluation.by_position import mean_over_bins
from nested_learning.evaluation.by_position import plot
from nested_learning.evaluation.by_position import write_table
from nested_learning.evaluation.continual import continual_scores
from nested_learning.evaluation.continual import ContinualScores
from nested_learning.evaluation.continuation import make_write
from nested_learning.evaluation.continuation import WriteConfig
from nested_learning.evaluation.evaluate import context_position
from nested_learning.evaluation.evaluate import Evaluation
from nested_learning.evaluation.evaluate import EvaluationConfig
from nested_learning.evaluation.evaluate import make_evaluate
from nested_learning.evaluation.evaluate import Totals
from nested_learning.evaluation.requests import encode_pair
from nested_learning.evaluation.requests import Request
from nested_learning.evaluation.scoring import make_score
from nested_learning.evaluation.scoring import Score
