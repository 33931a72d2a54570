"""`make accuracy-cpu`: what rounding costs: perplexity and top-1 agreement of each form of the fused stack.

The text is ARCHITECTURE.md, in pieces of WINDOW tokens; the reference is transformers in float32. Prints a table and
writes results/accuracy-cpu.json, rows: form, perplexity, top1 (share of positions whose likeliest token is float32's).
MODEL=smollm2-135m picks the model.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tests.perf.cpu_stack import BLOCK, FORMS, batch_of, folder_of, load, make

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "accuracy-cpu.json"
WINDOW = 512  # tokens
MOST_WINDOWS = 8

Logits = Callable[[NDArray[np.int64]], NDArray[np.float32]]


def transformers_logits(folder: Path, dtype: str) -> Logits:
    model = load(folder, dtype)

    def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.inference_mode():
            found: NDArray[np.float32] = model(torch.from_numpy(ids)[None]).logits[0].float().numpy()
        return found

    return logits


def stack_logits(folder: Path, name: str) -> Logits:
    blocks = np.arange(1, WINDOW // BLOCK + 1)
    stack, vocabulary = make(folder, FORMS[name], len(blocks) + 1)

    def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        stack.begin(batch_of([(ids, 0, blocks)], every=True))
        stack.run(0, stack.last_part)
        out = np.empty((len(ids), vocabulary), dtype=np.float32)
        stack.logits(np.arange(len(out), dtype=np.int32), out)
        return out

    return logits


def judge(logits: Logits, windows: list[NDArray[np.int64]]) -> tuple[float, NDArray[np.int64]]:
    """Perplexity, and the likeliest token at each position."""
    losses, likeliest = [], []
    for ids in windows:
        found = logits(ids)
        likeliest.append(found.argmax(1))
        scores = torch.log_softmax(torch.from_numpy(found[:-1]), 1).numpy()
        losses.append(-scores[np.arange(len(ids) - 1), ids[1:]])
    return math.exp(float(np.concatenate(losses).mean())), np.concatenate(likeliest)


def main() -> None:
    folder = folder_of(os.environ.get("MODEL", "smollm2-135m"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = np.array(tokenizer.encode((ROOT / "ARCHITECTURE.md").read_text()).ids)
    count = min(len(ids) // WINDOW, MOST_WINDOWS)
    windows = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]
    print(f"{count} windows of {WINDOW} tokens of ARCHITECTURE.md")
    print(f"{'form':<22} perplexity   top-1 as float32")
    expected: NDArray[np.int64] | None = None
    rows = []
    makers: dict[str, Callable[[], Logits]] = {
        "transformers float32": lambda: transformers_logits(folder, "float32"),
        "transformers bfloat16": lambda: transformers_logits(folder, "bfloat16"),
    }
    makers |= {name: lambda name=name: stack_logits(folder, name) for name in FORMS}  # type: ignore[misc]
    for name, maker in makers.items():
        perplexity, likeliest = judge(maker(), windows)
        expected = likeliest if expected is None else expected
        top1 = float((likeliest == expected).mean())
        rows.append({"form": name, "perplexity": round(perplexity, 3), "top1": round(top1, 4)})
        print(f"{name:<22} {perplexity:10.2f}   {top1:.1%}", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
