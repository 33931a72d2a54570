"""Requests that come together begin one per turn of the event loop."""

import asyncio
from typing import Any

from starlette.types import Receive, Scope, Send

from engine.api.pacing import PacedRequests


class Begun:
    """An application that notes which requests have begun."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.paced = PacedRequests(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.names.append(scope["path"])

    def start(self, path: str, method: str = "POST") -> "asyncio.Task[None]":
        async def nothing(*_: Any) -> Any:
            raise AssertionError("the application neither receives nor sends")

        return asyncio.ensure_future(self.paced({"type": "http", "method": method, "path": path}, nothing, nothing))


def test_one_request_begins_in_each_turn_in_order() -> None:
    async def run() -> None:
        app = Begun()
        tasks = [app.start(str(number)) for number in range(20)]
        seen = 0
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            assert len(app.names) <= seen + 1
            seen = len(app.names)
        assert app.names == [str(number) for number in range(20)]

    asyncio.run(run())


def test_other_requests_do_not_wait_for_them() -> None:
    async def run() -> None:
        app = Begun()
        tasks = [app.start(str(number)) for number in range(20)]
        await asyncio.sleep(0)
        await asyncio.gather(app.start("/health", "GET"), app.start("/ping"))
        assert set(app.names[:5]) >= {"/health", "/ping"}
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_a_request_whose_client_leaves_takes_no_turn() -> None:
    async def run() -> None:
        app = Begun()
        tasks = [app.start(str(number)) for number in range(6)]
        await asyncio.sleep(0)
        for task in tasks[1:4]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert app.names == ["0", "4", "5"]
        await asyncio.sleep(0)
        later = app.start("later")
        await asyncio.sleep(0)
        assert app.names[-1] == "later", "it had to wait although no other began"
        await later

    asyncio.run(run())
