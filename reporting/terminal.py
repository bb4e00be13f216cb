"""What commands that print tables have in common."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

CLOSED = 141  # what a shell reports of a program that SIGPIPE has ended


def printing(main: Callable[[], int]) -> int:
    """The exit code of ``main``, whose standard output may be closed before it has printed all, as in `... | head`."""
    try:
        code = main()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python writes what is left in the buffer when it ends: to nowhere, or that would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
