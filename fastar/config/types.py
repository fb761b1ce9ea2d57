"""Types of settings, with the values that they allow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from fastar.errors import FastarError

# Anything larger is a slip: torch or Python does not take the size, or it never ends.
MOST = 10**9
Positive = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
UpToAMillion = Annotated[int, Field(ge=1, le=10**6)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """`40GB` (10^9), `40GiB` (2^30), `512MB` as bytes.

    >>> parse_bytes("1.5GB")
    1500000000

    Raises:
        FastarError: not a size.
    """
    number = text.strip().rstrip("BKMGTIbkmgti ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        raise FastarError(f"{text!r} is not a size; write it as 40GB, 40GiB or 512MB") from None
    if not 0 < size < float("inf"):
        raise FastarError(f"{text!r}: a size must be above 0")
    return int(size)


def _with_home(path: Path) -> Path:
    try:
        path.expanduser()
    except RuntimeError:
        raise ValueError("there is no such home folder; write the path out") from None
    return path


def _pairs(value: object) -> object:
    whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST
    if not whole and not (isinstance(value, str) and CROSS.fullmatch(value)):
        raise ValueError("give a number of pairs from 1 on, cross, or cross:SOURCESxHELDOUTS, such as cross:5x3")
    return value


def _size(text: str) -> str:
    parse_bytes(text)  # a FastarError is a ValueError
    return text


CROSS = re.compile(r"cross(?::([1-9][0-9]{0,8})x([1-9][0-9]{0,8}))?")
"""Pairs of sources with heldouts: of all, or of some of both."""
Pairs = Annotated[int | str, BeforeValidator(_pairs)]
Size = Annotated[str, AfterValidator(_size)]
Folder = Annotated[Path, AfterValidator(_with_home)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
