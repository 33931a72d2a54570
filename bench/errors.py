"""The error that bench shows to a user as one line."""


class BenchError(Exception):
    """Something the user can change: its message names the cause and the flag or field to change."""
