"""Tiny models with random weights, and a driver that makes step messages by itself."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from engine.columns import column, int32s
from engine.messages import Sampling, SlotAssignment, StepMessage, StepResult, decode_result, encode
from engine.worker.in_process import InProcessExecutor

VOCAB = 128
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
PLAIN = {"num_key_value_heads": None}  # as many as heads
WINDOWED = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# As the classes scale by default, but to the 256 positions of BASE.
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 16}
MODELS: dict[str, dict[str, object]] = {
    "cohere2": {**WINDOWED, "logit_scale": 1.0},
    "deepseek_v3": {
        **PLAIN,
        **MOE,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
    },
    "exaone4": {**WINDOWED, "head_dim": 8},
    "gemma2": {**WINDOWED, "head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**WINDOWED, "head_dim": 16, "query_pre_attn_scalar": 16},
    "glm4": {"head_dim": 8},
    "gpt2": {**PLAIN, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 256},
    "gpt_neox": {**PLAIN},
    "gpt_oss": {**WINDOWED, **MOE, "head_dim": 8, "rope_parameters": {**YARN, "truncate": False}},
    "granite": {"attention_multiplier": 0.3},
    "llama": {"rope_parameters": {**YARN, "factor": 2.0, "original_max_position_embeddings": 128}},
    "ministral": {**WINDOWED, "head_dim": 8},
    "ministral3": {"head_dim": 8, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1, "mscale": 1.0}},
    "mistral": {"sliding_window": 9, "head_dim": 16},
    "mixtral": {**MOE},
    "olmo2": {},
    "olmo3": {**WINDOWED},
    "opt": {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": {"original_max_position_embeddings": 256},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 9},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 24},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**MOE, "head_dim": 16},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 9},
}


def build_model(kind: str, folder: Path, **more: object) -> torch.nn.Module:
    """Save a tiny model of that kind with random float32 weights, and return it; `more` of its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**BASE, **MODELS[kind], **more})
    torch.manual_seed(7)
    # Some releases of transformers give gemma2 an attention by default that ignores the softcap.
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for values in (*model.parameters(), *(b for n, b in model.named_buffers() if n in model.state_dict())):
            if values.ndim == 1:  # biases begin as zeros, norms as ones: neither would show a mistake
                values += 0.1 * torch.randn_like(values)
    model.save_pretrained(folder)
    return model.eval()


Prefixes = dict[tuple[int, ...], tuple[int, ...]]  # what they are known by -> blocks of each KV group


@dataclass
class Request:
    """What the driver knows of one request."""

    prompt: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    adapter: str = ""  # its key
    output: list[int] = field(default_factory=list)
    row: int = -1
    computed: int = 0
    tables: list[list[int]] = field(default_factory=list)  # of each KV group
    logprobs: list[dict[int, float]] = field(default_factory=list)

    @property
    def known(self) -> list[int]:
        return self.prompt + self.output

    def key(self, end: int) -> tuple[int, ...]:
        """What a prefix of `end` tokens is known by."""
        return (hash(self.adapter), *self.known[:end])


class Driver:
    """Schedules requests at random: ragged chunks, late arrivals, rests, preemptions, shared prefix blocks."""

    def __init__(
        self,
        executor: InProcessExecutor,
        *,
        rows: int,
        block_size: int,
        num_blocks: int,
        windows: tuple[int, ...] = (0,),
    ):
        self.executor = executor
        self.windows = windows
        self.free_rows = list(range(rows))
        self.block_size = block_size
        self.free_blocks = list(range(1, num_blocks))
        self.generations = [0] * rows
        self.step = 0
        self.preemptions = 0
        self.shared = 0
        self.left = 0  # blocks that a window left
        self.drafted = 0

    def run(
        self,
        requests: list[Request],
        new: int,
        *,
        seed: int,
        chunk: int = 7,
        preempt: float = 0.15,
        prefixes: Prefixes | None = None,
    ) -> None:
        """Run all requests to `new` output tokens each.

        chunk: most tokens of a request in a step; 0: all that are left. prefixes: blocks, of each KV group, by what
        they hold and what comes before; those that are there are shared, new ones are added.
        """
        luck = random.Random(seed)
        waiting, running = list(requests), list[Request]()
        removed: list[int] = []
        prefixes = {} if prefixes is None else prefixes
        while waiting or running:
            added = []
            while waiting and self.free_rows and (not running or luck.random() < 0.5):
                request = waiting.pop(0)
                added.append(self._admit(request, prefixes))
                running.append(request)
            chunks, work, blocks = [], [], []
            for request in running:
                left = len(request.known) - request.computed
                count = luck.randint(0 if left == 1 else 1, min(left, chunk)) if chunk else left
                count = self._fitting(request, count)
                if count != 1:
                    chunks.append((request.row, count))
                if count:
                    work.append((request, count))
                    blocks += self._grow(request, request.computed + count, prefixes)
            message = StepMessage(self.step, column(removed), tuple(added), column(blocks), column(chunks))
            self._book(self._run_step(self._completed(message, work)), work)
            removed = []
            for request in list(running):
                done = len(request.output) >= new
                if done or luck.random() < preempt / 4:
                    running.remove(request)
                    removed.append(request.row)
                    self._release(request)
                    if not done:
                        self.preemptions += 1
                        waiting.insert(0, request)
        if removed:
            self._run_step(StepMessage(self.step, column(removed)))

    def _fitting(self, request: Request, count: int) -> int:
        """How many of `count` tokens the next step can compute."""
        del request
        return count

    def _completed(self, message: StepMessage, work: list[tuple[Request, int]]) -> StepMessage:
        """The message with what a subclass adds to it; `work`: tokens that requests compute."""
        del work
        return message

    def _admit(self, request: Request, prefixes: Prefixes) -> SlotAssignment:
        request.row = self.free_rows.pop(0)
        self.generations[request.row] += 1
        request.tables, known = [[] for _ in self.windows], request.known
        while (end := (len(request.tables[0]) + 1) * self.block_size) < len(known) and request.key(end) in prefixes:
            for table, block in zip(request.tables, prefixes[request.key(end)], strict=True):
                table.append(block)
            self.shared += 1
        request.computed = len(request.tables[0]) * self.block_size
        return SlotAssignment(
            request.row,
            self.generations[request.row],
            column(known),
            len(request.prompt),
            request.computed,
            tuple(map(column, request.tables)),
            request.sampling,
            adapter=request.adapter,
        )

    def _grow(self, request: Request, end: int, prefixes: Prefixes) -> list[tuple[int, int, int]]:
        """Blocks up to `end`; full ones may be shared from now on, also by requests of this very step."""
        self._leave(request, prefixes)
        new = []
        for group, table in enumerate(request.tables):
            while len(table) * self.block_size < end:
                block = self.free_blocks.pop(0)
                new.append((request.row, group, block))
                table.append(block)
        for i in range(request.computed // self.block_size, end // self.block_size):
            blocks = tuple(table[i] for table in request.tables)
            prefixes.setdefault(request.key((i + 1) * self.block_size), blocks)
        return new

    def _leave(self, request: Request, prefixes: Prefixes) -> None:
        """Blocks that a window has left go to whoever wants one next, unless they are shared."""
        shared = {block for blocks in prefixes.values() for block in blocks}
        for table, window in zip(request.tables, self.windows, strict=True):
            for i in range(max(0, request.computed - window + 1) // self.block_size if window else 0):
                if table[i] and table[i] not in shared:
                    self.free_blocks.insert(0, table[i])
                    self.left += 1
                    table[i] = 0

    def _release(self, request: Request) -> None:
        # Blocks aren't reused within a run, so that shared ones stay valid.
        self.free_rows.append(request.row)
        request.row, request.computed = -1, 0

    def _run_step(self, message: StepMessage) -> StepResult:
        forward = self.executor.submit(encode(message))
        result = self.executor.sample(message.step)
        forward.result()
        self.step += 1
        return decode_result(result.result())

    def _book(self, result: StepResult, work: list[tuple[Request, int]]) -> None:
        tokens = int32s(result.tokens).tolist()
        sampled = []
        for request, count in sorted(work, key=lambda pair: pair[0].row):
            request.computed += count
            if request.computed == len(request.known):
                sampled.append(request)
        counts = int32s(result.counts).tolist() if result.counts else [1] * len(sampled)
        self.drafted += result.num_draft_tokens
        assert len(tokens) == sum(counts)
        begin = 0
        logprobs = _by_token(result)
        for request, count in zip(sampled, counts, strict=True):
            request.output += tokens[begin : begin + count]
            request.logprobs += [logprobs[i] for i in range(begin, begin + count) if i in logprobs]
            request.computed += count - 1
            begin += count


def _by_token(result: StepResult) -> dict[int, dict[int, float]]:
    """Logprobs by id of the tokens of a step that asked for them, by the tokens' number."""
    found = result.logprobs
    if found is None:
        return {}
    ids, values = (
        column.reshape(-1, found.width) for column in (int32s(found.ids), np.frombuffer(found.values, dtype="<f4"))
    )
    return {
        at: dict(zip(some, logprobs, strict=True))
        for at, some, logprobs in zip(int32s(found.index).tolist(), ids.tolist(), values.tolist(), strict=True)
    }
