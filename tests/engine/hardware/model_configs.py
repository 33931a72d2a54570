"""The configs of models that ship with the product, and that of LLaVA 1.5."""

import json
from typing import Any

from engine.data import datasets_folder

CONFIGS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in (datasets_folder() / "models").glob("*.json")
}
LLAVA: dict[str, Any] = {
    "model_type": "llava",
    "text_config": {"model_type": "llama", "hidden_size": 4096},
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096},
}
