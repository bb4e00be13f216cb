"""How fast ours are beside what others use, in one run on one machine; records go to results/benchmarks/.

    python scripts/benchmark.py optimizers --model llama_60m --device cpu    steps of optimizers, ours and other packages'
    python scripts/benchmark.py training --model llama_tiny --device cpu     whole training steps
    python scripts/benchmark.py solvers --device cpu                         decompositions of a refresh, apart
    python scripts/benchmark.py all                                          the set that fits this machine (make bench)
    python scripts/benchmark.py optimizers --help                            everything that can be chosen

The machine must have nothing else to do. `make tables` then writes results/benchmarks/README.md from the records.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# The packages of requirements-oracles.txt: a folder of their own, which nothing but this and the tests looks into
if (ORACLES := ROOT / ".venv" / "oracles").is_dir():
    sys.path.append(str(ORACLES))

# torch's profiler, which counts memory, reports every start and stop
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from data.errors import UserError  # noqa: E402

ABOUT = {
    "optimizers": "steps of our optimizers and of other packages', on the same gradients",
    "training": "tokens per second of our trainer and of other loops",
    "solvers": "QR, eigenvectors and complement columns: time and accuracy of each way to compute them",
}


# What `all` measures, a process for each
SETS = {
    "cpu": [
        "optimizers --model llama_60m --dtype fp32",
        "optimizers --model llama_60m --dtype bf16",
        "training --model llama_tiny",
        "training --model llama_60m",
    ],
    "cuda": [
        *(f"optimizers --model llama_{size} --dtype bf16" for size in ("60m", "350m", "1b")),
        *(f"training --model llama_{size} --precision bf16" for size in ("60m", "130m", "350m", "1b")),
    ],
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True, metavar="{" + ",".join([*ABOUT, "all"]) + "}")
    for name, about in ABOUT.items():
        added = commands.add_parser(name, help=about, description=f"Measure {about}.")
        if name in words:  # the other one is not imported
            module(name).add_arguments(added)
    everything = commands.add_parser("all", help="the set that fits this machine")
    everything.add_argument("--device", choices=tuple(SETS), help="default cuda where there is one")
    asked = parser.parse_args(words)
    asked.words = words
    try:
        if asked.what == "all":
            return run_all(asked.device)
        return module(asked.what).run(asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nInterrupted: what was being measured is not written.", file=sys.stderr)
        return 130


def run_all(device: str | None) -> int:
    """Every benchmark of the set; one that fails does not stop the others. The largest of their exit codes."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    worst = 0
    for words in SETS[device]:
        print(f"\nbenchmark.py {words} --device {device}", flush=True)
        done = subprocess.run([sys.executable, __file__, *words.split(), "--device", device])
        worst = max(worst, abs(done.returncode))
    return worst


def module(name: str) -> ModuleType:
    """The room's module of that benchmark, imported only now."""
    return importlib.import_module(f"benchmarking.{name}")


if __name__ == "__main__":
    raise SystemExit(main())
