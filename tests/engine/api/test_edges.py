"""Values at the edges of fields, and paths that other servers have: what is accepted, and what is refused by name."""

from typing import Any

import pytest

from tests.engine.api.conftest import InLoop

USER = {"role": "user", "content": "hi"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "ab", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [USER], "max_tokens": 2},
}
# Of both endpoints: a field, the values that are accepted, and those that are refused.
EDGES: list[tuple[str, list[Any], list[Any]]] = [
    ("n", [1, 2, 128], [0, -1, 129, 1.5, "two"]),
    ("temperature", [0, 2, 1e-9], [-0.1, 2.1, "hot", True]),
    ("top_p", [0, 1], [-0.1, 1.1]),
    ("top_k", [-1, 0, 1, 10**6], [-2, 1.5]),
    ("min_p", [0, 1], [-0.1, 1.5]),
    ("presence_penalty", [-2, 2], [-2.1, 2.1]),
    ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
    ("repetition_penalty", [0.5, 2], [0, -1]),
    ("seed", [0, -1, 2**63 - 1], ["x", 1.5]),
    ("max_tokens", [1, 126], [0, -1, "many"]),
    ("min_tokens", [0, 2], [-1, 3]),
    ("stop", [".", ["a"] * 5, []], ["", [""], 5]),
    ("stop_token_ids", [[], [1, 2]], [[-1], [300]]),
    ("logit_bias", [{}, {"50": 100}, {"50": -100}], [{"50": 101}, {"a": 1}, {"300": 1}, [1]]),
    ("bad_words", [[], ["x"]], [[""], "x"]),
    ("allowed_token_ids", [[1], [1, 2]], [[], [300]]),
    ("truncate_prompt_tokens", [-1, 1, 2], [0, -2, 128]),
    ("prompt_logprobs", [0, 20], [-1, 21]),
    ("response_format", [{"type": "text"}], [{"type": "x"}, "text"]),
    ("model", [None, "", "fake"], [5]),
]
ONLY: list[tuple[str, str, list[Any], list[Any]]] = [
    ("/v1/completions", "logprobs", [0, 5, 20, True], [-1, 21]),
    ("/v1/completions", "best_of", [1, 3], [0, 129]),
    ("/v1/completions", "prompt", [["a", "b"], [1, 2], [[1, 2], [3]]], ["", [], [[]], [""], None, 5, [1, "a"], [-1]]),
    ("/v1/chat/completions", "logprobs", [True, False], [5]),
    (
        "/v1/chat/completions",
        "messages",
        [[{"role": "user", "content": ""}]],
        [[], None, "hi", [{}], [{"content": "x"}]],
    ),
    ("/v1/chat/completions", "modalities", [["text"]], [["audio"]]),
    ("/v1/chat/completions", "tool_choice", ["none"], ["auto", "required", "bad"]),
    ("/v1/chat/completions", "web_search_options", [{}], [{"search_context_size": "low"}]),
]
CASES = [(path, *edges) for edges in EDGES for path in BODIES] + ONLY


@pytest.mark.parametrize(("path", "field", "accepted", "refused"), CASES)
async def test_edges(server: InLoop, path: str, field: str, accepted: list[Any], refused: list[Any]):
    for value in accepted:
        await server.post(path, **BODIES[path] | {field: value})
    for value in refused:
        error = await server.refusal(path, BODIES[path] | {field: value})
        assert (error["param"] or "").startswith(field), (value, error)
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "path",
    ["/sleep", "/wake_up", "/collective_rpc", "/v1/audio/transcriptions", "/v1/moderations", "/v1/files"],
)
async def test_paths_that_are_not_served_are_named(server: InLoop, path: str):
    error = await server.refusal(path, {}, 404)
    assert path in error["message"]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling", "/classify", "/score", "/rerank", "/v2/rerank"])
async def test_a_model_that_generates_names_the_kind_it_lacks(server: InLoop, path: str):
    error = await server.refusal(path, {"input": "a"})
    assert error["code"] == "wrong_model_kind"
    assert f"{path} is not available" in error["message"]
