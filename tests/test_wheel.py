"""The wheel, by itself: it carries the optimizers alone, and trains through `racs_alice` without this repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

from optimizers import __version__

ROOT = Path(__file__).resolve().parent.parent

PLAIN_LOOP = """
import torch, racs_alice
from torch import nn

assert "racs_alice" in racs_alice.__file__
torch.manual_seed(0)
teacher = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
x = torch.randn(256, 16)
with torch.no_grad():
    y = teacher(x)
for name, options in {"alice": dict(rank=4, leading=2, update_interval=5), "racs": {}, "adam": {}}.items():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
    if name == "alice":
        optimizer = racs_alice.Alice(racs_alice.partition(model, adam_lr=0.01), lr=0.02, **options)
    elif name == "racs":
        optimizer = racs_alice.RACS(racs_alice.partition(model, adam_lr=0.01), lr=0.1)
    else:
        optimizer = racs_alice.create("adam", model, lr=0.01)
    losses = []
    for step in range(60):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(name, losses[-1] / losses[0])
"""

# Eight steps at once against five steps, a save and three resumed ones. Random batches come from the Trainer's own
# sampler, so its resumption is part of what is compared.
HF_TRAINER = """
import sys, torch, racs_alice
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

folder = sys.argv[1]
torch.manual_seed(0)
tokens = torch.randint(0, 50, (64, 12))
rows = [{"input_ids": row, "labels": row} for row in tokens]

def trainer(where, steps):
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, vocab_size=50, max_position_embeddings=16))
    args = TrainingArguments(output_dir=f"{folder}/{where}", max_steps=steps, per_device_train_batch_size=4,
        learning_rate=0.02, save_steps=5, save_strategy="steps", logging_steps=100, report_to=[], use_cpu=True,
        disable_tqdm=True, lr_scheduler_type="constant", seed=3, dataloader_num_workers=0)
    return Trainer(model=model, args=args, train_dataset=rows, optimizer_cls_and_kwargs=(racs_alice.Alice, {
        "params": racs_alice.partition(model, adam_lr=0.005), "rank": 4, "leading": 2, "update_interval": 3, "lr": 0.02}))

whole = trainer("whole", 8)
start = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
whole.train()
trainer("parts", 5).train()
resumed = trainer("parts", 8)
resumed.train(resume_from_checkpoint=f"{folder}/parts/checkpoint-5")
assert resumed.state.global_step == whole.state.global_step == 8
resumed = dict(resumed.model.named_parameters())
moved = sum(not torch.equal(p, start[name]) for name, p in whole.model.named_parameters())
same = sum(torch.equal(p, resumed[name]) for name, p in whole.model.named_parameters())
print(moved, same, len(resumed), type(whole.optimizer).__name__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what the wheel is made of, so that no stale build folder of the clone can get in."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "optimizers", source / "optimizers", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run(
        [*command, "--wheel-dir", source / "dist"], cwd=source, capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stderr
    (path,) = (source / "dist").glob("racs_alice-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's content and nothing else of ours."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(script: str, installed: Path, tmp_path: Path, *arguments: str) -> str:
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "RANK": "0"}
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "script.py", *arguments], cwd=tmp_path, env=environment, text=True,
                          capture_output=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_contains_the_optimizers_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    code = {name for name in names if ".dist-info/" not in name}
    sources = (path.relative_to(ROOT / "optimizers") for path in (ROOT / "optimizers").rglob("*") if path.is_file())
    assert code == {f"racs_alice/{path.as_posix()}" for path in sources if "__pycache__" not in path.parts}
    assert "racs_alice/py.typed" in code
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_depends_on_torch_alone(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "racs-alice" and metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("Requires-Dist") == ["torch>=2.11"]
    assert metadata["Requires-Python"] == ">=3.11"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert metadata["Version"] == __version__ == str(citation["version"])


def test_a_plain_loop_trains(installed: Path, tmp_path: Path) -> None:
    lines = run(PLAIN_LOOP, installed, tmp_path).strip().splitlines()
    ratios = {line.split()[0]: float(line.split()[1]) for line in lines if len(line.split()) == 2}
    assert set(ratios) == {"alice", "racs", "adam"}
    assert all(ratio < 0.5 for ratio in ratios.values()), ratios


def test_it_needs_nothing_but_torch(installed: Path, tmp_path: Path) -> None:
    """Importing it loads no third package that importing torch does not load already."""
    script = """
import sys, torch
before = set(sys.modules)
import racs_alice
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - {"racs_alice", "torch"} - set(sys.stdlib_module_names)))
"""
    assert run(script, installed, tmp_path).strip() == "[]"


def test_the_trainer_of_transformers_resumes_bit_for_bit(installed: Path, tmp_path: Path) -> None:
    last = run(HF_TRAINER, installed, tmp_path, str(tmp_path / "runs")).strip().splitlines()[-1]
    moved, same, parameters, _ = last.split()
    assert moved == parameters, "some parameters were not trained"
    assert same == parameters, f"{same} of {parameters} parameters are bit-identical after a resume"
