"""What --help says of each setting: its value, and the comment that its file in configs/ has behind it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

_LINE = re.compile(r"( *)(\w+):")
_COLUMN = 40  # where comments begin, if the line leaves room


def _keys(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each line of a YAML mapping of mappings, with its dotted key; "" for a line that has none (an item of a list)."""
    above: list[tuple[int, str]] = []
    for line in lines:
        found = _LINE.match(line)
        if found:
            depth = len(found[1])
            above = [*(each for each in above if each[0] < depth), (depth, found[2])]
        yield line, ".".join(name for _, name in above) if found else ""


def comments(files: Mapping[str, Path]) -> dict[str, str]:
    """Comments behind settings, by dotted key; `files`: configuration files by the section that they fill, "" the root."""
    found = {}
    for section, file in files.items():
        for line, key in _keys(file.read_text(encoding="utf-8").splitlines()):
            comment = line.partition(" # ")[2].strip()
            if key and comment:
                found[f"{section}.{key}" if section else key] = comment
    return found


def described(cfg: DictConfig, comments: Mapping[str, str]) -> list[str]:
    """The configuration as lines of YAML, with comments."""
    return [
        f"{line:<{_COLUMN - 2}}  # {comments[key]}" if key in comments else line
        for line, key in _keys(OmegaConf.to_yaml(cfg).rstrip().splitlines())
    ]
