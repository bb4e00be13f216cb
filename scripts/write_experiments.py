"""Write the experiment files of the paper's cells, configs/experiment/table2/... and so on, from reporting/paper/cells.py.

    python scripts/write_experiments.py

A test holds the files against what this would write, so neither can change without the other.
"""

from __future__ import annotations

import sys
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


def main() -> int:
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"wrote {len(files())} files below {FOLDER.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
