"""The multimodal inputs of prompts in a front end: from the parts of a request to ranges of the prompt.

    MediaPart ──fetch──► Media ──MMPipeline──► PreparedInput ──place──► ids with the inputs' tokens, PlacedInputs

With `--ablate inline-processing` the core does the last two steps, with `--ablate inline-frontend` the last one.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from engine.errors import RequestError
from engine.frontend.connect import EngineClient
from engine.frontend.content_parts import MediaPart, check_alone, check_numbers, refuse_placeholders
from engine.frontend.conversation import shape_conversation
from engine.frontend.feature_cache import PlacedInput, PreparedInput, PromptInputs, RawInput
from engine.frontend.prompts import Prompt, Text
from engine.media.fetch import Fetcher, Resolver
from engine.media.limits import MediaOptions
from engine.media.objects import encode_object
from engine.messages import MMSpec
from engine.multimodal.expansion import NAMES, check_counts, expand, with_surroundings
from engine.multimodal.types import Media, MediaKind

KINDS: tuple[MediaKind, ...] = ("image", "audio", "video")
AT_ONCE = 8  # inputs of one prompt that are fetched and processed at the same time

Result = TypeVar("Result")
PreparedInputs = Sequence[PreparedInput] | Sequence[RawInput]


class PromptWithInputs(NamedTuple):
    """A prompt for the core with its inputs, for `add_request`."""

    prompt: Prompt
    inputs: PromptInputs

    @property
    def is_complete(self) -> bool:
        """Whether the prompt has its final token ids; else the core tokenizes it or replaces the placeholders."""
        placed = all(isinstance(one, PlacedInput) and one.offset >= 0 for one in self.inputs)
        return placed and isinstance(self.prompt, list)


class Conversation(NamedTuple):
    """A conversation in the form that templates expect, and its inputs in order."""

    messages: list[dict[str, Any]]
    media: list[MediaPart]


class MediaInputs:
    """Fetches and prepares the multimodal inputs of one front end; lives in one event loop."""

    def __init__(self, client: EngineClient, options: MediaOptions, resolve: Resolver | None = None):
        """Inputs for the model of `client`. `resolve` replaces the system's lookup of host names."""
        assert client.ready.mm is not None, "the model takes no multimodal inputs"
        self.spec: MMSpec = client.ready.mm
        written = {kind: client.tokenizer.written_token(token) for kind, token in self.spec.placeholders.items()}
        self.texts = {kind: text for kind, text in written.items() if text}
        self._client = client
        self.fetcher = Fetcher(options, resolve)  # now, since it reads the certificates of the system

    # ----------------------------------------------------------------------------------------------------- preparing

    async def prepare(self, parts: Sequence[MediaPart]) -> PreparedInputs:
        """Fetch and process inputs, in their order. If one fails or this is canceled, the others end too.

        Raises RequestError, with the field, for an input that can't be had or that the model can't take.
        """
        check_numbers(parts, self.spec.per_prompt)
        check_alone(parts, self.spec.alone)
        counts = Counter(part.kind for part in parts)
        places = asyncio.Semaphore(AT_ONCE)

        async def one(part: MediaPart) -> Any:
            async with places:
                return await self._prepare(part, counts[part.kind])

        return await gather_inputs([one(part) for part in parts])

    async def _prepare(self, part: MediaPart, count: int) -> PreparedInput | RawInput:
        try:
            media = Media(part.kind, await self._data(part))
            if self._client.inputs is None:  # the core processes it
                return RawInput(media, count)
            return await self._client.inputs.prepare(media, count)
        except RequestError as error:
            raise RequestError(f"{part.field}: {error}", part.field) from error

    async def _data(self, part: MediaPart) -> bytes:
        if not isinstance(part.data, str):
            return await asyncio.to_thread(encode_object, part.kind, part.data)
        if part.is_base64:
            return await self.fetcher.decode_base64(part.data)
        return await self.fetcher.fetch(part.data)

    # ------------------------------------------------------------------------------------------------------- placing

    def check(self, prompt: str | list[int], parts: Sequence[MediaPart] = ()) -> None:
        """Raise RequestError unless a prompt has one placeholder for each input; before any is fetched."""
        for part in parts:
            if part.kind not in self.spec.placeholders:
                raise RequestError(f"{part.field}: this model takes no {NAMES[part.kind][1]}", part.field)
        if isinstance(prompt, list):
            counts = {kind: prompt.count(token) for kind, token in self.spec.placeholders.items()}
        elif len(self.texts) == len(self.spec.placeholders):
            counts = {kind: prompt.count(written) for kind, written in self.texts.items()}
        else:  # not all placeholders can be found in a text
            return
        check_counts(counts, parts, self.texts)

    def place(
        self, prompt: str | list[int], prepared: PreparedInputs, *, add_special_tokens: bool = False
    ) -> PromptWithInputs:
        """A prompt with its inputs in place of the placeholders.

        Args:
            prompt: a text, or token ids, with one placeholder for each input.
            prepared: the inputs.
            add_special_tokens: of a text.

        Raises:
            RequestError: the number of placeholders differs from that of inputs.
        """
        client = self._client
        processed = [one for one in prepared if isinstance(one, PreparedInput)]
        raw = [one for one in prepared if isinstance(one, RawInput)]
        if client.ready.inline and isinstance(prompt, str):
            return PromptWithInputs(
                Text(prompt, add_special_tokens), raw or [PlacedInput(-1, one) for one in processed]
            )
        encode: Callable[[str], list[int]] | None = self._encode_part
        if isinstance(prompt, str):
            if any(one.before or one.after for one in processed) and len(self.texts) == len(self.spec.placeholders):
                prompt = with_surroundings(prompt, processed, self.texts)
                encode = None
            prompt = client.tokenizer.encode(prompt, add_special_tokens)
        if raw:
            return PromptWithInputs(prompt, raw)
        expanded, placed = expand(prompt, processed, self.spec.placeholders, texts=self.texts, encode=encode)
        return PromptWithInputs(expanded, [PlacedInput(offset, one) for offset, one in placed])

    def _encode_part(self, text: str) -> list[int]:
        return self._client.tokenizer.encode(text, add_special_tokens=False)


def read_conversation(messages: list[dict[str, Any]], inputs: MediaInputs | None) -> Conversation:
    """The messages of a request with their inputs; `inputs` of the model, None if it takes texts only.

    Raises RequestError, with the field, for a message that is not valid, an input that the model doesn't take, too many
    inputs, or a text that would stand for an input.
    """
    if inputs is None:
        return Conversation(shape_conversation(messages), [])
    media: list[MediaPart] = []
    shaped = shape_conversation(messages, tuple(inputs.spec.placeholders), media)
    check_numbers(media, inputs.spec.per_prompt)
    check_alone(media, inputs.spec.alone)
    refuse_placeholders(shaped, inputs.texts)
    return Conversation(shaped, media)


def release_placed(inputs: PromptInputs) -> None:
    """As `release`, of inputs in a prompt."""
    release([one.input for one in inputs if isinstance(one, PlacedInput)])


def release(prepared: PreparedInputs) -> None:
    """Inputs of a prompt that is not sent: their features may be evicted."""
    for one in prepared:
        if isinstance(one, PreparedInput):
            one.release()


async def gather_inputs(work: Sequence[Awaitable[Any]]) -> PreparedInputs:
    """Run all, and return their results in order. If one fails or this is canceled, nothing is left of the others."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        release([one for one in ended if isinstance(one, PreparedInput)])
        raise


def truncate_with_inputs(
    found: PromptWithInputs, keep: int | None, side: str | None, leading: Sequence[int]
) -> PromptWithInputs:
    """Keep `keep` tokens of a prompt, as `engine.frontend.truncation.truncate` does.

    Raises RequestError if that would cut an input, or if the core replaces the placeholders, so that the length of the
    prompt is not known here.
    """
    prompt, inputs = found
    if keep is None:
        return found
    field = "truncate_prompt_tokens"
    placed = [one for one in inputs if isinstance(one, PlacedInput)]
    if not found.is_complete or not isinstance(prompt, list):
        raise RequestError(
            f"{field} can't be used with images, sounds or videos on this server, whose core tokenizes or processes "
            "them (--ablate)",
            field,
        )
    if len(prompt) <= keep:
        return found
    ends = max((one.offset + len(one.input.tokens) for one in placed), default=0)
    begins = min((one.offset for one in placed), default=len(prompt))
    kept = len(leading) if len(leading) < keep and tuple(prompt[: len(leading)]) == tuple(leading) else 0
    cut = len(prompt) - keep  # tokens, after the `kept` first ones
    if ends > keep if side == "right" else begins < kept + cut:
        raise RequestError(
            f"{field} {keep} would cut an image, sound or video out of the prompt, which has {len(prompt):,} tokens",
            field,
        )
    if side == "right":
        return PromptWithInputs(prompt[:keep], inputs)
    moved = [PlacedInput(one.offset - cut, one.input) for one in placed]
    return PromptWithInputs([*prompt[:kept], *prompt[kept + cut :]], moved)


def parts_of_data(given: Mapping[str, Any]) -> list[MediaPart]:
    """The inputs of a prompt's `multi_modal_data`, {"image": one or a list, "audio": …, "video": …}."""
    unknown = given.keys() - {*KINDS}
    if unknown:
        raise RequestError(f"multi_modal_data has {min(unknown)!r}: write image, audio or video", "multi_modal_data")
    return [
        MediaPart(kind, f"multi_modal_data[{kind!r}][{at}]", one)
        for kind in KINDS
        for at, one in enumerate(_listed(given.get(kind)))
    ]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
