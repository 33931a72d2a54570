"""The error that is shown to the user as one line."""


class BenchError(Exception):
    """An error that the user can fix; the message names the cause and the flag or field to change."""
