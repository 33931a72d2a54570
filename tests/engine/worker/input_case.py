"""Prompts whose tokens partly have embeddings of multimodal inputs, as steps and as transformers computes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.arrays import Int64s
from engine.model.composed_decoder import ComposedDecoder
from engine.worker.mm_rows import MMRows
from engine.worker.slots import StepBatch
from tests.engine.composites import VOCAB


@dataclass(frozen=True)
class Prompt:
    """Token ids, and what stands for some of them. rotary: int64[3, tokens], None without M-RoPE."""

    ids: Int64s
    at: Int64s
    embeddings: Tensor
    deepstack: Tensor | None
    rotary: Int64s | None

    @classmethod
    def draw(
        cls, tokens: int, hidden: int, dtype: torch.dtype, seed: int, *, mrope: bool = False, deepstack: int = 0
    ) -> "Prompt":
        """A prompt in which about half of the tokens have embeddings."""
        random = np.random.default_rng(seed)
        at = np.flatnonzero(random.random(tokens) < 0.5)
        numbers = torch.from_numpy(random.standard_normal((1 + deepstack, len(at), hidden))).to(dtype)
        rotary = random.integers(0, 2 * tokens, (3, tokens)) if mrope else None
        ids = random.integers(0, VOCAB, tokens)
        ids[at] += VOCAB  # some checkpoints have no embedding for such a token
        return cls(ids, at, numbers[0], numbers[1:] if deepstack else None, rotary)

    @torch.inference_mode()
    def expected(self, model: Any) -> NDArray[np.float32]:
        """The logits of all tokens as transformers' class computes them in one pass."""
        part = ComposedDecoder(model)
        embedded = part.model.embed_tokens(torch.from_numpy(np.where(self.ids < VOCAB, self.ids, 0))[None])
        embedded[0, self.at] = self.embeddings.to(embedded.dtype)
        options: dict[str, Any] = {}
        if self.rotary is not None:
            options["position_ids"] = torch.from_numpy(self.rotary)[:, None]
        if self.deepstack is not None:
            mask = torch.zeros(1, len(self.ids), dtype=torch.bool)
            mask[0, self.at] = True
            options |= {"visual_pos_masks": mask, "deepstack_visual_embeds": list(self.deepstack)}
        hidden = part.model(inputs_embeds=embedded, use_cache=False, **options).last_hidden_state
        return part.lm_head(hidden)[0].float().numpy()


Chunk = tuple[Prompt, int, int, list[int]]  # tokens from one index to another, and the blocks of the prompt


def step_batch(chunks: Sequence[Chunk], *, every: bool = False, step: int = 0) -> StepBatch:
    """Chunks of prompts as one step, slot i for chunk i; logits of the last token of each, or of every one."""
    counts = np.array([end - begin for _, begin, end, _ in chunks])
    starts = np.cumsum(counts) - counts
    row_of = np.repeat(np.arange(len(chunks)), counts)
    tables = np.zeros((1, len(chunks), max(len(blocks) for *_, blocks in chunks)), dtype=np.int32)
    for i, (*_, blocks) in enumerate(chunks):
        tables[0, i, : len(blocks)] = blocks
    positions = np.concatenate([np.arange(begin, end) for _, begin, end, _ in chunks])
    ids = np.concatenate([prompt.ids[begin:end] for prompt, begin, end, _ in chunks])
    rotary = None
    if chunks[0][0].rotary is not None:
        rotary = np.concatenate([prompt.rotary[:, begin:end] for prompt, begin, end, _ in chunks], axis=1)
    sampled_at = np.arange(len(ids)) if every else starts + counts - 1
    none = np.zeros(0, dtype=np.int64)
    slots, zeros = np.arange(len(chunks)), np.zeros(len(sampled_at), dtype=np.int64)
    sampling = row_of[sampled_at]
    return StepBatch(
        step, slots, starts, counts, positions[starts], tables, row_of, ids, positions, None, sampling, zeros,
        sampled_at, none, _mm_rows(chunks, starts), rotary,
    )  # fmt: skip


def _mm_rows(chunks: Sequence[Chunk], starts: Int64s) -> MMRows | None:
    at, embeddings, deepstack = [], [], []
    for (prompt, begin, end, _), start in zip(chunks, starts.tolist(), strict=True):
        inside = (prompt.at >= begin) & (prompt.at < end)
        at.append(prompt.at[inside] - begin + start)
        embeddings.append(prompt.embeddings[inside])
        if prompt.deepstack is not None:
            deepstack.append(prompt.deepstack[:, inside])
    tokens = np.concatenate(at)
    if not len(tokens):
        return None
    return MMRows(tokens, torch.cat(embeddings), torch.cat(deepstack, 1) if deepstack else None)
