"""The server under test: its address, probe, metrics, reported configuration, and starting it."""

from bench.target.target import Target

__all__ = ["Target"]
