"""Signals that ask a run to stop: the step is ended, a checkpoint written, and the process leaves with a code of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

# SIGTERM: a launcher, a preempted job, `kill`. SIGINT: Ctrl-C. SIGUSR1: SLURM's --signal=USR1@120, before the time is up.
STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
# Exit codes of sysexits.h, which no interpreter, shell or launcher uses for something else.
EXIT_CODE = 75  # EX_TEMPFAIL: nothing is wrong, try again
LOST_CONTACT = 74  # EX_IOERR: another rank has ended, see launch.py
# A launcher passes on a signal that all processes of the job were sent: the same one twice, within milliseconds.
ECHO = 1.0  # seconds


class Stopped(Exception):
    """A signal ended the run before its last step; the same command continues it."""

    exit_code = EXIT_CODE


class StopSignals:
    """While entered, the first of ``STOPPING`` only sets ``received``; a second one ends the process at once, unless it is
    the same again within ``ECHO`` seconds.

    Python allows signal handlers in the main thread alone: entered in another one, this does nothing.

    Attributes:
        received: the name of the first signal, such as SIGTERM, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._when = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
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
        # os.write and os._exit: a handler may run in the middle of any other write.
        if self.received is not None:
            if name == self.received and time.monotonic() < self._when + ECHO:
                return
            os.write(2, f"\nsecond signal ({name}): leaving at once\n".encode())
            os._exit(128 + number)
        self.received, self._when = name, time.monotonic()
        if os.environ.get("RANK", "0") == "0":
            os.write(2, f"\n{name}: stopping after this step; a second signal leaves at once\n".encode())


def _follow_launcher() -> None:
    """Ask Linux for a SIGTERM when `accelerate launch` is gone, which passes no signal on to a single process."""
    ours = "ACCELERATE_MIXED_PRECISION" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    if ours:
        end_with_parent()


def end_with_parent() -> None:
    """Ask Linux for a SIGTERM when the process that started this one is gone."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGTERM))
