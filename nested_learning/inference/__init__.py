"""Generation from a trained model, and sessions that go on learning."""

from nested_learning.inference.draw_rows import Drawn
from nested_learning.inference.draw_rows import DrawSettings
from nested_learning.inference.draw_rows import DrawSlots
from nested_learning.inference.frozen import FrozenReader
from nested_learning.inference.frozen import Guard
from nested_learning.inference.generate import check_length
from nested_learning.inference.generate import check_text
from nested_learning.inference.generate import check_tokens
from nested_learning.inference.generate import GenerateConfig
from nested_learning.inference.generate import make_generate
from nested_learning.inference.generate import make_prompt_reader
from nested_learning.inference.sampling import check_draw
from nested_learning.inference.sampling import check_sampling
from nested_learning.inference.sampling import DrawConfig
from nested_learning.inference.sampling import Generated
from nested_learning.inference.sampling import keep_top_k
from nested_learning.inference.sampling import keep_top_p
from nested_learning.inference.sampling import make_draw
from nested_learning.inference.sampling import row_keys
from nested_learning.inference.sampling import sample
from nested_learning.inference.sampling import sample_rows
from nested_learning.inference.sessions import default_inner
from nested_learning.inference.sessions import join
from nested_learning.inference.sessions import Session
from nested_learning.inference.sessions import SessionConfig
