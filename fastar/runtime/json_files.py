"""JSON files as they may be found on disk: an object of finite numbers, or an error that says what is wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DEPTH = 64
"""Deeper than anything that fastar writes, and far from Python's own limit."""
LARGEST = 10**300
"""The largest whole number; a float holds it."""
FILE_SIZE = 10**9
"""The largest file that is read as a whole, in bytes."""
FORMAT = 2
"""The format of files with a digest of their content; those of older versions have neither."""


def parse_object(text: bytes) -> dict[str, Any]:
    """The object that `text` holds.

    Raises:
        ValueError: not JSON in UTF-8, something else than an object, or nesting and numbers that fastar never writes.
    """
    try:
        content = json.loads(text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not valid JSON: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"an object was expected, not {type(content).__name__}")
    layer: list[Any] = [content]
    for _ in range(DEPTH):
        values = [value for outer in layer for value in (outer.values() if isinstance(outer, dict) else outer)]
        for value in values:
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"the number {value} in it")
            if isinstance(value, int) and abs(value) > LARGEST:
                raise ValueError("a number of hundreds of digits in it")
        layer = [value for value in values if isinstance(value, dict | list)]
        if not layer:
            return content
    raise ValueError("nested too deeply")


def read_file(path: Path, most: int = FILE_SIZE) -> bytes:
    """The content of a file of at most `most` bytes, as those of run folders are.

    Raises:
        OSError: it cannot be read, is no file (a pipe would be waited for), or is larger.
    """
    there = path.stat()
    if not stat.S_ISREG(there.st_mode):
        raise OSError(errno.EINVAL, "not a file", str(path))
    if there.st_size > most:
        raise OSError(errno.EFBIG, f"larger than {most:,} bytes", str(path))
    return path.read_bytes()


def read_object(path: Path) -> dict[str, Any]:
    """The object in the JSON file `path`.

    Raises:
        OSError: see `read_file`.
        ValueError: see `parse_object`.
    """
    return parse_object(read_file(path))


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` and a digest of it, for a file; `unsealed` is the way back. Of what is sealed already: the same."""
    whole = json.loads(json.dumps({"format": FORMAT, **content}))  # as it will be read
    whole.pop("digest", None)
    return {**whole, "digest": content_digest(whole)}


def unsealed(content: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The content that was sealed, and whether it had a digest: a file of an older version has none.

    Raises:
        ValueError: the content is not what the digest is of.
    """
    rest = dict(content)
    digest = rest.pop("digest", None)
    if digest is None and "format" not in rest:
        return rest, False
    if digest != content_digest(rest):
        raise ValueError("its content is not what was written")
    rest.pop("format", None)
    return rest, True


def content_digest(content: Mapping[str, Any]) -> str:
    """SHA-256, hexadecimal, of what JSON can hold, the order of keys left aside."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
