"""What the checks get besides the servers: pictures, and questions with log-likelihoods that transformers computes."""

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLORS = {"red": (220, 30, 30), "blue": (30, 60, 220)}
# Context, and continuations of which the first one is right.
QUESTIONS = (
    ("The capital of France is", (" Paris", " Berlin", " a banana")),
    ("Water boils at 100 degrees", (" Celsius", " Paris")),
    ("The opposite of hot is", (" cold", " seventeen", " the green")),
    ("Two plus two equals", (" four", " elephant")),
)


def pictures() -> list[dict[str, str]]:
    """A circle of each color: base64 of a PNG, and the name of the color."""
    found = []
    for name, color in COLORS.items():
        image = Image.new("RGB", (64, 64), (235, 235, 225))
        ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=color)
        file = io.BytesIO()
        image.save(file, "PNG")
        found.append({"data": base64.b64encode(file.getvalue()).decode(), "color": name})
    return found


def questions(folder: Path) -> list[dict[str, Any]]:
    """QUESTIONS with the log-likelihood of each continuation, by transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def likelihood(context: str, continuation: str) -> float:
        before = tokenizer.encode(context, add_special_tokens=False)
        ids = torch.tensor([tokenizer.encode(context + continuation, add_special_tokens=False)])
        with torch.inference_mode():
            logprobs = model(ids).logits[0].log_softmax(-1)
        chosen = ids[0, len(before) :]
        return float(logprobs[len(before) - 1 : -1].gather(1, chosen[:, None]).sum())

    return [
        {
            "context": context,
            "choices": list(choices),
            "likelihoods": [likelihood(context, choice) for choice in choices],
        }
        for context, choices in QUESTIONS
    ]
