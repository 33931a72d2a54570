"""/invocations, the one path of some hosting platforms: the fields of the body decide which endpoint answers."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from engine.api.body import receive
from engine.api.error_responses import ApiError
from engine.api.model_kinds import CLASSIFIES, EMBEDS, GENERATES, Endpoint
from engine.api.parsing import field_names
from engine.api.state import ApiState

# Fields that a body must have for an endpoint, by the kinds of models that have it; the first that fits answers.
FORMS: dict[str, tuple[tuple[frozenset[str], str], ...]] = {
    GENERATES: ((frozenset({"messages"}), "/v1/chat/completions"), (frozenset({"prompt"}), "/v1/completions")),
    EMBEDS: (
        (frozenset({"input"}), "/v1/embeddings"),
        (frozenset({"query", "documents"}), "/rerank"),
        (frozenset(), "/score"),
    ),
    CLASSIFIES: (
        (frozenset({"input"}), "/classify"),
        (frozenset({"query", "documents"}), "/rerank"),
        (frozenset(), "/score"),
    ),
}


def invocations(endpoints: dict[str, Endpoint], kind: str) -> Endpoint:
    """The endpoint for a kind of model; `endpoints` are all others, by their paths."""
    forms = FORMS[kind]

    async def invoke(state: ApiState, request: Request) -> Response:
        limit = state.limits.largest_body(takes_media=state.client.ready.mm is not None)
        data = await receive(request, limit)
        given = field_names(data)
        path = next((path for needed, path in forms if needed <= given), None)
        if path is None:
            needed = " or ".join(sorted(name for names, _ in forms for name in names))
            raise ApiError(400, f"the body must have {needed}, by which /invocations chooses an endpoint")
        return await endpoints[path](state, Request(request.scope, Replay(bytes(data), request)))

    return invoke


class Replay:
    """Receives a body that was read already, and then what the client sends."""

    def __init__(self, data: bytes, request: Request):
        self._first: Message | None = {"type": "http.request", "body": data, "more_body": False}
        self._rest = request.receive

    async def __call__(self) -> Message:
        if (first := self._first) is not None:
            self._first = None
            return first
        return await self._rest()
