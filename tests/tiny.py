"""A model small enough to serve with random weights in no time."""

import json
from pathlib import Path

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 4096,
    "vocab_size": 320,
    "eos_token_id": 2,
}


def write_tiny(folder: Path) -> str:
    """Make a folder that `--load-format dummy` can serve; returns its path."""
    (folder / "config.json").write_text(json.dumps(TINY))
    return str(folder)
