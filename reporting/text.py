"""Markdown that the reports share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

NOT_RUN = "not run"  # what a cell says that nobody has run


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A markdown table whose first `left` columns are set left, the others right."""
    marks = [":--" if i < left else "--:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, marks, *rows])


def anchor(title: str) -> str:
    """How GitHub names the anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
