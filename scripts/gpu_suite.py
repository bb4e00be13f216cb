"""Everything that a GPU is needed for, in order of worth and within a given time: tests, benchmarks, real trainings.

    python scripts/gpu_suite.py --minutes 120 --data DIR         what a rented GPU should be asked for
    python scripts/gpu_suite.py --minutes 120 --dry-run          the plan, with guesses of how long each job takes
    python scripts/gpu_suite.py --minutes 2 --device cpu --tiny  the same in miniature, to see that it works

Each job is a process of its own. One that fails or takes too long is noted and the next one starts. The same command
goes on where it was stopped: what is done is not done again, and a training continues from its checkpoint. Below --out
there are only small records, and summary.md, which is written anew after every job (docs/gpu_suite.md).
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarking.wheels import begin_again  # noqa: E402

if __name__ == "__main__":
    begin_again(sys.argv[1:], ROOT)

from benchmarking.gpu_suite import ADAM_RATES, METHODS, MODELS, STAGES, STOPPED, Suite, dry_run, work  # noqa: E402
from data.errors import UserError  # noqa: E402


class Terminated(BaseException):
    """SIGTERM came."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="time for all of it")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="records; default results/gpu")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/gpu_suite"), help="checkpoints, logs; default runs/gpu_suite"
    )
    parser.add_argument("--stages", default=",".join(STAGES), help=f"default {','.join(STAGES)}")
    parser.add_argument(
        "--models",
        default=",".join(MODELS),
        help=f"of the stages optimizers and training; default {','.join(MODELS)}",
    )
    parser.add_argument("--data", type=Path, help="prepared data, or a mirror of C4; default the embedded sample")
    parser.add_argument("--tokenizer", help="as tokenizer= of train.py; default the model's, t5-base")
    parser.add_argument("--adam-rates", default=ADAM_RATES, help=f"of the comparison; default {ADAM_RATES}")
    parser.add_argument("--methods", default="", help=f"of the comparison; default {','.join(METHODS)}")
    parser.add_argument(
        "--wheels", type=Path, nargs="+", default=[], help="packages that are missing, installed without a network"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda")
    parser.add_argument("--tiny", action="store_true", help="the same stages with models and steps of milliseconds")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    asked = parser.parse_args(argv)
    if not asked.minutes > 0:
        parser.error("--minutes must be above 0.")
    if asked.device == "cpu" and not asked.tiny:
        parser.error("--device cpu needs --tiny: the whole suite would take days on a CPU.")
    stages = names(asked.stages)
    if unknown := [name for name in stages if name not in STAGES]:
        parser.error(f"there is no stage {unknown[0]}: choose from {', '.join(STAGES)}.")
    models = names(asked.models)
    if unknown := [name for name in models if name not in MODELS]:
        parser.error(f"--models has no {unknown[0]}: choose from {', '.join(MODELS)}.")
    for path in (*([asked.data] if asked.data else []), *asked.wheels):
        if not path.exists():
            parser.error(f"{path} is not there: check --data and --wheels.")
    suite = Suite(
        out=(ROOT / asked.out).resolve(),
        work=(ROOT / asked.work).resolve(),
        device=asked.device,
        tiny=asked.tiny,
        stages=stages,
        adam_rates=names(asked.adam_rates)[:1] if asked.tiny else names(asked.adam_rates),
        methods=names(asked.methods) or (("racs",) if asked.tiny else METHODS),
        data=asked.data.resolve() if asked.data else None,
        tokenizer=asked.tokenizer,
        deadline=time.monotonic() + 60 * asked.minutes,
        dry=asked.dry_run,
        models=models,
    )
    try:
        if asked.dry_run:
            print(dry_run(suite))
            return 0
        return 0 if work(suite) else 1
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Terminated) as stop:
        print("\nStopped: the same command goes on from here.", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else STOPPED


def names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _terminate(number: int, _: Any) -> NoReturn:
    raise Terminated


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    raise SystemExit(main())
