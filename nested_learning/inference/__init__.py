"""Generation from a trained model."""

from nested_learning.inference.generate import check_length
from nested_learning.inference.generate import GenerateConfig
from nested_learning.inference.generate import Generated
from nested_learning.inference.generate import make_generate
from nested_learning.inference.sampling import keep_top_k
from nested_learning.inference.sampling import keep_top_p
from nested_learning.inference.sampling import sample
from nested_learning.inference.session_config import default_inner
from nested_learning.inference.session_config import SessionConfig
from nested_learning.inference.sessions import join
from nested_learning.inference.sessions import Session
