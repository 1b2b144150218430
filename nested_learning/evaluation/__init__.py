"""Evaluation of text and tasks; scoring and lm-eval."""

from nested_learning.evaluation.accuracy import Answer
from nested_learning.evaluation.accuracy import cross_entropy
from nested_learning.evaluation.accuracy import ErrorEvaluation
from nested_learning.evaluation.accuracy import generate_answers
from nested_learning.evaluation.accuracy import make_count
from nested_learning.evaluation.accuracy import squared_error
from nested_learning.evaluation.accuracy import TaskEvaluation
from nested_learning.evaluation.bits_per_byte import bin_edges
from nested_learning.evaluation.bits_per_byte import context_position
from nested_learning.evaluation.bits_per_byte import Evaluation
from nested_learning.evaluation.bits_per_byte import EvaluationConfig
from nested_learning.evaluation.bits_per_byte import gain_by_position
from nested_learning.evaluation.bits_per_byte import make_evaluate
from nested_learning.evaluation.bits_per_byte import mean_over_bins
from nested_learning.evaluation.bits_per_byte import plot_by_position
from nested_learning.evaluation.bits_per_byte import Totals
from nested_learning.evaluation.bits_per_byte import write_by_position
from nested_learning.evaluation.continuation import GenerateUntilConfig
from nested_learning.evaluation.continuation import make_generate_until
from nested_learning.evaluation.scoring import encode_pair
from nested_learning.evaluation.scoring import make_score
from nested_learning.evaluation.scoring import Request
from nested_learning.evaluation.scoring import Score
