"""The load generator: sends requests at given times and records when every byte of the answers arrived.

target.py      where to send, and requests as bytes        recording.py  what came back, as rows
loop.py        the loop of one load point                  response.py   HTTP framing of an answer
connection.py  sockets: plain with kernel stamps, TLS      alarm.py      a timer with microseconds' precision
probe.py       what kind of server answers
"""

from bench.loadgen.loop import Observer, run_load
from bench.loadgen.recording import GeneratorHealth, Recording
from bench.loadgen.target import Target

__all__ = ["GeneratorHealth", "Observer", "Recording", "Target", "run_load"]
