"""Malformed inputs: each is refused in a sentence that names it, or left out and counted; nothing hangs.

The tables are in the files beside this one; here is what they share, and the count.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gzip
import importlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data import UserError

from .test_malformed_known import KNOWN

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 120.0  # what no case may need, on a machine with much else to do
TABLES = ("data", "stores", "configs", "runs")

# How the second half of a sentence begins, or a rule that says what the value must be.
WAYS = (
    *("add", "check", "choose", "convert", "correct", "delete", "fetch", "finish", "free", "give", "install", "keep"),
    *("leave", "lower", "pass", "prepare", "put", "quote", "raise", "remove", "restore", "resume", "run", "set"),
    *("start", "train", "update", "use", "write", "or offline", "recipes", "choices"),
)
ADVICE = re.compile(
    rf"\bmust be\b|--help lists|is a single value|each line must|there are:|did you mean|"
    rf"[:;,(.] (and |or |so |first )?({'|'.join(WAYS)})\b",
    re.IGNORECASE,
)


def open_cases(kind: str, names: Iterable[str]) -> list[str]:
    """Those of a kind that are not known to fail."""
    known = {name for cases in KNOWN.values() for name in cases}
    return [name for name in names if f"{kind}, {name}" not in known]


class TooSlow(BaseException):
    """No `Exception`, so that nothing on the way takes it for an error of the input."""


@contextlib.contextmanager
def within(seconds: float = SECONDS) -> Iterator[None]:
    """Fail where the body takes longer; a body that hangs outside Python ends the whole process, with a traceback."""

    fired: list[TooSlow] = []

    def late(*_: object) -> None:
        fired.append(TooSlow(f"still at it after {seconds:g} s"))
        raise fired[0]

    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again, where somebody swallows the first
    faulthandler.dump_traceback_later(seconds + 480, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if fired:
            raise fired[0]


def refused(call: Callable[[], Any], *names: str) -> str:
    """The message of the `UserError` that `call` ends in: one line that holds every name and says what to do."""
    with within(), pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    for name in names:
        assert name in message, message
    assert len(message.splitlines()) == 1 and "Traceback" not in message, message
    assert ADVICE.search(message), message
    return message


def test_there_are_two_hundred_and_no_two_have_one_name() -> None:
    names: list[str] = []
    for table in TABLES:
        names += importlib.import_module(f"tests.test_malformed_{table}").CASES
    assert len(names) == len(set(names))
    known = [name for cases in KNOWN.values() for name in cases]
    assert not set(known) - set(names), "KNOWN lists what is no case"
    assert len(names) - len(known) >= 200


def test_the_helper_notices_what_hangs_and_what_says_too_little() -> None:
    with pytest.raises(TooSlow), within(0.05):
        threading.Event().wait(10)

    def fail(message: str) -> Callable[[], None]:
        def call() -> None:
            raise UserError(message)

        return call

    refused(fail("a.txt is cut: fetch it again."), "a.txt")
    for message in ("a.txt is cut", "b.txt is cut: fetch it again.", "a.txt\nis cut: fetch it again."):
        with pytest.raises(AssertionError):
            refused(fail(message), "a.txt")


def test_the_doors_end_in_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    """The tables call the functions behind the doors; these go through them."""
    shard = tmp_path / "c4-train.00000-of-00001.json.gz"
    shard.write_bytes(b"not zipped")
    valid = tmp_path / "c4-validation.00000-of-00001.json.gz"
    valid.write_bytes(gzip.compress(b'{"text": "some words"}\n'))
    short = ["experiment=quickstart", f"run_dir={tmp_path / 'run'}", "trainer.steps=1", "eval.ngrams=false"]
    doors = {
        f"{shard}, after line 0: damaged or cut gzip file": [
            "train.py",
            *short,
            "data=c4_local",
            f"data.path={tmp_path}",
        ],
        f"{tmp_path} is not a run folder": ["eval.py", f"checkpoint={tmp_path}"],
    }
    running = [
        subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for words in doors.values()
    ]
    for words, process in zip(doors, running, strict=True):
        errors = process.communicate(timeout=300)[1]
        last = errors.splitlines()[-1]
        assert process.returncode == 2 and last.startswith("error: ") and words in last, errors
        assert "Traceback" not in errors
