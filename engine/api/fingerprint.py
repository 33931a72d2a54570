"""`system_fingerprint`: while it is the same, a seed gives the same output."""

import hashlib
from importlib import metadata

from engine.messages import Ready


def system_fingerprint(ready: Ready) -> str:
    """The version of the server, and a hash of what decides the numbers of its outputs."""
    version = metadata.version("redline-llm")
    decisive = (
        version,
        ready.model_path,
        ready.device,
        ready.dtype,
        ready.vocab_size,
        ready.kernels,
        ready.quantization,
        ready.kv_cache_dtype,
    )
    name = f"redline-{version}-simulated" if ready.simulated else f"redline-{version}"
    return f"{name}-{hashlib.blake2b(repr(decisive).encode(), digest_size=4).hexdigest()}"
