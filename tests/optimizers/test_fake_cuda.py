"""Steps on CUDA without a GPU: torch's fake tensors, which have devices, dtypes and shapes but no numbers.

They show what no run on a CPU can: that a step on CUDA leaves nothing on another device, and that the host reads no number of
it, at refreshes either. torch makes them in its builds for CUDA only, with or without a GPU; in others this is skipped.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimizers import METHODS

if torch.version.cuda is None:
    pytest.skip("this build of torch has no CUDA", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    *((name, {}) for name in METHODS if name not in ("any", "adam_8bit")),  # bitsandbytes has kernels of its own
    *(("alice", {"switching": how}) for how in ("none", "full_basis", "gaussian_mix", "gaussian")),
    *(("alice", {"compensation": how}) for how in ("none", "fira", "fira_plus")),
    *(("alice", {"initial_basis": how}) for how in ("gaussian", "zeros")),
    *(("alice", {"state_dtype": how}) for how in ("bfloat16", "8bit")),
    ("alice", {"products": "bfloat16"}),
    ("alice", {"tracking_basis": "rotated", "bias_correction": True, "limiter": None}),
    ("apollo", {"store_projection": True}),
    ("swan", {"solver": "evd"}),
    ("soap", {"form": "published"}),
    ("muon", {"ns_dtype": "float32"}),
]
READ = {"adafactor"}  # a class of a library, whose step reads numbers

PROGRAM = """
import json
import sys
import traceback
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from optimizers.quantization import _code_of_0
from pretraining.loss import PretrainingLoss
from pretraining.model import build_model
from tests.optimizers.test_devices import LLAMA, STEPS, configured, step

for signed in (True, False):  # a table on the CPU, read once
    _code_of_0(signed)

def geqrf(U):  # which has no rule for fake tensors: Householder vectors, and a factor for each
    return torch.empty_like(U), U.new_empty(*U.shape[:-2], min(U.shape[-2:]))

torch.geqrf = geqrf

def advance(name, options, dtype):
    torch.set_default_dtype(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):  # generators and tables of ours are on the CPU
        with torch.device("cuda"):
            model = build_model(LLAMA)
            ids, places, targets = torch.ones(2, 8, dtype=torch.int64), torch.arange(9), torch.ones(9, dtype=torch.int64)
        optimizer = configured(name, model, **options)
        for i in range(STEPS):
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.float32):
                loss = PretrainingLoss(model, ("full", "chunked")[i % 2])({"input_ids": ids}, places, targets)
            for p in model.parameters():  # torch's backward pass would want a GPU
                p.grad = torch.randn_like(p)
            step(optimizer)
        states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        there = [loss, *(p for p in model.parameters()), *(x for x in states if x.dim())]
        return sorted({str(x.device) for x in there})

found = []
for name, options in json.loads(sys.argv[1]):
    for dtype in (torch.float32, torch.bfloat16):
        try:
            found.append(advance(name, options, dtype))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            found.append(f"{type(error).__name__}: {error} ({where.filename}, line {where.lineno})")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    """What became of each case in float32 (with autocast) and in bfloat16: the devices that it used, or an error."""
    for package in ("transformers", "pytorch_optimizer", "adam_mini"):
        pytest.importorskip(package)
    done = subprocess.run(  # on its own: what is cached there is fake
        [sys.executable, "-c", PROGRAM, json.dumps(CASES)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", range(len(CASES)), ids=[" ".join([name, *map(str, o.values())]) for name, o in CASES])
def test_a_step_stays_on_its_device_and_the_host_reads_nothing(found, case, dtype):
    outcome = found[2 * case + (dtype == "bfloat16")]
    if CASES[case][0] in READ:
        assert str(outcome).startswith("DataDependentOutputException: aten._local_scalar_dense.default (")
    else:
        assert outcome == ["cuda:0"]
