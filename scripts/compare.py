"""Show what differs between two runs, or two configurations with several seeds each: settings, data, result, speed.

    python scripts/compare.py RUN RUN
    python scripts/compare.py 'results/runs/fair_best/llama_tiny/adam-s4*' 'results/runs/fair_best/llama_tiny/muon-s4*'
    python scripts/compare.py RUN RUN --json difference.json

RUN is the folder of a run, a folder that holds the seeds of one configuration, a pattern in quotes, or several of these with
commas between. The first is the reference: differences are B - A, ratios B / A. A run may still be going on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from reporting.difference import difference  # noqa: E402
from reporting.difference_text import difference_text  # noqa: E402
from reporting.sides import load_side  # noqa: E402
from reporting.terminal import printing  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="two of them: the reference A, and what is held against it, B"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything, and all points of the curves, there too"
    )
    asked = parser.parse_args(argv)
    if len(asked.runs) != 2:
        parser.error(
            f"two RUNs are compared, not {len(asked.runs)}: put quotes around a pattern, commas between seeds."
        )
    try:
        found = difference(*map(load_side, asked.runs))
        if asked.json is not None:
            asked.json.parent.mkdir(parents=True, exist_ok=True)
            asked.json.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except ImportError as error:
        print(f"error: {error}: install the packages of requirements.txt.", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}: give folders that can be read, and a --json that can be written.", file=sys.stderr)
        return 1
    print(difference_text(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(printing(main))
