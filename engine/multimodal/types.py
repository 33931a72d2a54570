"""The data of multimodal inputs that cross module and process boundaries."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import msgspec
from numpy.typing import NDArray

from engine.media.types import Audio as Audio
from engine.media.types import Video as Video

MediaKind = Literal["image", "audio", "video"]


class Media(msgspec.Struct, frozen=True, gc=False):
    """An input as its sender encoded it: the bytes of a PNG, WAV, MP4 …"""

    kind: MediaKind
    data: bytes


class MMSpec(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a front end must know of a model that takes multimodal inputs; part of `Ready`.

    Args:
        family: model type in `engine.multimodal.families.MM_FAMILIES`.
        placeholders: by kind, the id of the token that stands for one input in a prompt that a chat template wrote.
        most_tokens: by kind, the most placeholder tokens of one input (`Processor.most_tokens`).
        per_prompt: by kind, the most inputs of a prompt (`--limit-mm-per-prompt`); others have no limit.
        alone: the kind that a prompt doesn't have together with others; empty: there is none.
        extra_tokens: ids after the vocabulary that a prompt may have and that are never sampled.
        folder: of the core, in which front ends link feature files for it (see `engine.core.feature_mirror`).
    """

    family: str
    placeholders: dict[str, int]
    most_tokens: dict[str, int]
    per_prompt: dict[str, int] = {}
    extra_tokens: int = 0
    folder: str = ""
    alone: str = ""


class Processed(msgspec.Struct, frozen=True, gc=False):
    """An input after its processor.

    Args:
        tokens: the token ids that replace its placeholder in the prompt. Those that are in the family's `embedding_ids`
            stand for one embedding each, in order; others (line breaks, markers) are ordinary tokens.
        tensors: what the encoder needs, by name.
        grid: frames, rows and columns of the embeddings of a family with M-RoPE; zeros for all others.
        seconds_per_frame: of a video with M-RoPE, between two frames of the grid.
        before, after: text that the family writes around the placeholder (Gemma 3: line breaks). In a prompt of text it
            is inserted there and tokenized with the text next to it, with which it can share tokens; in a prompt of
            token ids it is tokenized alone. It is outside the placeholder range.
    """

    tokens: list[int]
    tensors: Mapping[str, NDArray[Any]]
    grid: tuple[int, int, int] = (0, 0, 0)
    seconds_per_frame: float = 0.0
    before: str = ""
    after: str = ""


class Processor(Protocol):
    """The processing of one model, made once in each process of the pool.

    `media` is a PIL image in RGB (with EXIF rotation applied), an `Audio` or a `Video`. `count` is the number of inputs
    of that kind in the prompt, since some families divide a single image more finely. `options` are those of
    `--mm-processor-kwargs` and of the request. Raises RequestError for an input that the model can't take.
    """

    def process(self, kind: MediaKind, media: Any, count: int, options: Mapping[str, Any]) -> Processed: ...

    def most_tokens(self, kind: MediaKind, options: Mapping[str, Any]) -> int:
        """The most tokens of one input of a kind: the length of `Processed.tokens` for the largest input.

        The EngineCore's process asks for it at the start, with the options of `--mm-processor-kwargs`, to size the
        encoder cache. It also needs no media: it follows from the processor's limits on sizes. Families with videos
        take `frames` as well, the most frames of a video.
        """
        ...
