"""Write the experiment files of the paper's cells, configs/experiment/table2/... and so on, from reporting/paper/cells.py.

    python scripts/write_experiments.py            write them again
    python scripts/write_experiments.py --check    write nothing; fail if a file is not what this would write

A test does the same as --check, so neither can change without the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from reporting.paper.cells import ALIASES, EXPERIMENTS, Experiment  # noqa: E402

FOLDER = ROOT / "configs" / "experiment"
# The paper's evaluation grid; every step in the record would be megabytes.
COMMON = {"trainer.eval_every": 500, "trainer.log_every": 20}


def experiment_text(experiment: Experiment) -> str:
    """The file of an experiment."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in {"optimizer.last_layer": experiment.last_layer, **experiment.settings, **COMMON}.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    lines = [
        "# @package _global_",
        f"# {experiment.about}.",
        "# Written by scripts/write_experiments.py. Everything else: the recipe of the optimizer and the model.",
        "defaults:",
        f"  - override /model: {experiment.model}",
        f"  - override /optimizer: {experiment.optimizer}",
        "  - override /data: c4",
        "",
        f"experiment_name: {experiment.name}",
        "run_dir: ${paths.runs}/paper/${experiment_name}/s${seed}",
    ]
    for section, values in sections.items():
        lines += [f"{section}:", *(f"  {name}: {_yaml(value)}" for name, value in values.items())]
    return "\n".join(lines) + "\n"


def alias_text(target: str) -> str:
    """The file of a second name."""
    return (
        "# @package _global_\n"
        f"# Another name of {target}: one run, in one folder. Written by scripts/write_experiments.py.\n"
        f"defaults:\n  - /experiment/{target}\n"
    )


def files() -> dict[Path, str]:
    """Every file and its content."""
    texts = {name: experiment_text(experiment) for name, experiment in EXPERIMENTS.items()}
    texts |= {name: alias_text(target) for name, target in ALIASES.items()}
    return {FOLDER / f"{name}.yaml": text for name, text in sorted(texts.items())}


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def stale() -> list[Path]:
    """The files that are missing, hold something else, or belong to no cell."""
    wanted = files()
    there = {path for folder in {path.parent for path in wanted} for path in folder.glob("*.yaml")}
    wrong = [path for path, text in wanted.items() if path not in there or path.read_text(encoding="utf-8") != text]
    return sorted([*wrong, *(there - wanted.keys())])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file would change")
    if parser.parse_args(argv).check:
        found = stale()
        for path in found:
            name = path.relative_to(FOLDER).as_posix()
            again = "run python scripts/write_experiments.py" if path in files() else "delete it"
            print(f"error: {name} is not what the list of cells gives: {again}.", file=sys.stderr)
        if not found:
            print(f"{len(files())} files agree with the list of cells.")
        return 1 if found else 0
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"{len(files())} experiments written.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
