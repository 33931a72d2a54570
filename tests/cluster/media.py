"""`python -m tests.cluster.media FOLDER HOST:PORT`: prompts with images on two ranks of a Ray cluster.

Prints the tokens of all samples of a LLaVA in that folder, as JSON. Feature files are written to the folder, too.
"""

import json
import sys
from pathlib import Path
from typing import Any

from engine.worker.executor import make_executor, reserve_hosts
from tests.engine.worker.mm_driver import Prompts, start
from tests.engine.worker.mm_models import MM_MODELS
from tests.engine.worker.mm_parity import NEW


def main(folder: str, address: str) -> None:
    def make(config: Any, model_info: Any, resolved: Any) -> Any:
        return make_executor(config, model_info, resolved, hosts=reserve_hosts(config))

    driver = start(
        Path(folder), 2, make=make, device="cpu", distributed_executor_backend="ray", ray_address=address,
        distribute_weights=True,
    )  # fmt: skip
    requests = Prompts(Path(folder), MM_MODELS["llava"]).samples()
    driver.run(requests, NEW, seed=6, preempt=0.6, chunk=9)
    driver.executor.shutdown()
    print(json.dumps([request.output for request in requests]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
