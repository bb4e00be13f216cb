"""One thread for every test: their matrices are tiny, and threads that wait for each other cost far more."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start

import pytest
import torch

# The packages of requirements-oracles.txt, kept out of everybody else's sight (scripts/setup.sh)
sys.path.append(str(Path(__file__).resolve().parent.parent / ".venv" / "oracles"))

torch.set_num_threads(1)


@pytest.fixture
def library() -> Callable[[str], None]:
    """Skips a test of a method whose class comes from a library that is not installed, as on a lent machine."""
    from optimizers import METHODS

    def check(name: str) -> None:
        target = getattr(METHODS[name][0], "keywords", {}).get("target", "torch")
        pytest.importorskip(target.split(".")[0])

    return check
