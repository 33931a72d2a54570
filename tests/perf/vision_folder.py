"""A model of Qwen2-VL's kind with random weights, as a folder that Redline and other servers can both serve.

The dimensions are those of `qwen2-vl-small`. Other servers need a tokenizer and the files of an image processor, which
that short name has not: the folder has the tokenizer of SmolLM2 with Qwen2-VL's special tokens behind its own.
"""

import json
from pathlib import Path
from typing import Any

from engine.data import known_models
from engine.model.resolve import resolve_model

SPECIAL = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
PATCH = 28  # pixels of a side that become one token
MOST_TOKENS = 144  # of an image: as many as 336 x 336 pixels have
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_folder(folder: Path, dtype: str) -> Path:
    """Write the configuration, the tokenizer and the processor's files; there are no weights.

    Args:
        dtype: of the weights, as the config states it.
    """
    from tokenizers import AddedToken, Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(resolve_model("smollm2-135m") / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = [tokenizer.token_to_id(token) for token in SPECIAL]
    _write(folder / "config.json", _config(ids, dtype))
    limits = {"min_pixels": 4 * PATCH**2, "max_pixels": MOST_TOKENS * PATCH**2}
    sizes = {"size": {"shortest_edge": limits["min_pixels"], "longest_edge": limits["max_pixels"]}}
    _write(folder / "preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor", **limits, **sizes})
    _write(folder / "processor_config.json", {"processor_class": "Qwen2VLProcessor"})
    special = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    _write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, **special},
    )
    _write(folder / "chat_template.json", {"chat_template": TEMPLATE})
    return folder


def _config(ids: list[int], dtype: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(known_models()["qwen2-vl-small"].read_text())
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config |= dict(zip(names, ids, strict=True)) | {"dtype": dtype}
    # A multiple of 64 that holds all tokens. Token 2 is the end of a message.
    config["text_config"] |= {"vocab_size": -(-(ids[-1] + 1) // 64) * 64, "bos_token_id": 1, "eos_token_id": 2}
    return config


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")
