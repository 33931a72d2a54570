"""Makes the processor of a model's multimodal inputs from the options of the engine; imports transformers."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.model.model_info import read_hf_config
from engine.multimodal.families import MM_FAMILIES
from engine.multimodal.types import Processor


def make(fields: Mapping[str, Any]) -> Processor:
    """The processor of a model.

    Args:
        fields: of the EngineConfig, with the model as a folder or its config.json.
    """
    config = EngineConfig(**fields)
    path = Path(config.model)
    hf_config = read_hf_config(path, config)
    family = MM_FAMILIES.get(hf_config.model_type)
    if family is None:
        raise ModelError(f"models of type {hf_config.model_type!r} take no multimodal inputs")
    module = importlib.import_module(f"engine.multimodal.processors.{family.processor}")
    processor: Processor = module.make(path if path.is_dir() else path.parent, hf_config)
    return processor
