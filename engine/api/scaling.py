"""The endpoint that adds and drains replicas while the server serves."""

from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from engine.api.error_responses import ApiError
from engine.api.scale_state import ScaleState, Scaling
from engine.api.state import ApiState
from engine.frontend.connect import EngineClient
from engine.frontend.front_end_stats import MOST_REPLICAS


class ScaleRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    data_parallel_size: Annotated[int, msgspec.Meta(ge=1, le=MOST_REPLICAS)]
    drain_timeout: Annotated[float, msgspec.Meta(ge=0)] | None = None  # seconds


async def scale(state: ApiState, request: Request) -> Response:
    """Begin to add or to drain replicas."""
    body = await state.read(request, ScaleRequest)
    return _response(state.client, await scaling_of(state).scale(body.data_parallel_size, body.drain_timeout))


async def scale_state(state: ApiState, _request: Request) -> Response:
    """How far that is."""
    return _response(state.client, scaling_of(state).state)


def scaling_of(state: ApiState) -> Scaling:
    """Raise ApiError 400 if the replicas of this server stay as they are."""
    if state.scaling is None:
        raise ApiError(400, "the number of replicas of this server can't be changed")
    return state.scaling


def _response(client: EngineClient, scaling: ScaleState) -> Response:
    replicas = client.replica_states() or [{"replica": 0, "status": "restarting" if client.unavailable else "ok"}]
    body: dict[str, Any] = {
        "revision": scaling.revision,
        "data_parallel_size": scaling.target,
        "done": is_done(replicas),
        "error": scaling.error or None,
        "timed_out": client.total_stats.events("drain_timeout"),
        "replicas": replicas,
    }
    return Response(msgspec.json.encode(body), media_type="application/json")


def is_done(replicas: list[dict[str, Any]]) -> bool:
    """Whether nothing starts or drains any longer."""
    return not any(replica["status"] in ("starting", "restarting", "draining") for replica in replicas)
