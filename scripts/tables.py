"""The paper's tables and figures beside our records: results/README.md, results/tables/, results/figures/paper/; and the
page of the benchmarks, results/benchmarks/README.md.

    python scripts/tables.py              write them again (make tables)
    python scripts/tables.py --check      write nothing; fail if a committed table disagrees with the records

A record that is put at results/runs/paper/<experiment>/s<seed>/ fills its cells. Seconds, no GPU, no network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from reporting import benchmarks  # noqa: E402
from reporting.fair.figures import available  # noqa: E402
from reporting.fair.page import summary  # noqa: E402
from reporting.fair.records import load_fair  # noqa: E402
from reporting.paper.cost import computed_memory  # noqa: E402
from reporting.paper.figures import draw_all, stale  # noqa: E402
from reporting.paper.numbers import RESULTS, load_paper  # noqa: E402
from reporting.paper.page import FIGURES, differences, generate  # noqa: E402
from reporting.paper.records import RUNS  # noqa: E402
from scripts.fair_report import PLANS, plans  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="fail if a table disagrees with the records; write nothing"
    )
    parser.add_argument("--no-figures", action="store_true", help="tables only")
    parser.add_argument("--runs", type=Path, help="records of the paper's cells (default: results/runs/paper)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write, or what to check (default: results)")
    asked = parser.parse_args(argv)
    if asked.runs is not None and not asked.runs.is_dir():
        print(f"error: --runs {asked.runs} is not a folder: name the one that holds the records.", file=sys.stderr)
        return 2
    asked.runs = asked.runs or RUNS
    try:
        return run(asked)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(asked: argparse.Namespace) -> int:
    paper = load_paper()
    exact = computed_memory(paper, "exact")
    fair = load_fair(RESULTS / "runs", plans(RESULTS / "runs", PLANS))
    pictures = [RESULTS / "figures" / "fair" / f"{name}.png" for name in available(fair)]
    said = summary(fair, RESULTS, RESULTS / "fair" / "README.md", pictures)
    files = generate(asked.runs, computed_memory(paper, "paper"), exact, said)
    files[benchmarks.PAGE] = benchmarks.page(RESULTS / "benchmarks")
    if asked.check:
        found = differences(files, asked.out)
        if not asked.no_figures:
            old = stale(asked.out / FIGURES, asked.runs, exact)
            found += [f"{path.relative_to(asked.out)} shows something else than the records." for path in old]
        for sentence in found:
            print(f"error: {asked.out.name}/{sentence} Run `make tables` and look at what changed.", file=sys.stderr)
        if not found:
            print(f"{len(files)} files agree with the records.")
        return 1 if found else 0
    for name, text in files.items():
        path = asked.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    drawn = [] if asked.no_figures else draw_all(asked.out / FIGURES, asked.runs, exact)
    print(f"{asked.out.name}/README.md, {benchmarks.PAGE}, {len(files) - 2} tables and {len(drawn)} pictures written.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
