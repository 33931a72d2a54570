"""The request field `priority`."""

import pytest

from tests.engine.api.conftest import InLoop, in_loop


async def test_priority_is_refused_where_nobody_looks_at_it(server: InLoop):
    error = await server.refusal("/v1/completions", {"prompt": "ab", "priority": 5})
    assert (error["param"], error["type"]) == ("priority", "invalid_request_error")
    assert "--scheduling-policy priority" in error["message"]
    assert (await server.post("/v1/completions", prompt="ab", priority=0, max_tokens=2))["choices"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_priority_reaches_the_core(path: str):
    async with in_loop(scheduling_policy="priority") as server:
        sent: list[int] = []
        add = server.core.scheduler.add

        def watch(request):
            sent.append(request.message.priority)
            return add(request)

        server.core.scheduler.add = watch  # type: ignore[method-assign]
        prompt = {"prompt": "ab"} if path.endswith("/completions") and "chat" not in path else {}
        body = prompt or {"messages": [{"role": "user", "content": "ab"}]}
        await server.post(path, **body, max_tokens=2, priority=-3)
        assert sent == [-3]


async def test_priority_is_a_whole_number(server: InLoop):
    assert (await server.refusal("/v1/completions", {"prompt": "ab", "priority": "high"}))["param"] == "priority"
    assert (await server.refusal("/v1/completions", {"prompt": "ab", "priority": 2**80}))["param"] == "priority"
