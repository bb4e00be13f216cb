"""A local folder with the Hub's layout of allenai/c4, which may hold only part of the files.

Names such as `c4-train.00017-of-01024.json.gz` tell how many files the whole set has, and so the shuffled order is
that of the whole set, whatever part of it is here. `scripts/fetch_c4.py` keeps a manifest beside the files, with the
revision, size and SHA-256 of each that it has verified.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .lines import file_size, read_json

MANIFEST = "manifest.json"
KIND, FORMAT = "mirror", 1
COMMAND = "scripts/fetch_c4.py"
MOST_FILES = 10**6  # of a set; names may claim any number
NUMBERED = re.compile(r"(?P<head>.*\.)(?P<number>\d+)-of-(?P<count>\d+)(?P<tail>\.json\.gz)")


@dataclass(frozen=True)
class Mirror:
    """The files of one split.

    `files` are those of the whole set, in order, also the ones that are not here; `sizes` the bytes of those that
    are here, by place. `facts` tell the set apart from another, whatever part of it is here: the manifest's
    repository and revision, nothing but the names for a part without a manifest, and None where every file is
    here without a manifest, so that names and sizes of all can tell.
    """

    folder: Path
    files: list[Path]
    sizes: dict[int, int]
    facts: dict[str, Any] | None

    def absent(self, place: int) -> UserError:
        """The error of reading a file that is not here."""
        return UserError(
            f"{self.files[place]} is not here, or was never verified ({len(self.sizes)} of the {len(self.files)} files "
            f"are): fetch what a run of N steps reads, with its seed, by `python {COMMAND} --to {self.folder} --steps N "
            "--seed SEED`, and start again to resume."
        )


def find_mirror(path: Path, split: str) -> Mirror:
    """The files `*-<split>.*.json.gz` of `path/en`, or of `path` itself. Raises `UserError`."""
    for folder in (path / "en", path):
        found = sorted(folder.glob(f"*-{split}.*.json.gz"))
        prefixes = sorted({file.name.split(f"-{split}.")[0] for file in found})
        if len(prefixes) > 1:
            raise UserError(f"{folder} mixes several data sets ({', '.join(prefixes)}): give each a folder of its own.")
        if found:
            return _mirror(folder, found)
    raise UserError(
        f"No file named c4-{split}.*.json.gz in {path} or {path / 'en'}: data.path must be a folder with the Hub's layout "
        f"of allenai/c4, such as `python {COMMAND}` makes."
    )


def _mirror(folder: Path, found: list[Path]) -> Mirror:
    sizes = {file.name: file_size(file) for file in found}
    files = _whole_set(found)
    roots = (folder.parent, folder) if folder.name == "en" else (folder,)
    root, manifest = next(
        ((root, manifest) for root in roots if (manifest := read_manifest(root)) is not None), (roots[0], None)
    )
    facts: dict[str, Any] | None = None if len(found) == len(files) else {}
    if manifest is not None:
        facts = {key: manifest[key] for key in ("repository", "revision")}
        for file in found:
            entry = manifest["files"].get(file.relative_to(root).as_posix())
            if entry is None:
                del sizes[file.name]
            elif sizes[file.name] != entry["size"]:
                raise UserError(
                    f"{file} has {sizes[file.name]} bytes, and {root / MANIFEST} says {entry['size']}: remove the file "
                    f"and fetch it again with {COMMAND}."
                )
    places = {i: sizes[file.name] for i, file in enumerate(files) if file.name in sizes}
    return Mirror(root, files, places, facts)


def _whole_set(found: list[Path]) -> list[Path]:
    """The files of the set that the names of those found belong to; those found, where the names have no numbers."""
    names = [NUMBERED.fullmatch(file.name) for file in found]
    counts = {int(name["count"]) for name in names if name}
    if not counts:
        return found
    folder = found[0].parent
    if len(counts) > 1 or None in names:
        raise UserError(
            f"{folder} holds files whose names disagree about how many there are, such as {found[0].name} and "
            f"{found[-1].name}: keep the files of one set."
        )
    count = counts.pop()
    if len(found) == count:
        return found
    if count > MOST_FILES:
        raise UserError(
            f"{found[0]} is named as one of more than {MOST_FILES:,} files, the most that a set may have: correct the name "
            "or remove the file."
        )
    first = names[0]
    assert first is not None
    width = len(first["number"])
    files = [folder / f"{first['head']}{i:0{width}d}-of-{first['count']}{first['tail']}" for i in range(count)]
    unknown = sorted(set(found) - set(files))
    if unknown:
        raise UserError(f"{unknown[0]} is not a file of a set of {count}, numbered from 0: remove it.")
    return files


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in `folder`; None where there is none of ours. Raises `UserError`."""
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it and run {COMMAND} again.") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        return None
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {manifest.get('format')}, and this version reads {FORMAT}: update the code."
        )
    entries = manifest.get("files")
    whole = isinstance(entries, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("size"), int) for entry in entries.values()
    )
    if not whole or not all(isinstance(manifest.get(key), str) for key in ("repository", "revision")):
        raise UserError(f"{path} is damaged: remove it and run {COMMAND} again.")
    return manifest


def write_manifest(folder: Path, repository: str, revision: str, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of verified files (`{path: {"size", "sha256"}}`) as a whole or not at all."""
    content = {"kind": KIND, "format": FORMAT, "repository": repository, "revision": revision, "files": files}
    draft = folder / f"{MANIFEST}.part"
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(folder / MANIFEST)
