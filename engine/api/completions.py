"""/v1/completions: texts or token ids, continued."""

import msgspec
from fastapi import Request
from starlette.responses import Response

from engine.api.logprobs import TextOffsets, completion_logprobs
from engine.api.protocol import CompletionRequest
from engine.api.render import Chunks, chunk_options, new_head, usage
from engine.api.sse import EventStream, until_disconnect
from engine.api.state import ApiState
from engine.frontend.streams import Whole, gather

DEFAULT_MAX_TOKENS = 16


async def completions(state: ApiState, request: Request) -> Response:
    body = await state.read_request(request, CompletionRequest)
    adapter = await state.adapter_of(body.model)
    body.check()
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    params = body.sampling_params(max_tokens, body.top_logprobs)
    special = body.add_special_tokens is not False
    given = body.prompts()
    prompts = await state.prompts(given, special)
    head = new_head("cmpl", "text_completion", body.model or state.model)
    state.check_queue(len(prompts) * params.n)
    stream = state.client.add(
        prompts,
        params,
        cache_salt=body.cache_salt or "",
        priority=body.priority or 0,
        origin=state.origin(request, head),
        adapter=adapter,
    )

    def echo(index: int) -> str:
        one = given[index // params.n]
        return one if isinstance(one, str) else state.tokenizer.decode(one)

    if body.stream:
        chunks = Chunks(
            stream,
            state.tokenizer,
            head,
            chat=False,
            options=chunk_options(body),
            echo=echo if body.echo else None,
        )
        return EventStream(stream, chunks)
    outputs = await until_disconnect(request.receive, stream, lambda: gather(stream))
    choices = []
    for index, output in enumerate(outputs):
        before = echo(index) if body.echo else ""
        offsets = TextOffsets.of_output(state.tokenizer, stream, index, len(before))
        choices.append(choice(state, index, before + output.text, output, body, offsets))
    spent = usage(stream, sum(len(output.token_ids) for output in outputs))
    return Response(msgspec.json.encode(head | {"choices": choices, "usage": spent}), media_type="application/json")


def choice(
    state: ApiState, index: int, text: str, output: Whole, body: CompletionRequest, offsets: TextOffsets
) -> dict[str, object]:
    shown: dict[str, object] = {"index": index, "text": text, "logprobs": None, "finish_reason": output.finish_reason}
    shown["stop_reason"] = output.stop_reason
    if body.top_logprobs is not None:
        shown["logprobs"] = completion_logprobs(
            state.tokenizer,
            output.logprobs,
            offsets,
            len(text),
            as_token_ids=bool(body.return_tokens_as_token_ids),
        )
    if body.return_token_ids:
        shown["token_ids"] = output.token_ids
    return shown
