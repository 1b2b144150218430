"""Text as deterministic batches of tokens; see README.md."""

from nested_learning.data.documents import Documents
from nested_learning.data.formats import open_documents
from nested_learning.data.pipeline import Batches
from nested_learning.data.pipeline import DataConfig
from nested_learning.data.pipeline import make_iterator
from nested_learning.data.sources import read_text
from nested_learning.data.tokenizers import make_tokenizer
from nested_learning.data.tokenizers import Tokenizer
