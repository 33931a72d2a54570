"""The table of families names fields, processors and encoders that exist."""

import importlib.util

from engine.multimodal.families import MM_FAMILIES


def test_processors_and_encoders_exist() -> None:
    for model_type, family in MM_FAMILIES.items():
        for package, name in (("multimodal.processors", family.processor), ("model.encoders", family.encoder)):
            assert importlib.util.find_spec(f"engine.{package}.{name}") is not None, (model_type, name)
        assert family.placeholders, model_type
