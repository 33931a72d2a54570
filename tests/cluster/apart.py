"""`python -m tests.cluster.apart HOST:PORT MM_FOLDER FOLDER FILES`: two ranks that share no memory with their core.

Prints as JSON the tokens of the samples of a LLaVA in MM_FOLDER, whose feature files are written there, too. Then those
of a model in FOLDER with --kv-spill, for prompts that come twice, and how many of their blocks came from files below
FILES, and in how many folders these were on this machine.
"""

import json
import sys
from pathlib import Path
from typing import Any

from engine.worker.executor import make_executor, reserve_hosts
from tests.engine.test_kv_spill_served import OVER_TCP, PROMPTS, Served, sizes
from tests.engine.worker.mm_driver import Prompts
from tests.engine.worker.mm_driver import start as start_mm
from tests.engine.worker.mm_models import MM_MODELS
from tests.engine.worker.mm_parity import NEW


def make(config: Any, model_info: Any, resolved: Any) -> Any:
    return make_executor(config, model_info, resolved, hosts=reserve_hosts(config))


def main(address: str, mm_folder: str, folder: str, files: str) -> None:
    backend: dict[str, Any] = {"device": "cpu", "ray_address": address, "distribute_weights": True, **OVER_TCP}
    driver = start_mm(Path(mm_folder), 2, make=make, **backend)
    requests = Prompts(Path(mm_folder), MM_MODELS["llava"]).samples()
    driver.run(requests, NEW, seed=6, preempt=0.6, chunk=9)
    driver.executor.shutdown()
    model = Path(folder)
    given = f"host={sizes(model, 20)},disk={files}:{sizes(model, 300)}"
    with Served(model, 2, kv_spill=given, start=make, **backend) as served:
        tokens = [served.run_in_turn(PROMPTS), served.run(PROMPTS)]
        folders = len(list(Path(files).iterdir()))
    found = {
        "of images": [request.output for request in requests],
        "tokens": tokens,
        "hits": served.spill.disk_hits,
        "folders": folders,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
