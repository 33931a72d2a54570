"""Multimodal inputs within the core's loop, as in V0: processed there with `--ablate inline-processing`, and put into
prompts that the loop tokenizes with `--ablate inline-frontend`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from engine.columns import column, int32s
from engine.frontend.tokenizer import Tokenizer
from engine.media.limits import MediaLimits
from engine.messages import AddRequest, MMInputRef, MMSpec, UnplacedInput
from engine.multimodal.expansion import expand, with_surroundings
from engine.multimodal.families import MM_FAMILIES
from engine.multimodal.feature_files import unlink_features, write_features
from engine.multimodal.hashing import InputHasher
from engine.multimodal.pool_protocol import Job
from engine.multimodal.processing import process_media
from engine.multimodal.types import Processor

replace = msgspec.structs.replace


@dataclass(frozen=True, slots=True)
class _Placed:
    """An input of a message while its placeholder is replaced."""

    kind: str
    tokens: list[int]
    before: str
    after: str
    ref: MMInputRef


class InlineInputs:
    """The multimodal inputs of the requests of one core; for its loop."""

    def __init__(
        self,
        spec: MMSpec,
        tokenizer: Tokenizer,
        hasher: InputHasher,
        limits: MediaLimits,
        make_processor: Callable[[], Processor],
    ):
        """`make_processor` is called for the first input; files are written into `spec.folder`."""
        self._spec = spec
        self._tokenizer = tokenizer
        self._hasher = hasher
        self._limits = limits
        self._make_processor = make_processor
        self._processor: Processor | None = None
        self._files = 0
        written = {kind: tokenizer.written_token(token) for kind, token in spec.placeholders.items()}
        self._texts = {kind: text for kind, text in written.items() if text}
        family = MM_FAMILIES.get(spec.family)
        self._bidirectional = family.bidirectional if family else ()
        self._joint = family is not None and bool(family.joint)

    def load(self) -> None:
        """Make the processor now, rather than for the first input."""
        self._processor = self._make_processor()

    def process(self, message: AddRequest) -> AddRequest:
        """The message with its inputs processed, those that are not; raises RequestError if one can't be."""
        if message.mm_inputs or not message.unplaced:
            return message
        made: list[tuple[UnplacedInput, MMInputRef]] = []
        try:
            for one in message.unplaced:
                made.append(self._process_one(one))
        except BaseException:
            for _, ref in made:
                unlink_features(ref.features)
            raise
        return replace(message, unplaced=tuple(one for one, _ in made), mm_inputs=tuple(ref for _, ref in made))

    def _process_one(self, given: UnplacedInput) -> tuple[UnplacedInput, MMInputRef]:
        if self._processor is None:
            self.load()
        assert self._processor is not None
        self._files += 1
        path = os.path.join(self._spec.folder, f"inline-{self._files}")
        content = self._hasher.hash_input(given.kind, given.data, given.count, given.options)
        job = Job(given.kind, given.count, self._hasher.options_of(given.options), path)
        processed = process_media(self._processor, job, given.data, self._limits)
        write_features(path, processed.tensors)
        ref = MMInputRef(
            content, -1, len(processed.tokens), given.kind in self._bidirectional, path, processed.grid,
            processed.seconds_per_frame, self._joint,
        )  # fmt: skip
        tokens = column(processed.tokens)
        return UnplacedInput(given.kind, tokens, processed.before, processed.after), ref

    def place(
        self, message: AddRequest, encode: Callable[[str], list[int]]
    ) -> tuple[list[int], tuple[MMInputRef, ...]]:
        """The prompt of a message with the tokens of its inputs, and the inputs in their places.

        Args:
            message: after `process`.
            encode: tokenizes the whole text of a prompt.

        Raises:
            RequestError: the number of placeholders differs from that of inputs.
        """
        inputs = [
            _Placed(one.kind, int32s(one.tokens).tolist(), one.before, one.after, ref)
            for one, ref in zip(message.unplaced, message.mm_inputs, strict=True)
        ]
        around: Callable[[str], Sequence[int]] | None = self._encode_part
        if message.prompt:
            prompt = int32s(message.prompt).tolist()
        else:
            text = message.text
            if len(self._texts) == len(self._spec.placeholders):
                text, around = with_surroundings(text, inputs, self._texts), None
            prompt = encode(text)
        expanded, placed = expand(prompt, inputs, self._spec.placeholders, texts=self._texts, encode=around)
        return expanded, tuple(replace(one.ref, offset=offset) for offset, one in placed)

    def _encode_part(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)
