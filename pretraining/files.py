"""Files that others may read while they are written, or after a crash."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(file: Path, text: str, draft: str = "new") -> None:
    """Write a file so that a crash leaves the old or the new one, never a part.

    ``draft``: ending of the name until then; of its own where several processes may write the file at once.
    """
    temporary = file.with_name(f"{file.name}.{draft}")
    with temporary.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(temporary, file)
