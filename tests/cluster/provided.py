"""`python -m tests.cluster.provided FOLDER HOST:PORT KIND:PATH…`: what the nodes of a Ray cluster have for two ranks.

KIND is `model` or `adapter`. FOLDER is that of a model. Prints a JSON list as the last line: of each path the error of
an engine that needs it, or an empty text; at the end the error of one that needs GPUs.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.errors import ConfigError, ModelError
from engine.worker.ray_hosts import RayHosts


def main(folder: str, address: str, *paths: str) -> None:
    config = EngineConfig(
        model=folder, tensor_parallel_size=2, device="cpu", distributed_executor_backend="ray", ray_address=address
    )
    hosts = RayHosts(config)
    provide: dict[str, Callable[..., Any]] = {"model": hosts.provide_model, "adapter": hosts.provide_adapter}
    errors = []
    for one in paths:
        kind, _, path = one.partition(":")
        errors.append(error_of(partial(provide[kind], Path(path), distribute=False)))
    hosts.close()
    errors.append(error_of(lambda: RayHosts(replace(config, device="cuda"))))
    print(json.dumps(errors), flush=True)


def error_of(run: Callable[[], object]) -> str:
    try:
        run()
    except (ConfigError, ModelError) as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
