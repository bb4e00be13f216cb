"""One process group for each run folder: a lock that works on network filesystems and outlives no process."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from data.errors import UserError

HEARTBEAT = 10.0  # seconds between signs of life
SILENCE = 60.0  # a holder on another machine that gives no sign for so long is dead


class RunLock:
    """Held while a run writes its folder. The file ``.NAME.lock`` lies beside the folder, which may be renamed.

    It is made by a hard link, which is atomic on NFS too, and touched every ``HEARTBEAT`` seconds. A lock whose
    holder ran on this machine is stale as soon as that process is gone; of another machine, when nobody has touched
    the file for ``SILENCE`` seconds, by the clock of the filesystem. Then it is taken over.

    Attributes:
        lost: another process has taken the lock over, after this one was suspended or cut off; writing must stop.

    Raises:
        UserError: somebody alive holds it, or the place cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.path = run_dir.parent / f".{run_dir.name}.lock"
        self.lost = False
        self._text = json.dumps(_ourselves(), indent=1) + "\n"
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create(self.path):
                self._wait_for_a_stale_one()
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror or error}): choose a run_dir (or paths.runs) on a "
                "filesystem that you can write to"
            ) from error
        self._sweep()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        if self._ours():
            self.path.unlink(missing_ok=True)

    def remove_if_stale(self) -> None:
        """Take away what a dead process has left, where nobody else is going to."""
        if self.path.exists():
            with contextlib.suppress(UserError), self:  # a living one keeps it
                pass

    def check(self) -> None:
        """Raise UserError if the lock was lost."""
        if self.lost:
            raise UserError(
                f"{self.run_dir} was taken over by another process while this one was suspended or cut off from the "
                "filesystem; nothing more is written here: leave the run to the other one"
            )

    def _create(self, path: Path) -> bool:
        """Make a file with our name in it, unless it is there; returns whether we did."""
        own = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        own.write_text(self._text)
        try:
            os.link(own, path)
            return True
        except FileExistsError:
            return False
        except OSError:  # a filesystem without hard links
            with contextlib.suppress(FileExistsError), path.open("x") as file:
                file.write(self._text)
                return True
            return False
        finally:
            own.unlink(missing_ok=True)

    def _wait_for_a_stale_one(self) -> None:
        """Return when the present lock is gone.

        Raises:
            UserError: its holder lives.
        """
        first: tuple[str, float] | None = None
        told = False
        while True:
            seen = self._look()
            if seen is None:
                return
            text, touched, now = seen
            holder = _parse(text)
            alive = _alive_here(holder)
            if alive is False or (alive is None and now - touched > SILENCE):
                self._remove(text)
                return
            if alive or (first is not None and (text, touched) != first):
                raise UserError(
                    f"{self.run_dir} is being written by process {holder.get('pid')} on {holder.get('host')}: wait for "
                    "it or stop it, or choose another folder"
                )
            first = (text, touched)
            if not told:
                told = True
                print(
                    f"{self.run_dir} is locked by process {holder.get('pid')} on {holder.get('host')}; waiting up to "
                    f"{SILENCE:.0f} s for a sign of life",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(min(HEARTBEAT / 4, 1.0))

    def _look(self) -> tuple[str, float, float] | None:
        """Content and time of the present lock, and the filesystem's present time; None if there is none."""
        probe = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        try:
            with self.path.open() as file:  # opening makes NFS ask the server for fresh attributes
                text, touched = file.read(), os.fstat(file.fileno()).st_mtime
            probe.touch()
            return text, touched, probe.stat().st_mtime
        except FileNotFoundError:
            return None
        finally:
            probe.unlink(missing_ok=True)

    def _remove(self, text: str) -> None:
        """Take a stale lock away, unless another process is doing so or has done so and made its own.

        One process at a time may: otherwise the second would take away the new lock of the first.
        """
        turn = self.path.with_name(f"{self.path.name}.takeover")
        if not self._create(turn):
            with contextlib.suppress(FileNotFoundError):  # of a process that died within the next four lines
                probe = self._look()
                if probe is not None and probe[2] - turn.stat().st_mtime > SILENCE:
                    turn.unlink()
            time.sleep(0.05)
            return
        try:
            if self.path.read_text() == text:
                self.path.unlink()
        except FileNotFoundError:
            pass
        finally:
            turn.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove files of ours beside the lock that a kill has left: none of them lives for longer than an instant."""
        for left in self.path.parent.glob(f"{self.path.name}.*"):
            with contextlib.suppress(OSError):
                if self.path.stat().st_mtime - left.stat().st_mtime > SILENCE:
                    left.unlink()

    def _ours(self) -> bool:
        try:
            return self.path.read_text() == self._text
        except OSError:
            return False

    def _beat(self) -> None:
        while not self._end.wait(HEARTBEAT):
            try:
                if self.path.read_text() != self._text:
                    self.lost = True
                    return
                os.utime(self.path)
            except FileNotFoundError:
                self.lost = True
                return
            except OSError:  # the filesystem is away; the next beat tells
                continue


def _ourselves() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "began": _process(pid)[1],
        "id": uuid.uuid4().hex,
    }


def _machine() -> str:
    """This boot of this machine and the space in which its process numbers mean something, where Linux tells them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _process(pid: int) -> tuple[bool, str | None]:
    """Whether a process of this machine runs, and when it began, in ticks since boot (None outside Linux).

    The beginning tells a process from a later one that was given its number.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False, None
    except OSError:  # somebody else's
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0] not in ("Z", "X"), fields[19]  # a zombie has ended; its parent has not noticed
    except (OSError, IndexError):
        return True, None


def _alive_here(holder: dict[str, Any]) -> bool | None:
    """Whether the holder runs on this machine; None if it belongs to another one, or cannot be told."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0 or holder.get("machine") != _machine():
        return None
    runs, began = _process(pid)
    return runs and began == holder.get("began")


def _parse(text: str) -> dict[str, Any]:
    try:
        holder = json.loads(text)
    except ValueError:  # being written, or not ours
        return {}
    return holder if isinstance(holder, dict) else {}
