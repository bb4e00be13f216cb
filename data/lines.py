"""From the bytes of a file to its content: gzip, lines, texts, JSON, and what can be wrong with them.

Everything before a damaged place is delivered, whatever the size of the chunks that the bytes come in, so that
documents get the same numbers from a local file as from the Hub.
"""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

CHUNK = 1 << 16  # bytes read at once; as gzip they hold at most 1,032 times as many
LONGEST_LINE = 1 << 26  # bytes


class Damage(Exception):
    """What is wrong with a document or with the rest of a file, and what to do; the place is not part of it."""


def file_size(path: Path) -> int:
    """Bytes of a regular file. Raises `UserError` for anything else, such as a broken link or a pipe."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): remove it or put it right.") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a regular file: remove it or give another data.path.")
    return status.st_size


def open_regular(path: Path) -> io.FileIO:
    """A regular file, open for reading. Raises `OSError`, also for anything else: nothing is waited for."""
    # Not blocking: opening a pipe that nobody writes to would never return.
    file = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    return file


def file_chunks(path: Path, size: int) -> Iterator[bytes]:
    """The bytes of a local file that had `size` bytes when it was listed. Raises `UserError`."""
    done = 0
    try:
        with open_regular(path) as file:
            while chunk := file.read(CHUNK):
                done += len(chunk)
                yield chunk
    except OSError as error:
        raise UserError(
            f"{path}, after byte {done}: cannot be read ({error.strerror or error}); put it right and start again to resume."
        ) from error
    if done != size:
        raise UserError(
            f"{path} has changed since it was opened, from {size} to {done} bytes: put the old file back and start again "
            "to resume."
        )


def inflate(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The content of a gzip file of one or more members, which zeros may follow. Raises `Damage`."""
    engine = None
    first = True
    for chunk in _small(chunks):
        while chunk:
            if engine is None:
                chunk = chunk if first else chunk.lstrip(b"\0")
                if not chunk:
                    break
                engine, first = zlib.decompressobj(zlib.MAX_WBITS + 16), False
            before = engine.copy()
            try:
                piece = engine.decompress(chunk)
            except zlib.error as error:
                yield _until_damage(before, chunk)
                raise Damage(f"damaged or cut gzip file ({error}); fetch the file again.") from error
            yield piece
            chunk = engine.unused_data
            if engine.eof:
                engine = None
    if engine is not None:
        raise Damage("damaged or cut gzip file (it ends too early); fetch the file again.")


def _small(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in chunks of at most CHUNK bytes."""
    for chunk in chunks:
        for start in range(0, len(chunk), CHUNK):
            yield chunk[start : start + CHUNK]


def _until_damage(engine: zlib._Decompress, chunk: bytes) -> bytes:
    """What `engine` gives for `chunk` up to its error: byte by byte, because the error takes the call's output along."""
    pieces: list[bytes] = []
    try:
        for i in range(len(chunk)):
            pieces.append(engine.decompress(chunk[i : i + 1]))
    except zlib.error:
        pass
    return b"".join(pieces)


def split_lines(pieces: Iterable[bytes]) -> Iterator[bytes | None]:
    r"""The lines of a file, each with its \n except perhaps the last; None for one beyond `LONGEST_LINE` bytes."""
    parts: list[bytes] = []
    size = 0
    for piece in pieces:
        *complete, rest = piece.split(b"\n")
        for end in complete:
            yield b"".join((*parts, end, b"\n")) if size + len(end) < LONGEST_LINE else None
            parts, size = [], 0
        size += len(rest)
        if size < LONGEST_LINE:
            parts.append(rest)
        else:  # not kept
            parts = []
    if size:
        yield b"".join(parts) if size < LONGEST_LINE else None


def decoded(line: bytes | None) -> str:
    """The text of a line of UTF-8. Raises `Damage`."""
    if line is None:
        raise Damage(f"longer than {LONGEST_LINE >> 20} MiB; put one document on a line.")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Damage(f"not UTF-8 ({error.reason}); convert the file to UTF-8.") from error


def json_text(line: str, column: str) -> str:
    """The text under the key `column` of a line of JSON. Raises `Damage`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: a number of more than 4,300 digits, too
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise Damage(
            f'not a JSON object ({reason}); each line must be one document like {{"{column}": "..."}}.'
        ) from error
    text = record.get(column) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise Damage(f'no text under the key "{column}"; correct the file or set data.text_column.')
    return encodable(text)


def encodable(text: str) -> str:
    r"""The text itself. Raises `Damage` for half of a surrogate pair, such as "\ud800", which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise Damage(f"half of a surrogate pair ({half}), which is no character; correct the file.") from error
    return text


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `OSError`, also for what is no regular file, and `ValueError`."""
    with open_regular(path) as file:
        content = file.readall()
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def misfit(value: Any, shape: Any, name: str = "") -> str | None:
    """Which part of JSON content has another shape, such as "files.0.size"; None where all is as it should be.

    A shape is a type (int: of 0 or more, and below 2^63), `object` for anything, None, a tuple of possible shapes, a
    list for a list of such values, or a dict for an object with at least these keys.
    """
    parts: list[tuple[str, Any, Any]] = []
    if isinstance(shape, tuple):
        fits = any(misfit(value, one) is None for one in shape)
    elif isinstance(shape, list):
        fits = isinstance(value, list)
        parts = [(str(i), part, shape[0]) for i, part in enumerate(value)] if fits else []
    elif isinstance(shape, dict):
        fits = isinstance(value, dict)
        parts = [(key, value.get(key, ...), one) for key, one in shape.items()] if fits else []
    elif shape is int:
        fits = type(value) is int and 0 <= value < 1 << 63
    else:
        fits = value is not ... and (shape is object or value is shape or type(value) is shape)
    if not fits:
        return name
    found = (misfit(part, one, f"{name}.{key}".lstrip(".")) for key, part, one in parts)
    return next((part for part in found if part is not None), None)
