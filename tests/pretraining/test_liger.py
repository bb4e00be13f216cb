"""liger-kernel's loss itself: on a GPU, or by Triton's interpreter where there is none (slow, but the same kernel).

Needs the packages liger-kernel and triton, which nothing else here does: skipped without them.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMPARE = """
import json, torch
from tests.pretraining import test_loss as t
device = "cuda" if torch.cuda.is_available() else "cpu"
net, (ids, labels) = t.model().to(device), (x.to(device) for x in t.batch())
found = {}
for autocast in (False, True):
    full, *others = (
        t.loss_and_gradients(net, kind, {"input_ids": ids}, labels, autocast=autocast)
        for kind in ("full", "chunked", "liger")
    )
    found[str(autocast)] = [max(t.distance(x, y) for x, y in zip(each, full, strict=True)) for each in others]
print(json.dumps(found))
"""


def test_the_kernel_gives_the_loss_and_the_gradients_of_all_logits():
    for package in ("liger_kernel", "triton"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if not torch.cuda.is_available() and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("Triton's interpreter fails with numpy 2.4 (up to triton 3.6 at least)")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    done = subprocess.run(
        [sys.executable, "-c", COMPARE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    chunked, liger = found["False"]
    assert max(chunked, liger) < 2e-6  # float32
    chunked, liger = found["True"]
    assert liger < 2 * chunked < 0.05  # products in bfloat16
