"""Load from several hosts: `redline generate` on each of them, and the run of `redline bench` that uses them.

messages.py    what crosses the connection                clocks.py      two clocks compared by round trips
channel.py     messages over TCP or TLS                   split.py       the requests of a load, divided by the seed
handshake.py   both sides prove that they have the token  generators.py  the run: one load from all generators
listener.py    a generator: accepts runs                  remote.py      the run: one generator
session.py     a generator: its loads for a run
"""

from bench.generators.generators import Generators
from bench.generators.remote import WAIT_LIMIT_S, LostGeneratorError, Waiting

__all__ = ["WAIT_LIMIT_S", "Generators", "LostGeneratorError", "Waiting"]
