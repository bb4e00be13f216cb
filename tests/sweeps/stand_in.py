"""A stand-in for train.py: loss ln 50 + ln(lr / 0.02)^2 at once; and what a test needs to see of it.

Files beside it steer it: `hang` holds the start of the names of runs that write one bad evaluation and wait for a signal,
`broken` of runs that fail, `diverge` of runs whose loss is infinite. Every call adds a line to calls.txt.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import yaml

from tests.reporting.synthetic import write_run


def main(here: Path) -> int:
    given = dict(word.lstrip("+").split("=", 1) for word in sys.argv[1:])
    folder = Path(given["run_dir"])
    if os.environ.get("RANK", "0") == "0":
        with (here / "calls.txt").open("a") as calls:
            print(
                folder.name, os.environ.get("CUDA_VISIBLE_DEVICES", "none"), os.environ.get("RANK", "alone"), file=calls
            )

    def named(file: str) -> bool:
        return (here / file).is_file() and folder.name.startswith((here / file).read_text())

    lr = float(given.get("optimizer.lr", 0.02))
    adam_lr = float(given["optimizer.adam_lr"]) if "optimizer.adam_lr" in given else None
    record = dict(optimizer=given["optimizer"], lr=lr, adam_lr=adam_lr, seed=int(given["seed"]), steps=20, eval_every=5)
    if named("broken"):
        print("error: the disk is full")
        return 1
    if named("hang"):
        hidden = write_run(here / "hidden" / folder.name, **record, finished=False)
        (hidden / "metrics.jsonl").write_text(json.dumps({"kind": "eval", "step": 5, "loss": 99.0}) + "\n")
        hidden.rename(folder)  # whole at once: the sweep looks on
        time.sleep(60)
        return 1
    if named("diverge"):
        if os.environ.get("RANK", "0") == "0":  # two would write into each other's files
            write_run(folder, **record, finished=False)
            complete(folder, given)
        print("error: the loss is nan at step 7; lower optimizer.lr")
        return 3
    if os.environ.get("RANK", "0") != "0":
        return 0
    write_run(folder, **record, perplexity=50 * math.exp(math.log(lr / 0.02) ** 2))
    complete(folder, given)
    return 0


def complete(folder: Path, given: dict[str, str]) -> None:
    """Put what else was asked for into the configuration."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for key in given.keys() - {"optimizer.lr", "optimizer.adam_lr"}:
        if key.startswith("optimizer."):
            config["optimizer"][key.removeprefix("optimizer.")] = yaml.safe_load(given[key])
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


if __name__ == "__main__":
    raise SystemExit(main(Path(os.environ["STAND_IN"])))
