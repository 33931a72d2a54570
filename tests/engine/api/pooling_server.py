"""A server of a model that pools in the test's own loop: real application, client, core and worker."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from engine.api.app import create_app
from engine.api.http_options import HttpOptions
from engine.api.state import ApiState
from engine.frontend.core_client import CoreClient
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import Backend, StandInBackend
from engine.messages import Ready
from tests.engine.api.conftest import InLoop
from tests.engine.inline_transport import InlineTransport
from tests.engine.pooling_models import VOCABULARY, pooling_engine


@contextlib.asynccontextmanager
async def pooling_server(
    folder: Path, http: HttpOptions | None = None, backend: Backend | None = None, **options: Any
) -> AsyncIterator[InLoop]:
    """Serve the model of a folder; without a `backend`, a text's tokens are its bytes. `options` of EngineConfig."""
    transport = InlineTransport()
    with pooling_engine(folder, send=transport.from_core, **options) as engine:
        transport.receive = engine.core.receive
        resolved, tokenizer = engine.resolved, Tokenizer(backend or StandInBackend(VOCABULARY))
        ready = Ready(
            "/models/tiny",
            "cpu",
            "float32",
            VOCABULARY,
            resolved.max_model_len,
            resolved.max_num_seqs,
            resolved.max_num_batched_tokens,
            resolved.block_size,
            resolved.num_blocks - 1,
            resolved.enable_prefix_caching,
            kv_windows=resolved.kv_windows,
            pooling=engine.model_info.pooling,
        )
        client = CoreClient(ready, tokenizer, transport, engine.clock)
        client.open()
        state = ApiState(client, ("tiny",), http or HttpOptions(), created=1)
        app = create_app(state)

        async def pump() -> None:
            while True:
                moved = engine.core.step(engine.clock.now())
                await asyncio.sleep(0 if moved else 0.0005)

        pumping = asyncio.ensure_future(pump())
        connection = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        try:
            yield InLoop(app, client, engine.core, connection, state)
        finally:
            await connection.aclose()
            pumping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pumping
