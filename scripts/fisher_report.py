"""How well does each optimizer's structure approximate the Fisher matrix of a real model, and at what price?

    python scripts/fisher_report.py                      train, measure, write results/fisher
    python scripts/fisher_report.py --steps 100 --samples 16
    python scripts/fisher_report.py --from-records       only draw the tables and the figure again

The quickstart job (llama_tiny on the embedded text) is trained; at some moments the gradients of attention and MLP
matrices are kept, the structures of `fisher` are fitted to them, and every optimizer is timed on such a layer. Arguments
of the form key=value go to the configuration of train.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarking.record import write  # noqa: E402
from benchmarking.structures import ROWS, measure  # noqa: E402
from data.errors import UserError  # noqa: E402
from reporting import structures  # noqa: E402
from reporting.terminal import printing  # noqa: E402

OUT = ROOT / "results" / "fisher"


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of record, table and figure")
    parser.add_argument("--from-records", action="store_true", help="draw again from records.json, measure nothing")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--moments", type=int, default=3, help="at how many of them gradients are looked at")
    parser.add_argument("--samples", type=int, default=32, help="N, gradients that a structure is fitted to")
    parser.add_argument("--blocks", type=numbers, help="of transformer blocks, as in 0,3; default first and last")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for the configuration of train.py")
    asked = parser.parse_intermixed_args(argv)
    if min(asked.steps, asked.moments, asked.samples) < 1:
        parser.error("--steps, --moments and --samples must be at least 1.")
    try:
        if not asked.from_records:
            found = measure(asked.overrides, asked.steps, asked.moments, asked.samples, asked.blocks)
            write(found, asked.out / "records.json", ("errors", "timings"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    try:
        record = structures.read_record(asked.out / "records.json")
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (asked.out / "README.md").write_text(structures.report(record, ROWS) + "\n", encoding="utf-8")
    structures.draw(record, ROWS, asked.out / "fisher.png")
    print(f"{structures.headline(record)}\nwrote {asked.out / 'README.md'} and {asked.out / 'fisher.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(printing(main))
