"""The multimodal families of the parity suite, by model type or `type/variant`. Each family has a module of its own.

To add one: write `mm_models_NAME.py` with `MODELS: dict[str, MMModel]` like `mm_models_llava.py`, add it below, and run
`FAMILIES=NAME make parity`.
"""

from tests.engine.worker import (
    mm_models_audio,
    mm_models_llava,
    mm_models_llava_next,
    mm_models_molmo,
    mm_models_pixtral,
    mm_models_vision,
)
from tests.engine.worker.mm_model import MMModel

MM_MODELS: dict[str, MMModel] = {
    **mm_models_audio.MODELS,
    **mm_models_llava.MODELS,
    **mm_models_llava_next.MODELS,
    **mm_models_molmo.MODELS,
    **mm_models_pixtral.MODELS,
    **mm_models_vision.MODELS,
}
