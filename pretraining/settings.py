"""What --help says of each setting: its value, and the comment that its file in configs/ has behind it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

_LINE = re.compile(r"( *)(\w+):")
_LIST = re.compile(r"^( *)(\w+):\n((?:\1- [^:\n]+\n)+)", re.MULTILINE)  # of plain values, as OmegaConf writes it
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
    text = _LIST.sub(_on_one_line, OmegaConf.to_yaml(cfg))
    return [
        f"{line:<{_COLUMN - 2}}  # {comments[key]}" if key in comments else line
        for line, key in _keys(text.rstrip().splitlines())
    ]


def _on_one_line(found: re.Match[str]) -> str:
    values = [line.strip().removeprefix("- ") for line in found[3].splitlines()]
    return f"{found[1]}{found[2]}: [{', '.join(values)}]\n"
