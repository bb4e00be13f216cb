"""Which process is at a run: several calls of a sweep, also on several machines, may share one folder of records."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from pathlib import Path

from data.errors import UserError
from pretraining.lock import SILENCE, RunLock


def claim(folder: Path) -> RunLock | None:
    """The right to train in `folder`, to be given back by `release`; None if another process is at it.

    That may be another call of the sweep, or a training that has outlived its own.

    Raises:
        OSError: the place cannot be written.
    """
    own = RunLock(folder.with_name(f"{folder.name}.sweep"))
    training = RunLock(folder)
    if _alive_elsewhere(own.path) or _alive_elsewhere(training.path):
        return None
    training.remove_if_stale()
    if training.path.exists():
        return None
    try:
        return own.__enter__()
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from error
        return None


def release(lock: RunLock) -> None:
    lock.__exit__(None, None, None)


def _alive_elsewhere(path: Path) -> bool:
    """Whether a process of another machine holds a lock and has given a sign of life lately.

    RunLock would find that out as well, but wait for the next sign.
    """
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(path.read_text())
        return holder["host"] != socket.gethostname() and time.time() - path.stat().st_mtime < SILENCE
    return False
