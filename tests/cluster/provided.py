"""`python -m tests.cluster.provided FOLDER HOST:PORT KIND:PATH…`: which files the nodes of a Ray cluster have.

KIND is `model` or `adapter`. FOLDER is that of a model. Prints a JSON list as the last line: of each path the error of
an engine that needs it on two nodes, or an empty text.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.worker.ray_hosts import RayHosts


def main(folder: str, address: str, *paths: str) -> None:
    config = EngineConfig(
        model=folder, tensor_parallel_size=2, device="cpu", distributed_executor_backend="ray", ray_address=address
    )  # fmt: skip
    hosts = RayHosts(config)
    provide: dict[str, Callable[..., Any]] = {"model": hosts.provide_model, "adapter": hosts.provide_adapter}
    errors = []
    for one in paths:
        kind, _, path = one.partition(":")
        try:
            provide[kind](Path(path), distribute=False)
            errors.append("")
        except ModelError as error:
            errors.append(str(error))
    hosts.close()
    print(json.dumps(errors), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
