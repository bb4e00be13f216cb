"""One thread for every test: their matrices are tiny, and threads that wait for each other cost far more."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start

import torch

torch.set_num_threads(1)
