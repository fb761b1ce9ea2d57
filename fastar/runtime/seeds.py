"""Seeds derived from names, so that no two random choices share a stream and none depends on hashing order."""

import hashlib


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the random choice called `names` under the run's `seed` (SHA-256, stable for ever).

    >>> derive_seed(0, "source", 3, "order") == derive_seed(0, "source", 3, "order")
    True
    >>> derive_seed(0, "source", 3, "order") == derive_seed(0, "source", 31, "order")
    False
    """
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
