"""The errors a user is meant to read: one line that says what is wrong, where, and what to do."""


class OldName(FutureWarning):
    """A setting is given by an old name; the text says the new one."""


class FastarError(ValueError):
    """Bad input or an unusable environment. The command line prints the message and exits with code 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a full stop; of an empty one the error's type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".;:")


def printable(text: str) -> str:
    r"""`text` on one line that every stream takes: bytes that are not UTF-8, and control characters, as escapes.

    >>> printable("caf\udce9\n.jpg")
    'caf\\udce9\\n.jpg'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)
