"""A whole server in the test's own loop: real application, client and core, a worker without a model."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from msgspec.structs import replace

from engine import children
from engine.api.app import create_app
from engine.api.http_options import HttpOptions
from engine.api.state import ApiState
from engine.clock import FakeClock
from engine.core.engine import EngineCore
from engine.core.feature_mirror import FeatureMirror
from engine.core.grammars import GrammarManager
from engine.frontend.chat_template import ChatTemplate
from engine.frontend.core_client import CoreClient
from engine.frontend.front_end_stats import MMCounters
from engine.frontend.grammar_vocabulary import GrammarVocabulary
from engine.frontend.inline_front_end import InlineTexts
from engine.frontend.inline_inputs import InlineInputs
from engine.frontend.mm_pipeline import MMOptions, MMPipeline
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import StandInBackend
from engine.media.fetch import Resolver
from engine.messages import Ready
from engine.multimodal.feature_files import FeatureFolder
from engine.multimodal.hashing import InputHasher
from engine.multimodal.types import MMSpec
from engine.resolved_config import ResolvedConfig
from tests.engine.api import tiny_processor
from tests.engine.core_driver import next_wait, resolved
from tests.engine.fake_executor import FakeExecutor
from tests.engine.inline_transport import InlineTransport

SPAWN = children.spawn  # as at the start; other tests replace it by a server that has imported torch
VOCABULARY = 300
STEP_S = 0.125
JSON = {"content-type": "application/json"}
TEMPLATE = "{% for message in messages %}{{ message.role[0] }}:{{ message.content }};{% endfor %}"


@dataclass
class InLoop:
    """One server without sockets."""

    app: FastAPI
    client: CoreClient
    core: EngineCore
    http: httpx.AsyncClient
    state: ApiState

    @property
    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url="http://test/v1", api_key="key", http_client=self.http, max_retries=0)

    async def post(self, path: str, **body: Any) -> Any:
        answer = await self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def refusal(self, path: str, body: Any, status: int = 400) -> dict[str, Any]:
        answer = await (
            self.http.post(path, content=body, headers=JSON)
            if isinstance(body, bytes)
            else self.http.post(path, json=body)
        )
        assert answer.status_code == status, answer.text
        error: dict[str, Any] = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]
        return error


class MMParts:
    """What a server needs for multimodal inputs: the core's part, and that of the client."""

    def __init__(self, mm: MMSpec, tokenizer: Tokenizer, options: HttpOptions | None, ablations: frozenset[str]):
        self.folder = FeatureFolder()
        self.mm = mm = replace(mm, folder=self.folder.path)
        self.features = FeatureMirror(self.folder.path)
        by_core, detokenizes = "inline-processing" in ablations, "inline-frontend" in ablations
        limits = (options or HttpOptions()).media.limits
        prepared = MMOptions(self.folder.path, {}, 1, 64 << 20, limits=limits, factory=tiny_processor.FACTORY)
        self.inputs = None if by_core else MMPipeline.make(mm, prepared, MMCounters())
        self.processing: InlineInputs | None = None
        if by_core or detokenizes:
            hasher = InputHasher(Path(self.folder.path), mm.family, {})
            self.processing = InlineInputs(mm, tokenizer, hasher, limits, tiny_processor.TinyProcessor)


def make_ready(config: ResolvedConfig, mm: MMSpec | None, ablations: frozenset[str]) -> Ready:
    """The core's report of a fake model."""
    return Ready(
        "/models/fake",
        "fake",
        "float32",
        VOCABULARY,
        config.max_model_len,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.block_size,
        config.num_blocks - 1,
        True,
        scheduling_policy=config.scheduling_policy,
        ablations=tuple(ablations),
        mm=mm,
    )


async def pump(core: EngineCore, worker: FakeExecutor, clock: FakeClock, *, has_pool: bool) -> None:
    """Run the core in virtual time."""
    while True:
        core.step(clock.now())
        wait = next_wait(core, worker, clock.now())
        if wait is not None:
            clock.advance(wait)
            worker.pump()
        elif has_pool:
            await asyncio.sleep(0.002)
        for _ in range(10):  # readers keep up: nothing is merged
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def in_loop(
    options: HttpOptions | None = None,
    template: str | None = TEMPLATE,
    ablations: frozenset[str] = frozenset(),
    mm: MMSpec | None = None,
    resolve: Resolver | None = None,
    script: str | None = None,
    obeys_masks: bool = False,
    **settings: Any,
) -> AsyncIterator[InLoop]:
    """A server whose worker computes nothing.

    With `mm` it takes images, audio and video; a pool of one process runs tests/engine/api/tiny_processor.py. With a
    `script`, all outputs are this text, of which each character is a token, and then tokens 0. If it `obeys_masks`,
    tokens that a mask excludes are replaced.
    """
    settings = {"max_model_len": 128, "num_blocks": 257, "max_num_batched_tokens": 32, **settings}
    config = resolved(ablations=ablations, **settings)
    clock, transport = FakeClock(), InlineTransport()
    worker = FakeExecutor(clock, config.block_size, lambda *_: STEP_S, config.draft_tokens)
    worker.script = None if script is None else script.encode("ascii")
    worker.obeys_masks = obeys_masks
    tokenizer = Tokenizer(StandInBackend(VOCABULARY), template=ChatTemplate(template, {}) if template else None)
    parts = None if mm is None else MMParts(mm, tokenizer, options, ablations)
    processing, detokenizes = None if parts is None else parts.processing, "inline-frontend" in ablations
    texts = None
    if detokenizes or processing is not None:
        texts = InlineTexts(tokenizer, config.max_model_len, VOCABULARY, processing, detokenizes=detokenizes)
    grammars = GrammarManager(lambda: GrammarVocabulary(tokenizer, VOCABULARY))
    features = None if parts is None else parts.features
    core = EngineCore(config, worker, clock, transport.from_core, inline=texts, features=features, grammars=grammars)
    transport.receive = core.receive
    ready = make_ready(config, None if parts is None else parts.mm, ablations)
    client = CoreClient(ready, tokenizer, transport, clock, inputs=None if parts is None else parts.inputs)
    client.open()
    state = ApiState(client, ("fake",), options or HttpOptions(runtime_lora=True), created=1, resolve=resolve)
    app = create_app(state)
    pumping = asyncio.ensure_future(pump(core, worker, clock, has_pool=mm is not None))
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    try:
        yield InLoop(app, client, core, http, state)
    finally:
        await http.aclose()
        pumping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await pumping
        if parts is not None:
            if parts.inputs is not None:
                client.close()
            parts.folder.remove()


@pytest.fixture
async def server() -> AsyncIterator[InLoop]:
    async with in_loop() as running:
        yield running


@pytest.fixture
def light_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of the pool start by themselves: they import neither torch nor transformers here."""
    monkeypatch.setattr(children, "spawn", SPAWN)
