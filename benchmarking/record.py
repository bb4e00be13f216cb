"""The record of a measurement: one JSON file, one line for each contestant or case, with hardware, versions and command."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from pretraining.files import replace_text
from pretraining.record import environment

FOLDER = Path(__file__).resolve().parent.parent / "results" / "benchmarks"
PLACES = ("--out",)  # options whose folders are those of this machine: not for the record


def describe_machine(
    device: torch.device, words: Sequence[str], packages: Iterable[str], **more: Any
) -> dict[str, Any]:
    """What `pretraining.record.environment` says, and the versions of ``packages`` (None: not installed).

    Args:
        words: arguments of scripts/benchmark.py, which become the command of the record.
        packages: distributions, as pip calls them.
        more: other facts.
    """
    found = environment(device, 1, **more)
    found["command"] = command(words)
    found["versions"] |= {name: version(name) for name in packages}
    # glibc's allocator decides about page faults, and so about every large temporary
    found["malloc"] = os.environ.get("GLIBC_TUNABLES")
    return found


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def command(words: Sequence[str], script: str = "scripts/benchmark.py", places: Sequence[str] = PLACES) -> str:
    """The command without the folders of this machine, which are in the options ``places``."""
    kept: list[str] = []
    for word in words:
        name, sign, value = word.partition("=")
        if sign and name in places:
            kept.append(f"{name}={Path(value).name}")
        else:
            kept.append(Path(word).name if kept and kept[-1] in places else word)
    return shlex.join(["python", script, *kept])


def refuse_to_lose(out: Path, names: Iterable[str], lines: str = "contestants", key: str = "name") -> None:
    """Raise UserError if ``out`` is no such record, or its ``lines`` hold figures of some that are not in ``names``.

    Figures of two sessions are never mixed, so a shorter session must not replace a longer one unasked.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder: give --out the name of a file in it.")
    if not out.is_file():
        return
    try:
        found = json.loads(out.read_text(encoding="utf-8"))[lines]
        there = {line[key] for line in found if not line.get("error")}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{out} is not a record of this benchmark: choose another --out.") from None
    lost = sorted(there - set(names))
    if lost:
        some = ", ".join(lost[:3]) + (", ..." if lost[3:] else "")
        raise UserError(
            f"{out} holds {len(lost)} {lines} that would not be measured now ({some}): choose another --out, or "
            "remove that file."
        )


def write(record: dict[str, Any], out: Path, lists: tuple[str, ...] = ("contestants",)) -> None:
    """Write ``record`` so that a crash leaves the old file or the new one; its ``lists`` item by item, a line each."""
    record = rounded(record)
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items() if key not in lists]
    for name in lists:
        items = ",\n  ".join(json.dumps(item) for item in record[name])
        parts.append(f"{json.dumps(name)}: [\n  {items}\n ]")
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, "{\n " + ",\n ".join(parts) + "\n}\n")


def rounded(value: Any) -> Any:
    """``value`` with every float in it rounded to six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
