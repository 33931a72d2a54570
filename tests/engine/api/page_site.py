"""A server without a model on a real socket, and its pages in a real browser."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from playwright.async_api import Browser, Locator, Page, expect

from engine.api.http_options import HttpOptions
from engine.api.http_server import HttpServer
from engine.api.ports import bind
from engine.core.engine import EngineCore
from tests.engine.api.conftest import InLoop, in_loop
from tests.engine.api.tiny_processor import SPEC

TEXT = "All of the text that the model writes."
PATIENCE_MS = 60_000  # of a slow machine; nothing waits for it
expect.set_options(timeout=PATIENCE_MS)


class Steps:
    """Steps of a core, which stop where a test wants to see a server in the middle of its work."""

    def __init__(self, core: EngineCore):
        self._step = core.step
        self.held: Callable[[], bool] = lambda: False
        core.step = self  # type: ignore[method-assign, assignment]

    def __call__(self, now: float) -> None:
        if not self.held():
            self._step(now)


@dataclass
class Site:
    """A server without a model, and a browser."""

    url: str
    inner: InLoop
    steps: Steps
    side: HttpServer
    browser: Browser

    def hold_at(self, tokens: int) -> None:
        """Compute no step once so many tokens were generated in all."""
        self.steps.held = lambda: self.inner.client.total_stats.core.generation_tokens >= tokens

    def release(self) -> None:
        self.steps.held = lambda: False

    @contextlib.asynccontextmanager
    async def visit(self, path: str = "/", failed: int | None = 0, **context: Any) -> AsyncIterator[Page]:
        """A page in a profile of its own, which reports no errors and asks no other host for anything.

        `failed` is the number of requests that may fail, None for any.
        """
        opened = await self.browser.new_context(**context)
        opened.set_default_timeout(PATIENCE_MS)
        seen: list[str] = []
        errors: list[str] = []
        opened.on("request", lambda request: seen.append(request.url))
        page = await opened.new_page()
        page.on("console", lambda line: errors.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        await page.goto(self.url + path)
        try:
            yield page
        finally:
            await opened.close()
        failures = [error for error in errors if error.startswith("Failed to load resource: ")]
        assert failed is None or len(failures) == failed
        assert [error for error in errors if error not in failures] == []
        assert [url for url in seen if not url.startswith((f"{self.url}/", "data:"))] == []


@contextlib.asynccontextmanager
async def open_site(browser: Browser, options: HttpOptions | None = None, **settings: Any) -> AsyncIterator[Site]:
    async with in_loop(options, mm=SPEC, script=TEXT, max_model_len=512, **settings) as inner:
        listener = bind("127.0.0.1", 0)
        side = HttpServer(inner.state, listener)
        url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        serving = asyncio.ensure_future(side.serve(url.set_result))
        try:
            yield Site(await url, inner, Steps(inner.core), side, browser)
        finally:
            side.end(0)
            await serving


def last(page: Page, kind: str) -> Locator:
    return page.locator(f".message.{kind} .text").last


async def ask(page: Page, text: str) -> Any:
    """Send a text with the keyboard; returns the body of the request."""
    await page.locator("#text").fill(text)
    async with page.expect_request(re.compile(r"/v1/")) as sent:
        await page.keyboard.press("Enter")
    return (await sent.value).post_data_json
