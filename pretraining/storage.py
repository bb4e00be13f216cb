"""Whether a run folder can take what a run will write: asked before the run begins."""

from __future__ import annotations

import shutil
from pathlib import Path

from data.errors import UserError


def check_folder(run_dir: Path, needed: int, what: str) -> None:
    """Make the folder, write to it, and compare its free space with the bytes that are ``needed``.

    Quotas cannot be seen from here: a full quota is reported by the write that meets it.

    Args:
        what: the run's own words for what takes the space.

    Raises:
        UserError: the folder cannot be written, or has too little room.
    """
    probe = run_dir / ".probe"  # the lock is held: one name is enough, and what a crash leaves goes the next time
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
        probe.unlink()
        free = shutil.disk_usage(run_dir).free
    except OSError as error:
        raise UserError(
            f"{run_dir} cannot be written ({error.strerror or error}): choose a run_dir (or paths.runs) on a filesystem "
            "that you can write to and that has room"
        ) from error
    present = sum(file.stat().st_size for file in _files(run_dir / "checkpoints"))
    if needed - present > free:
        raise UserError(
            f"{run_dir} has {_gib(free)} free, and this run needs about {_gib(needed - present)} more ({what}): free some "
            "space, choose another run_dir, lower trainer.keep_last, or set trainer.save_every=0"
        )


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
