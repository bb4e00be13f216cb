"""Text to batches: document sources, tokenizers, truncation or packing, the order of rows, the loader.

Row order is a function of (source, seed, protocol) only; see `loader.py`.
"""

from .errors import UserError
from .loader import TrainingBatches
from .ngrams import ngram_perplexities, training_sequences
from .rows import IGNORE, validation_rows
from .sources import Source, open_source
from .tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "IGNORE",
    "Source",
    "Tokenizer",
    "TrainingBatches",
    "UserError",
    "load_tokenizer",
    "ngram_perplexities",
    "open_source",
    "training_sequences",
    "validation_rows",
]
