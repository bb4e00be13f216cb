"""What dividing optimizer work among ranks costs: measured here, predicted for clusters; docs/scaling.md.

    torchrun --nproc_per_node 2 scripts/scaling.py measure --model llama_tiny     a record of 2 processes
    python scripts/scaling.py report                  tables of docs/scaling.md from the records, and the figure
    python scripts/scaling.py report --check          write nothing; fail if a table disagrees with the records

The machine must have nothing else to do while it measures. A report takes seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.errors import UserError  # noqa: E402

PAGE = ROOT / "docs" / "scaling.md"
RECORDS = ROOT / "results" / "scaling"
FIGURES = ROOT / "results" / "figures"


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    measure = commands.add_parser("measure", help="bytes and times on the processes of a torchrun")
    from benchmarking import scaling

    scaling.add_arguments(measure)
    written = commands.add_parser("report", help="the tables and the figure of docs/scaling.md")
    written.add_argument("--check", action="store_true", help="write nothing; fail if a table disagrees")
    written.add_argument("--page", type=Path, default=PAGE, help="default docs/scaling.md")
    written.add_argument("--records", type=Path, default=RECORDS, help="default results/scaling")
    written.add_argument("--figures", type=Path, default=FIGURES, help="default results/figures")
    asked = parser.parse_args(words)
    try:
        return scaling.run(asked, words) if asked.what == "measure" else report(asked)
    except (UserError, ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        print("\nInterrupted: nothing was written.", file=sys.stderr)
        return 130


def report(asked: argparse.Namespace) -> int:
    from benchmarking import prediction
    from reporting import scaling

    before = asked.page.read_text(encoding="utf-8")
    predicted = prediction.everything()
    after = scaling.fill(before, scaling.tables(scaling.load(asked.records), predicted))
    if asked.check:
        if after == before:
            return 0
        print(
            f"error: {asked.page.name} disagrees with the records: run python scripts/scaling.py report.",
            file=sys.stderr,
        )
        return 1
    asked.page.write_text(after, encoding="utf-8")
    drawn = scaling.draw(predicted["times"], asked.figures)
    print(f"{asked.page.name} and {', '.join(path.name for path in drawn)} written.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
