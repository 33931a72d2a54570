"""Tiny models with random weights that pool, and an engine around one of them, without sockets."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.arrays import Float32s
from engine.clock import MonotonicClock
from engine.columns import float32s
from engine.config import EngineConfig
from engine.core.engine import EngineCore
from engine.frontend.streams import NO_OPTIONS
from engine.frontend.vectors import make_pooling_request
from engine.memory import resolve
from engine.messages import Finished, Outputs, decode_from_core, encode
from engine.model.model_info import ModelInfo, read_model_info
from engine.pooling import Pooled
from engine.worker.in_process import InProcessExecutor
from engine.worker.multiprocess import MultiprocessExecutor

VOCABULARY = 128
POSITIONS = 66
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.15,
    "pad_token_id": 1,
}
SMALL_EMBEDDING = {"embedding_size": 16}
ENCODERS: dict[str, dict[str, Any]] = {
    "albert": SMALL_EMBEDDING,
    "bert": {},
    "camembert": {},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4},
    "electra": SMALL_EMBEDDING,
    "modernbert": {
        "local_attention": 8,
        "global_attn_every_n_layers": 3,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "cls_token_id": 2,
        "sep_token_id": 3,
    },
    "mpnet": {},
    "roberta": {},
    "xlm-roberta": {},
}
DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": POSITIONS},
    "llama": {"num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": None},
}

# Fields of BASE that DistilBERT has under other names.
REPLACED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def build(kind: str, folder: Path, auto: str = "AutoModel", **more: Any) -> Any:
    """Save a tiny model with random float32 weights as a class of transformers, and return it; `more` of its config."""
    import transformers

    fields = {**BASE, **(ENCODERS.get(kind) or DECODERS.get(kind) or {}), **more}
    if kind == "distilbert":
        fields = {name: value for name, value in fields.items() if name not in REPLACED}
    config = transformers.AutoConfig.for_model(kind, **fields)
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases begin as zeros, norms as ones: neither would show a mistake
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def write_sentence_transformers(
    folder: Path, mode: str = "mean_tokens", *, normalize: bool = True, most_tokens: int | None = None
) -> None:
    """Add the files that declare the pooling of sentence-transformers."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {"idx": index, "name": str(index), "path": f"{index}_{kind}" if index else "", "type": f"any.models.{kind}"}
        for index, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{one}": one == mode for one in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))
    settings = {"do_lower_case": False} | ({"max_seq_length": most_tokens} if most_tokens else {})
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))


class PoolingEngine:
    """A core and its worker in this process; the vectors are those that leave the core.

    Args:
        config: of the engine.
        send: takes the messages of the core; None: `pool` reads them.
    """

    def __init__(self, config: EngineConfig, send: Callable[[int, bytes], None] | None = None):
        self.model_info: ModelInfo = read_model_info(config)
        self.resolved = resolve(config, self.model_info, available=1 << 30).config
        several = config.num_ranks > 1
        self.executor = (MultiprocessExecutor if several else InProcessExecutor)(config, self.model_info, self.resolved)
        self.clock = MonotonicClock()
        self.core = EngineCore(self.resolved, self.executor, self.clock, send or self._receive)
        self.cached: dict[int, int] = {}  # prompt tokens found in the prefix cache, by handle
        self._pooled: dict[int, Pooled] = {}
        self._finished: dict[int, Finished] = {}
        self._next = 0

    def pool(self, prompts: Sequence[Sequence[int]], second_segments: Sequence[int] = ()) -> list[Float32s]:
        """The vectors of prompts that arrive together. Raises AssertionError with the core's error."""
        segments = second_segments or [0] * len(prompts)
        handles = range(self._next, self._next + len(prompts))
        self._next += len(prompts)
        for handle, prompt, segment in zip(handles, prompts, segments, strict=True):
            self.core.receive(encode(make_pooling_request(handle, list(prompt), segment, NO_OPTIONS)))
        while self.core.has_work:
            if not self.core.step(self.clock.now()):
                time.sleep(0.0002)
            self.core.scheduler.check()
        errors = [self._finished[handle].error for handle in handles if self._finished[handle].error]
        assert not errors, errors[0]
        return [float32s(self._pooled[handle].vector) for handle in handles]

    def _receive(self, _front_end: int, data: bytes) -> None:
        message = decode_from_core(data)
        assert isinstance(message, Outputs)
        assert not message.tokens, "a model that pools samples no tokens"
        self._pooled |= {one.handle: one for one in message.pooled}
        self._finished |= {one.handle: one for one in message.finished}
        self.cached |= {one.handle: one.cached_tokens for one in message.admitted}


@contextmanager
def pooling_engine(
    folder: Path, send: Callable[[int, bytes], None] | None = None, **options: Any
) -> Iterator[PoolingEngine]:
    """An engine on the CPU in float32; `options` of EngineConfig."""
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8, "block_size": 16, **options}
    engine = PoolingEngine(EngineConfig(model=str(folder), **settings), send)
    try:
        yield engine
    finally:
        engine.executor.shutdown()


@torch.inference_mode()
def hidden_states(model: Any, prompt: Sequence[int]) -> Float32s:
    """The last hidden states of transformers' class, [tokens, hidden]."""
    ids = torch.tensor([list(prompt)])
    found: Float32s = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].numpy()
    return found


def pooled(hidden: Float32s, method: str) -> Float32s:
    """Pooled hidden states, computed on their own."""
    if method == "mean":
        return hidden.astype(np.float64).mean(0).astype(np.float32)
    return hidden[0] if method == "cls" else hidden[-1]
