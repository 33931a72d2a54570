"""The server of bench_share.py and bench_mm_stall.py: `redline serve`, with another module in the place of its core.

    python -m tests.perf.share_server CORE MODEL [FLAGS]

Everything starts on the core CORE, so that the device takes one thread; the benchmarks move the rest away. The module
is share_core.py, or the one that CORE_MODULE names in the environment.
"""

import os
import sys

from cli.main import main
from engine import children

CORE_MODULE = os.environ.get("CORE_MODULE", "tests.perf.share_core")

if __name__ == "__main__":
    os.sched_setaffinity(0, {int(sys.argv[1])})
    spawn = children.spawn
    children.spawn = lambda module, *rest: spawn(CORE_MODULE if module == "engine.launch" else module, *rest)
    sys.exit(main(["serve", *sys.argv[2:]]))
