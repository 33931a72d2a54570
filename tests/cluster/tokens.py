"""`python -m tests.cluster.tokens FOLDER ADAPTER HOST:PORT`: what two ranks on a Ray cluster say, as lines of JSON.

The first line is of two pipeline stages, the second of two tensor-parallel ranks, half of whose prompts use the LoRA
adapter of that folder.
These go on until one is lost: the cause, with its time on the monotonic clock, is the last line.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from engine.worker.executor import make_executor, reserve_hosts
from tests.engine.test_ranks import chunks_of_prompts, serve_all


class Kept:
    """An executor that is not shut down once its work is done."""

    def __init__(self, executor: Any):
        self.submit, self.sample, self.call = executor.submit, executor.sample, executor.call

    def shutdown(self) -> None: ...


def main(folder: str, adapter: str, address: str) -> None:
    nodes: list[str] = []
    executors: list[Any] = []

    def start(config: Any, model_info: Any, resolved: Any) -> Any:
        hosts = reserve_hosts(config)
        executor = make_executor(config, model_info, resolved, hosts=hosts)
        nodes[:] = [hosts.address_of(rank) for rank in range(len(executor.ranks))]
        executors.append(executor)
        return executor if config.pipeline_parallel_size > 1 else Kept(executor)

    backend = {
        "device": "cpu",
        "distributed_executor_backend": "ray",
        "ray_address": address,
        "distribute_weights": True,
    }
    for tp, pp, used in ((1, 2, {}), (2, 1, {"one": Path(adapter)})):
        tokens, stats, executor = serve_all(
            Path(folder), tp, start, adapters=used, pipeline_parallel_size=pp, **backend
        )  # fmt: skip
        found = {
            "tokens": tokens, "nodes": nodes, "preemptions": stats.preemptions, "prefix_hits": stats.prefix_hits,
            "chunks": chunks_of_prompts(executor.messages), "in_flight": max(executor.in_flight),
        }  # fmt: skip
        print(json.dumps(found), flush=True)
    error = executors[-1].ended.exception()
    print(json.dumps({"error": str(error), "at": time.monotonic()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
