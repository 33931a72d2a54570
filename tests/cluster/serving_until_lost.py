"""`python -m tests.cluster.serving_until_lost FOLDER HOST:PORT`: an `LLM` on a Ray cluster, until a part of it is lost.

Prints a line as soon as it generates, and the error as JSON, with its time on the monotonic clock, as the last one.
"""

import json
import sys
import time

from engine.errors import RedlineError
from redline import LLM, SamplingParams


def main(folder: str, address: str) -> None:
    with LLM(
        folder, load_format="dummy", dtype="float32", kv_cache_memory_bytes=4 << 20, tensor_parallel_size=2,
        device="cpu", distributed_executor_backend="ray", ray_address=address,
    ) as llm:  # fmt: skip
        print("generating", flush=True)
        try:
            while True:
                llm.generate([[5, 6, 7]], SamplingParams(max_tokens=200, ignore_eos=True))
        except RedlineError as error:
            print(json.dumps({"error": str(error), "at": time.monotonic()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
