"""Signals that ask a run to stop: the step is ended, a checkpoint written, and the process leaves with a code of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

# SIGTERM: a launcher, a preempted job, `kill`. SIGINT: Ctrl-C. SIGUSR1: SLURM's --signal=USR1@120, before the time is up.
ASKING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
# What is no longer there, rather than what somebody wants: it comes beside another signal, and means no impatience.
GONE = {
    getattr(signal, name): what
    for name, what in (("SIGHUP", "the terminal was closed"), ("SIGUSR2", "the launcher has ended"))
    if hasattr(signal, name)
}
STOPPING = (*ASKING, *GONE)
# Exit codes of sysexits.h, which no interpreter, shell or launcher uses for something else.
EXIT_CODE = 75  # EX_TEMPFAIL: nothing is wrong, try again
LOST_CONTACT = 74  # EX_IOERR: another rank has ended, see launch.py
# A launcher passes on a signal that all processes of the job were sent: the same one twice, within milliseconds.
ECHO = 1.0  # seconds


class Stopped(Exception):
    """A signal ended the run before its last step; the same command continues it."""

    exit_code = EXIT_CODE


class StopSignals:
    """While entered, the first of ``STOPPING`` only sets ``received``; a second one of ``ASKING`` ends the process at once,
    unless it is the same again within ``ECHO`` seconds.

    A SIGHUP that is ignored, by nohup, stays so; after one that is not, nothing is written to the terminal any more, because
    that fails. Python allows signal handlers in the main thread alone: entered in another one, this does nothing.

    Attributes:
        received: the name of the first signal, such as SIGTERM, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._asked: str | None = None
        self._when = 0.0
        self._before: dict[signal.Signals, object] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
            for number in STOPPING:
                if number not in GONE or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
            _follow_launcher()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number not in GONE:
            if self._asked is not None:
                if name == self._asked and time.monotonic() < self._when + ECHO:
                    return
                _say(f"second signal ({name}): leaving at once")
                os._exit(128 + number)
            self._asked, self._when = name, time.monotonic()
        if self.received is None:
            self.received = name
            if os.environ.get("RANK", "0") == "0":
                why = f", {GONE[number]}" if number in GONE else "; a second signal leaves at once"
                _say(f"{name}: stopping after this step{why}")
        if name == "SIGHUP":
            self._leave_terminal()

    def _leave_terminal(self) -> None:
        """Send to nowhere what goes to the terminal: once that is closed, the next line would end the run unsaved."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _say(line: str) -> None:
    # os.write, and os._exit above: a handler may run in the middle of any other write.
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


def _follow_launcher() -> None:
    """Ask Linux for a SIGUSR2 when `accelerate launch` is gone, which passes no signal on to a single process.

    Not for one of ``ASKING``: Ctrl-C reaches both processes, and the launcher ends at once.
    """
    ours = "ACCELERATE_MIXED_PRECISION" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    if ours and sys.platform == "linux":
        end_with_parent(signal.SIGUSR2)


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Ask Linux for this signal when the process that started this one is gone."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(number))
