"""`python -m tests.cluster.spilled FOLDER HOST:PORT FILES`: evicted KV blocks of two ranks of a Ray cluster.

Each rank has a folder for files below FILES. Prints as JSON the tokens of all prompts, which come twice, and how many
blocks came from files.
"""

import json
import sys
from pathlib import Path
from typing import Any

from engine.worker.executor import make_executor, reserve_hosts
from tests.engine.test_kv_spill_served import OVER_TCP, PROMPTS, Served, sizes


def start(config: Any, model_info: Any, resolved: Any) -> Any:
    return make_executor(config, model_info, resolved, hosts=reserve_hosts(config))


def main(folder: str, address: str, files: str) -> None:
    model = Path(folder)
    given = f"host={sizes(model, 20)},disk={files}:{sizes(model, 300)}"
    with Served(
        model, 2, kv_spill=given, start=start, device="cpu", ray_address=address, distribute_weights=True, **OVER_TCP
    ) as served:
        tokens = [served.run_in_turn(PROMPTS), served.run(PROMPTS)]
        folders = len(list(Path(files).iterdir()))
    print(json.dumps({"tokens": tokens, "hits": served.spill.disk_hits, "folders": folders}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
