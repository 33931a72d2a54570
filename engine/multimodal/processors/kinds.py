"""The kinds of media that a processor takes."""

from engine.errors import RequestError
from engine.multimodal.types import MediaKind


def require_image(kind: MediaKind) -> None:
    """Raise RequestError for sounds and videos, in a family that takes images only."""
    if kind != "image":
        raise RequestError(
            f"the model takes images only, no {kind}", f"{kind}_url" if kind == "video" else "input_audio"
        )
