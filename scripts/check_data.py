"""Hold the order of rows on your own text: every number of processes and workers, streamed and prepared, three resumes.

    python scripts/check_data.py data=c4_local data.path=DIR tokenizer=spiece.model
    python scripts/check_data.py data=c4_local data.path=DIR tokenizer=spiece.model --prepared DIR2 --json FILE

Steps are compared bit for bit: ids and labels, as one process without workers reads them. Ranks are processes of their own.
Arguments of the form key=value are those of train.py. Exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import TrainingBatches, UserError, load_tokenizer, open_source  # noqa: E402

ROWS = ("truncate", "pack")
RESUMES = 3
Step = list[bytes]  # one row's ids and labels each


def loader(data: dict[str, Any], batch: int, rank: int, ranks: int, workers: int) -> TrainingBatches:
    return TrainingBatches(
        open_source(data, "train"),
        load_tokenizer(data["tokenizer"]),
        length=data["length"],
        rows=data["rows"],
        batch_size=batch,
        seed=data["seed"],
        shuffle_buffer=data["shuffle_buffer"],
        rank=rank,
        world_size=ranks,
        workers=workers,
    )


def next_step(batches: TrainingBatches) -> Step:
    rows = next(batches)
    return [a.numpy().tobytes() + b.numpy().tobytes() for a, b in zip(rows["input_ids"], rows["labels"], strict=True)]


def share(data: dict[str, Any], batch: int, steps: int, rank: int, ranks: int, workers: int) -> list[Step]:
    """A rank's rows of each step; the body of a process."""
    with loader(data, batch, rank, ranks, workers) as batches:
        return [next_step(batches) for _ in range(steps)]


def uninterrupted(data: dict[str, Any], batch: int, steps: int, ranks: int, workers: int) -> list[str]:
    """The digest of each step, from as many processes as there are ranks."""
    with ProcessPoolExecutor(ranks, mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = [pool.submit(share, data, batch, steps, rank, ranks, workers) for rank in range(ranks)]
        return [
            digest(list(itertools.chain.from_iterable(step)))
            for step in zip(*(part.result() for part in parts), strict=True)
        ]


def resumed(data: dict[str, Any], batch: int, steps: int, workers: int) -> list[str]:
    """The same with `RESUMES` stops on the way, whose states go through JSON; steps that were prefetched are lost."""
    found: list[str] = []
    state: str | None = None
    for stop in [steps * i // (RESUMES + 1) for i in range(1, RESUMES + 2)]:
        with loader(data, batch, 0, 1, workers) as batches:
            if state is not None:
                batches.load_state_dict(json.loads(state))
            while len(found) < stop:
                found.append(digest(next_step(batches)))
            state = json.dumps(batches.state_dict())
    return found


def digest(rows: Step) -> str:
    return hashlib.sha256(b"".join(rows)).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as for train.py: data, tokenizer, seed")
    parser.add_argument("--prepared", metavar="DIR", help="the same data, prepared, to compare with")
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--workers", default="0,1,2,4")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_intermixed_args(words)
    try:
        return check(asked, words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def check(asked: argparse.Namespace, words: Sequence[str]) -> int:
    from omegaconf import OmegaConf

    from pretraining.config import compose, quoted
    from pretraining.record import write_report

    cfg = compose([quoted(word) for word in asked.settings])
    data: dict[str, Any] = {**OmegaConf.to_container(cfg.data, resolve=True), "tokenizer": cfg.tokenizer}  # type: ignore[dict-item]
    kinds = {"streamed": data}
    if asked.prepared:
        kinds["prepared"] = {**data, "kind": "prepared", "path": asked.prepared}
    processes, workers = ([int(n) for n in text.split(",")] for text in (asked.processes, asked.workers))
    description = open_source(data, "train").description
    record: dict[str, Any] = {
        "data": {key: value for key, value in description.items() if key != "path"},
        "command": shlex.join(["scripts/check_data.py", *_without_places(words)]),
        "cases": [],
    }
    identical = True
    for rows in ROWS:
        whole = share({**data, "rows": rows}, asked.batch_size, asked.steps, 0, 1, 0)
        expected = [digest(step) for step in whole]
        documents = len({row for step in whole for row in step})
        print(f"{rows}: {asked.steps} steps of {asked.batch_size} rows, {documents:,} different ones", flush=True)
        for kind, config in kinds.items():
            chosen = {**config, "rows": rows}
            cases = [(f"{n} processes", w, n) for n in processes for w in workers]
            for name, w, n in [*cases, *((f"{RESUMES} resumes", w, 0) for w in workers)]:
                how = (chosen, asked.batch_size, asked.steps)
                found = uninterrupted(*how, n, w) if n else resumed(*how, w)
                same = found == expected
                identical &= same
                first = (
                    ""
                    if same
                    else f", first at step {[a == b for a, b in zip(found, expected, strict=True)].index(False)}"
                )
                print(f"  {kind}, {name}, {w} workers: {'identical' if same else 'DIFFERENT' + first}", flush=True)
                record["cases"].append({"rows": rows, "data": kind, "how": name, "workers": w, "identical": same})
    record |= {"steps": asked.steps, "batch_size": asked.batch_size, "identical": identical}
    if asked.json:
        write_report(asked.json, record)
    return 0 if identical else 1


def _without_places(words: Sequence[str]) -> list[str]:
    """The command without the folders of this machine."""
    return [
        "..."
        if words[max(0, i - 1)] in ("--prepared", "--json")
        else word.partition("=")[0] + "=..."
        if "/" in word
        else word
        for i, word in enumerate(words)
    ]


if __name__ == "__main__":
    raise SystemExit(main())
