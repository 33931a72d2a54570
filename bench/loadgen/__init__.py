"""The load generator: sends requests at given times and records when every byte of the responses arrived.

load.py        the load of one point, open or closed loop   recording.py       responses as request records
loop.py        the loop of one generator process            response.py        HTTP framing of a response
shards.py      several processes, one recording             content_coding.py  gzip and deflate, read by read
connection.py  sockets: plain with kernel timestamps, TLS   sse.py             server-sent events, tokens per chunk
stream.py      one request on the wire                      poller.py          epoll with a precise deadline
schedule.py    when requests are due, connections opened    job.py             what a process sends
"""

from bench.loadgen.job import Observer
from bench.loadgen.load import processes_for, run_closed_loop, run_load
from bench.loadgen.recording import GeneratorHealth, Recording

__all__ = ["GeneratorHealth", "Observer", "Recording", "processes_for", "run_closed_loop", "run_load"]
