"""A server on simulated hardware and the load of its points, in virtual time: no socket, no thread, no wall clock.

server.py     the server under test, as `bench.measurement.server` describes one
load.py       sends the requests of a load point and lets time pass
recording.py  its recording, as request records
prompts.py    prompts of texts as token ids
reader.py     reads the counters
"""

from bench.simulation.server import SimulatedServer

__all__ = ["SimulatedServer"]
