"""Images of models in Mistral's own format, processed by mistral-common.

Its pixels differ from those of transformers' image processor, since it resizes by another library.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import ModelError
from engine.multimodal.processors.options import refuse_options
from engine.multimodal.types import MediaKind, Processed, Processor
from engine.text import first_line
from engine.tokenizer_files import find_mistral_tokenizer

PACKAGE = "mistral-common[opencv]"


def make(folder: Path, hf_config: Any) -> Processor:
    """The processor of a model whose config was read from params.json.

    Raises ModelError if mistral-common isn't installed, or if the tokenizer's settings don't suit the model.
    """
    try:
        from mistral_common.imports import is_opencv_installed
        from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    except ImportError as error:
        raise ModelError(f"{folder}: images need mistral-common: pip install '{PACKAGE}' ({error})") from error
    if not is_opencv_installed():
        raise ModelError(f"{folder}: images need OpenCV: pip install '{PACKAGE}'")
    vision = hf_config.vision_config
    merge = getattr(hf_config, "spatial_merge_size", 1)
    ids = SpecialImageIDs(hf_config.image_token_index, hf_config.image_break_token_id, hf_config.image_end_token_id)
    own = ImageEncoder(ImageConfig(vision.patch_size, vision.image_size, merge), ids)
    file = find_mistral_tokenizer(folder)
    if file is None:  # the tokenizer is elsewhere, or there is none (dummy weights)
        return MistralImages(own)
    try:
        found: Any = MistralTokenizer.from_file(str(file)).instruct_tokenizer.image_encoder
    except Exception as error:  # a broken file can cause any error
        raise ModelError(f"{file} can't be read: {first_line(error)}") from error
    if found is None:
        raise ModelError(f"{file} has no settings for images, which the model takes (vision_encoder in params.json)")
    sizes = [(one.image_config.image_patch_size, one.image_config.spatial_merge_size) for one in (found, own)]
    if sizes[0] != sizes[1] or found.special_ids != ids:
        raise ModelError(
            f"{file} doesn't suit the model: patches of {sizes[0][0]} pixels merged by {sizes[0][1]} with the ids "
            f"{found.special_ids}; the model has patches of {sizes[1][0]} merged by {sizes[1][1]} with {ids}"
        )
    return MistralImages(found)


class MistralImages:
    """One token for each patch (or square of merged patches), one after each row but the last, and one at the end.

    `encoder`: an ImageEncoder of mistral-common.
    """

    def __init__(self, encoder: Any):
        self._encoder: Any = encoder

    def process(
        self,
        kind: MediaKind,  # noqa: ARG002  (images only)
        media: Any,
        count: int,  # noqa: ARG002
        options: Mapping[str, Any],
    ) -> Processed:
        """See `Processor`."""
        from mistral_common.protocol.instruct.chunk import ImageChunk

        refuse_options(options)
        found = self._encoder(ImageChunk(image=media))
        return Processed(list(found.tokens), {"pixel_values": np.ascontiguousarray(found.image[None])})

    def most_tokens(self, kind: MediaKind, options: Mapping[str, Any]) -> int:  # noqa: ARG002  (images only)
        """See `Processor`."""
        refuse_options(options)
        config = self._encoder.image_config
        rows = -(-config.max_image_size // (config.image_patch_size * config.spatial_merge_size))
        return int(rows * (rows + 1))
