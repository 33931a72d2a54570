"""The server of bench_share.py: `redline serve`, with share_core.py in the place of its core.

    python -m tests.perf.share_server CORE MODEL [FLAGS]

Everything starts on the core CORE, so that the device takes one thread; bench_share.py moves the rest away.
"""

import os
import sys

from cli.main import main
from engine import children

CORE_MODULE = "tests.perf.share_core"

if __name__ == "__main__":
    os.sched_setaffinity(0, {int(sys.argv[1])})
    spawn = children.spawn
    children.spawn = lambda module, *rest: spawn(CORE_MODULE if module == "engine.launch" else module, *rest)
    sys.exit(main(["serve", *sys.argv[2:]]))
