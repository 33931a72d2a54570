"""One response: its fields, its events, and what is kept of it."""

import time
from typing import Any

import msgspec

from engine.api.error_responses import ApiError
from engine.api.response_peers import SharedResponses
from engine.api.response_store import StoredResponse, Turn
from engine.api.responses.conversation import Item
from engine.api.responses.output import Event, OutputItems
from engine.api.responses.protocol import ResponsesRequest
from engine.frontend.streams import Delta, RequestStream

encode = msgspec.json.encode


class NewResponse:
    """A response that is being generated."""

    def __init__(
        self,
        body: ResponsesRequest,
        head: dict[str, Any],
        stream: RequestStream,
        output: OutputItems,
        store: SharedResponses,
        turns: tuple[Turn, ...],
        owner: int | None,
    ):
        """Further arguments than those of the chat.

        Args:
            body: of the request.
            head: the `id` and `model`.
            stream: of the chat.
            output: reads it.
            store: where the response is kept, unless the request has `store: false`.
            turns: the conversation up to the input of the request.
            owner: see `StoredResponse`.
        """
        self.stream = stream
        self.output = output
        self._store = store if body.store is not False else None
        self._turns = turns
        self._owner = owner
        self._id: str = head["id"]
        params = stream.params
        reasoning = body.reasoning
        self._fields: dict[str, Any] = {
            "id": head["id"],
            "object": "response",
            "created_at": int(time.time()),
            "model": head["model"],
            "background": False,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None if reasoning is None else reasoning.effort, "summary": None},
            "store": self._store is not None,
            "temperature": params.temperature,
            "text": {"format": shown_format(body)},
            "tool_choice": body.tool_choice or "auto",
            "tools": [{"strict": False, "parameters": None} | tool for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": body.truncation or "disabled",
            "user": body.user,
        }

    def begun(self) -> dict[str, Any]:
        """The response before its first token."""
        return self._shown("in_progress")

    def finish(self) -> dict[str, Any]:
        """The response whose output has ended, which is kept for later requests."""
        output = self.output
        status = {"stop": "completed", "length": "incomplete"}.get(output.finish_reason or "", "failed")
        if status == "failed":
            return self.failed(f"the engine ended the request: {output.finish_reason}")
        why = {"reason": "max_output_tokens"} if status == "incomplete" else None
        shown = self._shown(status, incomplete_details=why, usage=self._usage(), completed_at=int(time.time()))
        if self._store is not None:
            turns = (*self._turns, Turn(output.items))
            self._store.put(self._id, StoredResponse(encode(shown), turns, self._owner))
        return shown

    def failed(self, message: str, code: str = "server_error") -> dict[str, Any]:
        """The response that ends with an error."""
        return self._shown("failed", error={"code": code, "message": message}, usage=self._usage())

    def _shown(self, status: str, **more: Any) -> dict[str, Any]:
        """All fields; `more` has those that are null in other states."""
        empty = dict.fromkeys(("completed_at", "error", "incomplete_details", "usage"))
        return self._fields | {"status": status, "output": list[Item](self.output.items)} | empty | more

    def _usage(self) -> dict[str, Any]:
        given, made = self.stream.prompt_tokens, self.output.num_tokens
        return {
            "input_tokens": given,
            "input_tokens_details": {"cached_tokens": sum(self.stream.cached_tokens)},
            "output_tokens": made,
            "output_tokens_details": {"reasoning_tokens": self.output.num_reasoning_tokens()},
            "total_tokens": given + made,
        }


def shown_format(body: ResponsesRequest) -> dict[str, Any]:
    """The format of the text as the request has it."""
    given = msgspec.structs.asdict(body.text_format)
    return {name: value for name, value in given.items() if value is not None}


class ResponseEvents:
    """Renders the events of a streamed response."""

    def __init__(self, response: NewResponse):
        self._response = response
        self._number = 0

    def begin(self) -> bytes:
        shown = self._response.begun()
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._render({"type": kind, "response": shown}) for kind in kinds)

    def render_all(self, deltas: list[Delta]) -> bytes:
        add = self._response.output.add
        return b"".join(self._render(event) for delta in deltas for event in add(delta))

    def end(self) -> bytes:
        return self._last(self._response.finish())

    def failure(self, error: ApiError) -> bytes:
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        return self._last(self._response.failed(str(error), code))

    def _last(self, shown: dict[str, Any]) -> bytes:
        return self._render({"type": f"response.{shown['status']}", "response": shown})

    def _render(self, event: Event) -> bytes:
        number = self._number
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), encode(event | {"sequence_number": number}))
