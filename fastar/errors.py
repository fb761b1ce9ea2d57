"""The errors a user is meant to read: one line that says what is wrong, where, and what to do."""


class FastarError(ValueError):
    """Bad input or an unusable environment. The command line prints the message and exits with code 2."""
