"""Many training runs: which ones a plan asks for (plan.py), and running them on this machine (local.py)."""

from .local import Sweep
from .plan import Job, Plan, load_plan

__all__ = ["Job", "Plan", "Sweep", "load_plan"]
