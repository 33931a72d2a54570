"""Prefix caching against none with a real model behind the engine, for `make bench-core` with MODEL=…"""

import os

import numpy as np
import psutil

from redline import LLM, SamplingParams

REQUESTS, INPUT, OUTPUT = 16, 500, 200
SETTINGS = {"max_num_seqs": REQUESTS, "max_model_len": 1024, "kv_cache_memory_bytes": 512 << 20}


def cpu_s() -> float:
    """CPU seconds of this process and of the cores it started."""
    every = [psutil.Process(os.getpid()), *psutil.Process(os.getpid()).children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in every)


def served_pairs(model: str, alternations: int) -> list[tuple[float, float]]:
    """CPU ms for each token that came out, with caching and without, in turns; every prompt is new to both."""
    random = np.random.default_rng(5)
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
    pairs = []
    with (
        LLM(model, enable_prefix_caching=True, **SETTINGS) as cached,
        LLM(model, enable_prefix_caching=False, **SETTINGS) as plain,
    ):
        for number in range(-2, alternations):
            prompts = random.integers(100, 10_000, (REQUESTS, INPUT)).tolist()
            found = {}
            for engine in (cached, plain) if number % 2 else (plain, cached):
                begin = cpu_s()
                engine.generate(prompts, params)
                found[engine is cached] = 1e3 * (cpu_s() - begin) / (REQUESTS * OUTPUT)
            if number >= 0:  # the first turns warm up, and go once through the memory of the cache
                pairs.append((found[True], found[False]))
    return pairs
