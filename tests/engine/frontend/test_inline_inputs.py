"""V0: multimodal inputs that the core's loop processes, and puts into prompts."""

import asyncio
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.clock import FakeClock
from engine.core.engine import EngineCore
from engine.core.feature_mirror import FeatureMirror
from engine.errors import ProcessingError, RequestError
from engine.frontend.core_client import CoreClient
from engine.frontend.feature_cache import FeatureCache, PlacedInput, RawInput
from engine.frontend.front_end_stats import MMCounters
from engine.frontend.inline_front_end import InlineTexts
from engine.frontend.inline_inputs import InlineInputs
from engine.frontend.prompts import Text
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.streams import CollectedOutput, collect_outputs
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import StandInBackend
from engine.media.limits import MediaLimits
from engine.messages import MMInputRef, MMSpec, Ready
from engine.multimodal.feature_files import FeatureFolder, read_features, write_features
from engine.multimodal.hashing import InputHasher
from engine.multimodal.pool_protocol import Done
from engine.multimodal.types import Media
from tests.engine.core_driver import next_wait, resolved
from tests.engine.fake_executor import VOCABULARY, FakeExecutor, expected_tokens
from tests.engine.inline_transport import InlineTransport
from tests.engine.multimodal.fake_processor import EMBEDDING, PLACEHOLDER, FakeProcessor, png

TOKENIZER = Tokenizer(StandInBackend(VOCABULARY))
HASHER = InputHasher(Path("/nowhere"), "fake", {})
PARAMS = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)


class InlineCore:
    """A core whose loop handles inputs, with the client of its only front end; made inside an event loop."""

    def __init__(self, *ablations: str):
        self.folder = FeatureFolder()
        spec = MMSpec("fake", {"image": PLACEHOLDER}, {"image": 8}, folder=self.folder.path)
        config = resolved(ablations=frozenset(ablations), encoder_cache_tokens=12)
        inputs = InlineInputs(spec, TOKENIZER, HASHER, MediaLimits(), FakeProcessor)
        texts = InlineTexts(TOKENIZER, 64, VOCABULARY, inputs, detokenizes="inline-frontend" in ablations)
        self.clock, transport = FakeClock(), InlineTransport()
        self.worker = FakeExecutor(self.clock, config.block_size, lambda *_: 1.0)
        self.core = EngineCore(
            config, self.worker, self.clock, transport.from_core, 1, texts, FeatureMirror(self.folder.path)
        )
        transport.receive = self.core.receive
        ready = Ready(
            "fake", "fake", "float32", VOCABULARY, 64, config.max_num_seqs, config.max_num_batched_tokens,
            config.block_size, config.num_blocks - 1, True, ablations=tuple(ablations), mm=spec,
        )  # fmt: skip
        self.client = CoreClient(ready, TOKENIZER, transport, self.clock, numbers=itertools.count(1))
        self.client.open()

    async def serve(self, prompt: Any, inputs: list[Any]) -> list[CollectedOutput]:
        stream = self.client.add_request([prompt], PARAMS, inputs=[inputs])
        reading = asyncio.ensure_future(collect_outputs(stream))
        while not reading.done():
            self.core.step(self.clock.now())
            for slot in self.worker.slots.values():
                assert all(read_features(one.features)["pixels"].any() for one in slot.mm_inputs)
            wait = next_wait(self.core, self.worker, self.clock.now())
            self.clock.advance(wait or 0.0)
            self.worker.pump()
            await asyncio.sleep(0)
        self.core.step(self.clock.now())
        return reading.result()

    def close(self) -> None:
        assert os.listdir(self.folder.path) == ["owner.lock"], "a file is left"
        self.core.scheduler.features.check([])
        self.folder.remove()


def refs(prompt: list[int], *media: Media) -> list[MMInputRef]:
    """The inputs of a final prompt, whose placeholders are `EMBEDDING`s."""
    found, at = [], 0
    for one in media:
        at = prompt.index(EMBEDDING, at)
        found.append(MMInputRef(HASHER.hash_input("image", one.data, len(media), {}), at, 4))
        at += 4
    return found


def test_the_loop_processes_inputs_and_replaces_their_placeholders() -> None:
    async def main() -> None:
        core = InlineCore("inline-processing")
        pictures = png(50), png(90)
        given = [1, PLACEHOLDER, 2, PLACEHOLDER, 3]
        outputs = await core.serve(given, [RawInput(one, 2) for one in pictures])
        final = [1, *[EMBEDDING] * 4, 2, *[EMBEDDING] * 4, 3]
        assert outputs[0].token_ids == expected_tokens(final, 3, mm_inputs=refs(final, *pictures))
        assert len(core.worker.encoded) == 2
        core.close()

    asyncio.run(main())


def test_an_input_that_can_not_be_processed_ends_its_request_only() -> None:
    async def main() -> None:
        core = InlineCore("inline-processing")
        good = RawInput(png(50), 2)
        with pytest.raises(RequestError, match="the image can't be read"):
            await core.serve([PLACEHOLDER, PLACEHOLDER], [good, RawInput(Media("image", b"none"), 2)])
        with pytest.raises(RequestError, match="1 placeholder"):
            await core.serve([PLACEHOLDER], [good, good])
        with pytest.raises(RequestError, match="maximum context length is 64 tokens"):
            await core.serve([PLACEHOLDER] + [1] * 61, [RawInput(png(50))])
        assert len((await core.serve([PLACEHOLDER, 1], [RawInput(png(50))]))[0].token_ids) == 3
        core.close()

    asyncio.run(main())


def test_an_input_that_can_not_be_encoded_ends_its_request_only() -> None:
    async def main() -> None:
        core = InlineCore("inline-processing", "no-run-ahead", "full-state")
        core.worker.fails = lambda: len(core.worker.encoded) == 1
        with pytest.raises(ProcessingError, match="multimodal input 0 could not be encoded: the tower fails"):
            await core.serve([1, PLACEHOLDER, 2], [RawInput(png(50))])
        outputs = await core.serve([1, PLACEHOLDER, 2], [RawInput(png(50))])
        final = [1, *[EMBEDDING] * 4, 2]
        assert outputs[0].token_ids == expected_tokens(final, 3, mm_inputs=refs(final, png(50)))
        core.close()

    asyncio.run(main())


@pytest.mark.parametrize("ablations", [("inline-frontend",), ("inline-frontend", "inline-processing")])
def test_texts_that_the_loop_tokenizes_may_have_inputs(ablations: tuple[str, ...]) -> None:
    """Processed in the loop, or in the front end."""

    async def main() -> None:
        core = InlineCore(*ablations)
        given: RawInput | PlacedInput = RawInput(png(50))
        cache = FeatureCache(0, MMCounters())
        if len(ablations) == 1:
            core.client.features = cache
            cache.attach(0, core.folder.path, core.client._transport)
            path, content = cache.new_path(), HASHER.hash_input("image", png(50).data, 1, {})
            size = write_features(path, {"pixels": np.ones(3)})
            cached = cache.insert(content, path, Done([EMBEDDING] * 4, size=size))
            given = PlacedInput(-1, cache.use(cached, "image", bidirectional=False))
        written = TOKENIZER.written_token(PLACEHOLDER)
        assert written
        outputs = await core.serve(Text(f"a{written}b", add_special_tokens=False), [given])
        around = TOKENIZER.encode(f"a{written}b", add_special_tokens=False)
        at = around.index(PLACEHOLDER)
        final = [*around[:at], *[EMBEDDING] * 4, *around[at + 1 :]]
        assert outputs[0].token_ids == expected_tokens(final, 3, mm_inputs=refs(final, png(50)))
        core.core.step(core.clock.now())
        core.close()
        cache.close()

    asyncio.run(main())
