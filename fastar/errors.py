"""The errors a user is meant to read: one line that says what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class OldName(FutureWarning):
    """A setting is given by an old name; the text says the new one."""


class FastarError(ValueError):
    """Bad input or an unusable environment. The command line prints the message and exits with code 2."""


class UserCodeError(FastarError):
    """An error in code of the user's own: its cause's traceback is shown, and this line under it."""


def did_you_mean(given: str, valid: Iterable[str]) -> str:
    """`did you mean NAME? ` with the nearest of the `valid` names; nothing where none is near.

    >>> did_you_mean("colour", ["color", "size"])
    "did you mean 'color'? "
    """
    near = difflib.get_close_matches(given, list(valid), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


@contextmanager
def refusal(what: str, remedy: str) -> Iterator[None]:
    """Inside, an OSError is an error for users: `what`, the system's reason, and the remedy."""
    try:
        yield
    except OSError as error:
        raise FastarError(f"{what} ({error.strerror or error}); {remedy}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a full stop; of an empty one the error's type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".;:")


def printable(text: str) -> str:
    r"""`text` on one line that every stream takes: bytes that are not UTF-8, and control characters, as escapes.

    >>> printable("caf\udce9\n.jpg")
    'caf\\udce9\\n.jpg'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)
