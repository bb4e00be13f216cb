"""Many training runs: which ones a plan asks for (plan.py), and running them on this machine (local.py, search.py) or as jobs
of a cluster (cluster.py)."""

from .local import Sweep
from .plan import Job, Plan, load_plan
from .search import SearchSweep

__all__ = ["Job", "Plan", "SearchSweep", "Sweep", "load_plan"]
