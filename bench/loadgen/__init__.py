"""The load generator: sends requests at given times and records when every byte of the responses arrived.

target.py      where to send, and requests as bytes        recording.py  what came back, as rows
load.py        the load of one point, open or closed loop  response.py   HTTP framing of an answer
loop.py        the loop of one generator process           alarm.py      a timer with microseconds' precision
shards.py      several of them, one record                 probe.py      what kind of server answers
connection.py  sockets: plain with kernel stamps, TLS      coding.py     gzip and deflate, undone read by read
stream.py      one request on the wire                     tls.py        which certificates are trusted
"""

from bench.loadgen.load import processes_for, run_closed_loop, run_load
from bench.loadgen.loop import Observer
from bench.loadgen.recording import GeneratorHealth, Recording
from bench.loadgen.target import Target

__all__ = ["GeneratorHealth", "Observer", "Recording", "Target", "processes_for", "run_closed_loop", "run_load"]
