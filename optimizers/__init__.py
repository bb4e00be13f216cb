"""RACS and Alice, and the frame they stand in: optimizers for weight matrices, with Adam for everything else.

Gong, Scetbon, Ma, Meeds: Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation with a
Low-Rank Extension, arXiv 2502.07752. An independent implementation.
"""

from .alice import Alice
from .base import Context, MatrixOptimizer
from .combined import Combined
from .factory import METHODS, create
from .partition import describe, partition
from .racs import RACS

__all__ = ["METHODS", "RACS", "Alice", "Combined", "Context", "MatrixOptimizer", "create", "describe", "partition"]
