"""Tokenise a data set once, for `data=prepared`: the same rows in the same order as from the data set itself.

    python scripts/prepare_data.py --to DIR data=c4_local data.path=MIRROR tokenizer=spiece.model
    python scripts/prepare_data.py --to DIR --steps 10000 --batch-size 512 data=c4     only what these steps read
    python train.py data=prepared data.path=DIR tokenizer=spiece.model

Arguments of the form key=value are those of train.py. Stopping is safe, by Ctrl-C or a crash: the same command goes on
with the shards that are not finished. A folder belongs to one data set and one tokenizer; with another seed or more
--steps, the command adds the shards that are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import UserError, load_tokenizer, open_source  # noqa: E402
from data.preparation import Request, Text, gigabytes, prepare  # noqa: E402
from data.prepared import VOCABULARY  # noqa: E402
from data.tokenizer import SentencePieceTokenizer  # noqa: E402
from pretraining.config import compose, quoted  # noqa: E402
from pretraining.lock import RunLock  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    asked = arguments(words)
    try:
        with _sigterm_as_ctrl_c():
            run(asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        command = shlex.join(["python", "scripts/prepare_data.py", *words])
        print(f"\nInterrupted. To go on with the shards that are not finished: {command}", file=sys.stderr)
        return 130
    return 0


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder of the prepared data")
    parser.add_argument(
        "--max-tokens", metavar="N|all", default="row",
        help="tokens kept of each document; row: what data.rows and data.length need",
    )  # fmt: skip
    parser.add_argument("--steps", type=_count, help="prepare only what so many optimizer steps read (default: all)")
    parser.add_argument("--batch-size", type=_count, default=512, help="rows of a step, with --steps")
    parser.add_argument("--jobs", type=_count, default=_cores(), help="processes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of train.py: data, tokenizer, seed")
    return parser.parse_intermixed_args(words)


def run(asked: argparse.Namespace) -> None:
    """All of the command. Raises `UserError`."""
    cfg = compose([quoted(word) for word in asked.overrides])
    data = cfg.data
    if data.kind == "prepared" or data.get("protocol", "exact") != "exact":
        raise UserError(
            "Only text can be prepared, and only for the exact order of rows: use data=c4_local, c4, text, hub or sample with "
            "data.protocol=exact."
        )
    max_tokens = _max_tokens(asked.max_tokens, data)
    tokenizer = load_tokenizer(cfg.tokenizer)
    if tokenizer.vocab_size > VOCABULARY:
        raise UserError(
            f"The tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} pieces, and prepared data hold at most "
            f"{VOCABULARY:,}: train from the text itself with this tokenizer."
        )
    request = Request(data.rows, data.length, data.seed, data.shuffle_buffer, asked.steps, asked.batch_size)
    sources = {split: open_source(data, split) for split in ("train", "validation")}
    jobs = min(asked.jobs, sum(source.shards for source in sources.values()))
    if isinstance(tokenizer, SentencePieceTokenizer):  # others go by the environment
        tokenizer.threads = max(1, _cores() // jobs)
    if asked.steps is None:
        getattr(sources["train"], "files", None)  # a mirror that lacks some says so now
    most = data.validation_max_tokens
    validation = None if most is None else {"rows": data.rows, "length": data.length, "max_tokens": most}
    folder = asked.to.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror or error}): give another --to.") from error
    with RunLock(folder / "preparation") as lock:
        text = Text(sources, tokenizer, max_tokens, validation)
        manifest = prepare(folder, text, request, jobs, lock.check)
    for split, part in manifest["splits"].items():
        print(
            f"{split}: {len(part['files']):,} of {part['shards']:,} shards, {part['documents']:,} documents "
            f"({part['skipped']:,} without text and {part['damaged']:,} damaged left out), {part['tokens']:,} tokens, "
            f"{gigabytes(part['bytes'])}"
        )
    settings = ["data=prepared", f"data.path={folder}", f"tokenizer={cfg.tokenizer}"]
    settings += [f"data.{key}={data[key]}" for key in ("rows", "length", "seed", "shuffle_buffer")]
    settings.append(f"data.validation_max_tokens={'null' if most is None else most}")
    if asked.steps is not None:
        settings += [f"trainer.steps={asked.steps}", f"trainer.batch_size={asked.batch_size}"]
    print(f"ready: python train.py {shlex.join(settings)}")


def _max_tokens(text: str, data: Any) -> int | None:
    if text == "row":
        return data.length - 1 if data.rows == "truncate" else None  # end-of-text is the row's last token
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--max-tokens is {text!r}: give a number of tokens, all, or row.")
    if data.rows == "pack" or int(text) < data.length - 1:
        raise UserError(
            f"--max-tokens {text} is less than data.rows={data.rows} with data.length={data.length} needs: leave it out, or "
            "change the settings of the rows."
        )
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """A job that is cancelled says how to go on, too."""

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    raise SystemExit(main())
