"""One thread for every test: their matrices are tiny, and threads that wait for each other cost far more."""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start

import torch

# The packages of requirements-oracles.txt, kept out of everybody else's sight (scripts/setup.sh)
sys.path.append(str(Path(__file__).resolve().parent.parent / ".venv" / "oracles"))

torch.set_num_threads(1)
