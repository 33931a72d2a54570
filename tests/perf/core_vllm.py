"""vLLM's scheduler, driven as `make bench-core` drives ours; run by an interpreter that has vLLM.

    python core_vllm.py '{"rows": [32, 256], "steps": 2048, "block_size": 16}'

No model is loaded: the scheduler gets a configuration, a pool and random tokens. The last line printed is a JSON list
of rows. Knows nothing of this repository, since the interpreter doesn't.
"""

import gc
import json
import pickle
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackEncoder
from vllm.v1.structured_output import StructuredOutputManager

VOCABULARY = 30_000
ROUND_STEPS = 64
WARM_UP_STEPS = 64
ADMISSION_REPEATS = 150
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32_000,
    "max_position_embeddings": 1 << 17, "torch_dtype": "float32",
}  # fmt: skip

thread_ns = time.thread_time_ns


class Engine:
    """One scheduler, what drives it, and the CPU time of its calls."""

    def __init__(self, folder: Path, kind: type, rows: int, longest: int, blocks: int, caching: bool, block: int):
        model = ModelConfig(
            model=str(folder), skip_tokenizer_init=True, dtype="float32", seed=0, max_model_len=longest
        )  # fmt: skip
        scheduling = SchedulerConfig(
            max_model_len=longest, is_encoder_decoder=False, max_num_seqs=rows,
            max_num_batched_tokens=max(rows * 5 * block, longest), enable_chunked_prefill=True,
            async_scheduling=kind is AsyncScheduler,
        )  # fmt: skip
        cache = CacheConfig(block_size=block, enable_prefix_caching=caching)
        cache.num_gpu_blocks = blocks
        config = VllmConfig(model_config=model, scheduler_config=scheduling, cache_config=cache)
        spec = FullAttentionSpec(block_size=block, num_kv_heads=1, head_size=8, dtype=torch.float32)
        pool = KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )
        structured = StructuredOutputManager(config)
        self.scheduler = kind(config, pool, structured, block_size=block, hash_block_size=block, log_stats=True)
        hashing = get_hash_fn_by_name(cache.prefix_caching_hash_algo)
        init_none_hash(hashing)
        self._hasher = get_request_block_hasher(block, hashing) if caching else None
        self._depth = 2 if kind is AsyncScheduler else 1
        self._flying: list[Any] = []
        self._random = Random(1)
        self._encoder = MsgpackEncoder()
        self._number = 0
        self.schedule_ns = self.update_ns = 0
        self.scheduled: Any = None  # the newest SchedulerOutput
        self.outputs: Any = None  # the newest EngineCoreOutputs

    def request(self, length: int, max_tokens: int) -> Request:
        self._number += 1
        return Request(
            request_id=f"cmpl-{self._number:032x}",
            prompt_token_ids=[self._random.randrange(3, VOCABULARY) for _ in range(length)],
            sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0),
            pooling_params=None,
            block_hasher=self._hasher,
        )

    def schedule(self) -> None:
        begin = thread_ns()
        self.scheduled = self.scheduler.schedule()
        self.schedule_ns = thread_ns() - begin
        # A chunk that doesn't reach the end of what is known yields no token.
        known = self.scheduler.requests
        names = list(self.scheduled.num_scheduled_tokens)
        whole = [known[name].num_computed_tokens >= known[name].num_prompt_tokens for name in names]
        self._flying.append((self.scheduled, names, whole))

    def update(self) -> None:
        step, names, whole = self._flying.pop(0)
        tokens = [[self._random.randrange(3, VOCABULARY)] if ends else [] for ends in whole]
        output = ModelRunnerOutput(names, {name: at for at, name in enumerate(names)}, tokens)
        begin = thread_ns()
        self.outputs = self.scheduler.update_from_output(step, output)
        self.update_ns = thread_ns() - begin

    def turn(self) -> int:
        """One step, planned ahead of its result where the scheduler can; CPU ns of schedule and update."""
        while len(self._flying) < self._depth:
            self.schedule()
        self.update()
        return self.schedule_ns + self.update_ns

    def sizes(self) -> tuple[int, int]:
        """Bytes of the newest messages to the workers and to the client."""
        step = len(pickle.dumps(self.scheduled, protocol=pickle.HIGHEST_PROTOCOL))
        client = sum(len(part) for one in self.outputs.values() for part in self._encoder.encode(one))
        return step, client


def median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


class Cell:
    """Rows that decode, and nothing else happens."""

    def __init__(self, folder: Path, kind: type, rows: int, caching: bool, together: bool, steps: int, block: int):
        output = steps + 2 * WARM_UP_STEPS
        longest = 5 * block + output
        self.engine = Engine(folder, kind, rows, longest, rows * (longest // block + 2) + 1, caching, block)
        self.samples: list[float] = []
        self.sizes: list[tuple[int, int]] = []
        for row in range(rows):
            length = 4 * block + (0 if together else row % block)
            self.engine.scheduler.add_request(self.engine.request(length, output))
        while len(self.engine.scheduler.running) < rows:
            self.engine.turn()
        for _ in range(WARM_UP_STEPS):
            self.engine.turn()

    def round(self) -> None:
        for number in range(ROUND_STEPS):
            self.samples.append(self.engine.turn() / 1e3)
            if number % 5 == 0:
                self.sizes.append(self.engine.sizes())


def decode_rows(folder: Path, kind: type, name: str, rows: int, together: bool, asked: dict[str, Any]) -> list[Any]:
    steps, block = asked["steps"], asked["block_size"]
    cells = {caching: Cell(folder, kind, rows, caching, together, steps, block) for caching in (True, False)}
    for number in range(-(-steps // ROUND_STEPS)):
        for caching in (True, False) if number % 2 else (False, True):
            cells[caching].round()
    return [
        {
            "engine": name, "rows": rows, "caching": caching, "blocks": "together" if together else "spread",
            "step_us": median(cell.samples), "step_mean_us": sum(cell.samples) / len(cell.samples),
            "step_message_bytes": median([float(step) for step, _ in cell.sizes]),
            "step_message_max_bytes": max(step for step, _ in cell.sizes),
            "client_message_bytes": median([float(client) for _, client in cell.sizes]),
        }
        for caching, cell in cells.items()
    ]  # fmt: skip


def admission_row(folder: Path, caching: bool, full: bool, asked: dict[str, Any]) -> dict[str, Any]:
    """One request after the other, as on our side: what a step that admits costs beyond one that decodes a row."""
    tokens, block = asked["admission_tokens"], asked["block_size"]
    blocks = tokens // block + 1
    pool = 1 + blocks * (8 if full else ADMISSION_REPEATS + 32)
    engine = Engine(folder, Scheduler, 4, 2 * tokens, pool, caching, block)
    loop, made = [], []
    for number in range(ADMISSION_REPEATS + 16):
        prompt = [engine._random.randrange(3, VOCABULARY) for _ in range(tokens)]
        params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0)
        begin = thread_ns()
        request = Request(f"cmpl-{number:032x}", prompt, params, None, block_hasher=engine._hasher)
        after = thread_ns()
        engine.scheduler.add_request(request)
        added = thread_ns()
        engine.turn()
        admitting = engine.schedule_ns
        engine.turn()
        decoding = engine.schedule_ns
        while engine.scheduler.has_unfinished_requests():
            engine.turn()
        if number >= 16:
            made.append((after - begin) / 1e3)
            loop.append((added - after + admitting - decoding) / 1e3)
    return {
        "engine": "vllm", "caching": caching, "pool": "cached" if full else "fresh", "tokens": tokens,
        "admission_us": median(loop), "receive_us": median(made),
    }  # fmt: skip


def main() -> None:
    asked = json.loads(sys.argv[1])
    gc.disable()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        for rows in asked["rows"]:
            for together in (False, True):
                found += decode_rows(folder, Scheduler, "vllm", rows, together, asked)
            found += decode_rows(folder, AsyncScheduler, "vllm async", rows, False, asked)
        for caching, full in ((True, False), (True, True), (False, False)):
            found.append(admission_row(folder, caching, full, asked))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
