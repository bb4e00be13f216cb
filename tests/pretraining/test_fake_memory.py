"""The planner's estimate of an optimizer's step on a GPU, held against torch's fake CUDA tensors of the paper's models.

They have shapes and lifetimes without numbers, so that 1.3B takes a second; the workspaces of solvers are not among them.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretraining.memory import STEP_COPIES

if torch.version.cuda is None:
    pytest.skip("this build of torch has no CUDA", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json
import sys
import weakref
from collections import Counter
import torch
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from optimizers.base import CHUNK_ENTRIES
from optimizers.memory import RANKS, make
from pretraining.config import CONFIGS
from pretraining.model import build_model

torch.geqrf = lambda U: (torch.empty_like(U), U.new_empty(*U.shape[:-2], min(U.shape[-2:])))  # has no rule for them

class Live(TorchDispatchMode):  # bytes on the device that were made since, and the most there were at a time
    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == "cuda":
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.gone, key)
        return out

    def gone(self, key):
        self.now -= self.sizes.pop(key)

def copies(size, name):
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = build_model(OmegaConf.to_container(OmegaConf.load(CONFIGS / "model" / f"{size}.yaml")))
        torch.set_default_dtype(torch.float32)
        optimizer = make(name, model, "adam", RANKS.get(size))
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        peaks = []
        for interval in (None, None, 1):  # the first step with its bases, an ordinary one, a refresh
            for group in optimizer.param_groups:
                if interval and "update_interval" in group:
                    group["update_interval"] = interval
            with Live() as live:
                optimizer.step()
            peaks.append(live.peak - live.now)  # without the states that the first step leaves
        kinds = Counter(p.shape for group in optimizer.param_groups if not group.get("adam") for p in group["params"])
        stacks = [min(n * kind.numel(), max(CHUNK_ENTRIES, kind.numel())) for kind, n in kinds.items()]
        return max(peaks) / (4 * max(stacks))

print(json.dumps([copies(size, name) for size, name in json.loads(sys.argv[1])]))
"""


def test_a_step_takes_its_copies_of_a_stack_and_no_more():
    names = [name for name in STEP_COPIES if STEP_COPIES[name]]
    cases = [(size, name) for size in ("llama_60m", "llama_1b") for name in names]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(cases)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True))
    for (size, name), copies in found.items():
        assert STEP_COPIES[name] / 4 < copies <= STEP_COPIES[name], (size, name, copies)
