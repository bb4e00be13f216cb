"""RACS and Alice, their relatives, and the frame they stand in: optimizers for weight matrices, with Adam for all else.

Gong, Scetbon, Ma, Meeds: Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation with a
Low-Rank Extension, arXiv 2502.07752. An independent implementation.
"""

__version__ = "0.1.0"

from .alice import Alice
from .apollo import Apollo
from .base import Context, MatrixOptimizer
from .combined import Combined
from .eigen_adam import EigenAdam
from .factory import METHODS, create
from .fira import Fira
from .galore import GaLore
from .lamb import LAMB
from .lars import LARS
from .low_rank_soap import LowRankSOAP
from .muon import Muon
from .normalization import Normalization
from .partition import describe, partition
from .racs import RACS
from .shampoo import Shampoo
from .sharding import shard
from .soap import SOAP
from .soap_factored import SOAPFactored
from .sophia import Sophia
from .swan import SWAN
from .whitening import Whitening

__all__ = [
    "LAMB",
    "LARS",
    "METHODS",
    "RACS",
    "SOAP",
    "SWAN",
    "Alice",
    "Apollo",
    "Combined",
    "Context",
    "EigenAdam",
    "Fira",
    "GaLore",
    "LowRankSOAP",
    "MatrixOptimizer",
    "Muon",
    "Normalization",
    "SOAPFactored",
    "Shampoo",
    "Sophia",
    "Whitening",
    "create",
    "describe",
    "partition",
    "shard",
]
