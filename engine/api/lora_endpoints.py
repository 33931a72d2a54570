"""Loading and unloading of LoRA adapters at run time, with vLLM's paths and fields."""

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from engine.api.error_responses import ApiError
from engine.api.state import ApiState
from engine.errors import EngineDeadError, RedlineError, RequestError


class LoadRequest(msgspec.Struct, kw_only=True):
    lora_name: str
    lora_path: str


class UnloadRequest(msgspec.Struct, kw_only=True):
    lora_name: str


def check_runtime_lora(state: ApiState) -> None:
    """Raise ApiError 403 without --enable-runtime-lora, since the server would read any path that a client sends."""
    if not state.options.runtime_lora:
        message = "loading and unloading adapters is disabled: start the server with --enable-runtime-lora"
        raise ApiError(403, message, code="runtime_lora_disabled")


async def load_adapter(state: ApiState, request: Request) -> Response:
    check_runtime_lora(state)
    body = await state.read(request, LoadRequest)
    if not body.lora_name or body.lora_name in state.names:
        raise RequestError(
            f"{body.lora_name!r} can't be an adapter's name: it is empty or the base model's", "lora_name"
        )
    await _change(state, "load_adapter", "lora_path", name=body.lora_name, path=body.lora_path)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload_adapter(state: ApiState, request: Request) -> Response:
    check_runtime_lora(state)
    body = await state.read(request, UnloadRequest)
    await _change(state, "unload_adapter", "lora_name", name=body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _change(state: ApiState, method: str, field: str, **arguments: str) -> None:
    try:
        await state.client.call_utility(method, **arguments)
    except EngineDeadError:
        raise
    except RedlineError as error:
        raise RequestError(str(error), field) from error
    await state.refresh_adapters()
