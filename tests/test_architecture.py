"""Imports point one way (CONTRIBUTING.md), read from the syntax tree: doors -> pretraining -> optimizers and data."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {
    "optimizers",
    "fisher",
    "data",
    "pretraining",
    "reporting",
    "benchmarking",
    "sweeps",
    "scripts",
    "tests",
    "train",
    "eval",
    "generate",
}
# What each room may import of ours, besides itself.
MAY_IMPORT = {
    "optimizers": set(),
    "data": set(),
    "fisher": {"optimizers"},
    "pretraining": {"optimizers", "data"},
    "reporting": {"optimizers.memory"},
    "benchmarking": {"optimizers", "fisher", "data", "pretraining", "reporting", "sweeps.local"},
    "sweeps": {
        "reporting",
        "pretraining.files",
        "pretraining.lock",
        "data.errors",
    },  # a run that others work on is left to them
}
# Costly or optional packages: imported inside the function that needs them, if at all.
LAZY = {"wandb", "tensorboard", "matplotlib", "scipy", "optuna", "submitit"}


def imports(source: str, top_level_only: bool = False, depth: int = 1) -> Iterator[tuple[str, int]]:
    """(dotted module, line) of every absolute import; `from a import b` gives a.b, so that a.b can be allowed.

    `depth` is how many folders deep the file lies: that many dots stay in its room.
    """
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
            if node.module == "torch.utils.tensorboard":  # torch's own module, but it needs the package
                yield "tensorboard", node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level > depth:
            yield f"<parent>.{node.module}", node.lineno  # a relative import that leaves the room
        deferred = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
            isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        )
        if not (top_level_only and deferred):
            pending.extend(ast.iter_child_nodes(node))


def allowed(module: str, names: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def violations(room: str, source: str, depth: int = 1) -> list[str]:
    """What `source`, a file of `room`, imports against the rules."""
    found = []
    for module, line in imports(source, depth=depth):
        top = module.split(".")[0]
        if top == "<parent>" or (top in OURS and not allowed(module, MAY_IMPORT[room] | {room})):
            found.append(f"line {line}: {module}")
        elif room == "optimizers" and top not in OURS and top != "torch" and top not in sys.stdlib_module_names:
            found.append(f"line {line}: {module} (the wheel depends on torch alone)")
        elif room == "optimizers" and top == "optimizers":
            found.append(f"line {line}: {module} (the folder has another name in the wheel: import relatively)")
    if room != "reporting":
        found += [
            f"line {line}: {module} at the top level"
            for module, line in imports(source, top_level_only=True)
            if module.split(".")[0] in LAZY
        ]
    return found


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_one_way(room: str) -> None:
    if room in ("optimizers", "data", "pretraining"):
        assert files(room), f"{room} has no files: was the room renamed?"
    found = [
        f"{path.relative_to(ROOT)} {violation}"
        for path in files(room)
        for violation in violations(room, path.read_text(), depth=len(path.relative_to(ROOT).parts) - 1)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("optimizers", "import numpy"),
        ("optimizers", "from data.errors import UserError"),
        ("optimizers", "from optimizers import linalg"),
        ("optimizers", "from .. import data"),
        ("data", "from pretraining import model"),
        ("data", "def f():\n    import optimizers"),
        ("pretraining", "import reporting"),
        ("pretraining", "from scripts import sweep"),
        ("pretraining", "import wandb"),
        ("pretraining", "try:\n    from torch.utils.tensorboard import SummaryWriter\nexcept ImportError:\n    pass"),
        ("reporting", "from pretraining.record import read"),
        ("reporting", "from optimizers import Alice"),
        ("reporting", "import optimizers"),
        ("reporting", "from ...data import rows"),
        ("fisher", "from data import loader"),
        ("pretraining", "from benchmarking import record"),
        ("benchmarking", "from scripts import benchmark"),
    ],
)
def test_the_rules_catch(room: str, source: str) -> None:
    assert violations(room, source)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("optimizers", "import math\nfrom torch import Tensor\nfrom .linalg import evd"),
        ("pretraining", "from optimizers import create\nfrom data.errors import UserError\ndef f():\n    import wandb"),
        ("reporting", "import matplotlib\nfrom optimizers.memory import bytes_of\nimport optimizers.memory"),
        ("data", "import datasets"),
        ("fisher", "from optimizers import linalg"),
        ("benchmarking", "import fisher\nfrom pretraining.plan import make_plan\nfrom reporting import units"),
    ],
)
def test_the_rules_allow(room: str, source: str) -> None:
    assert not violations(room, source)


def test_python_files_name_no_path_of_one_machine() -> None:
    """A committed file that works in one folder of one machine works nowhere else."""
    rooms = [
        path
        for room in (*MAY_IMPORT, "scripts", "configs")
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".yaml", ".sh")
    ]
    assert len(rooms) > 20
    named = [str(path.relative_to(ROOT)) for path in rooms if str(ROOT) + "/" in path.read_text()]
    assert not named
