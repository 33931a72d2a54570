"""/v1/completions: continues texts or token ids."""

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import Request
from starlette.responses import Response

from engine.api.event_stream import EventStream, run_until_disconnect
from engine.api.logprobs import TextOffsets, completion_logprobs, concatenate
from engine.api.protocol import CompletionRequest
from engine.api.render import Chunks, chunk_options, new_head, usage
from engine.api.request_id import client_id
from engine.api.shown_prompts import EchoedPrompts
from engine.api.state import ApiState
from engine.frontend.prompts import Prompt
from engine.frontend.streams import CollectedOutput, collect_outputs
from engine.frontend.structured_outputs import check_grammar


async def completions(state: ApiState, request: Request) -> Response:
    body = await state.read_request(request, CompletionRequest)
    adapter = await state.adapter_of(body.model)
    body.check()
    params = body.params(state.sampling_defaults)
    await check_grammar(state.client, params.structured_outputs)
    special = body.add_special_tokens is not False
    given = body.prompts()
    if params.needs_prompt_ids or body.return_token_ids:
        fitted = [await state.fit(one, special, params) for one in given]
        prompts: list[Prompt] = [ids for ids, _ in fitted]
        # Of a truncated prompt, only the part that is left is echoed.
        given = [ids if cut else one for one, (ids, cut) in zip(given, fitted, strict=True)]
    else:
        prompts = await state.prompts(given, special)
    own_id = client_id(request.scope) or body.request_id or ""
    head = new_head("cmpl", "text_completion", body.model or state.model, own_id, state.fingerprint)
    stream = state.submit(request, body, prompts, params, head, adapter)
    shown = EchoedPrompts(state.tokenizer, stream, body, given)
    if body.stream:
        chunks = Chunks(
            stream,
            state.tokenizer,
            head,
            chat=False,
            options=chunk_options(body),
            echo=shown.text if shown.echoes else None,
            prompts=shown,
        )
        return EventStream(stream, chunks)
    outputs = await run_until_disconnect(request.receive, stream, lambda: collect_outputs(stream))

    def render() -> bytes:
        choices = []
        for number, index in enumerate(best_outputs(outputs, params.n, body.n or 1)):
            output = outputs[index]
            shown.cut(output)
            before = shown.text(index) if shown.echoes else ""
            offsets = TextOffsets.of_output(state.tokenizer, stream, index, len(before))
            rendered = choice(state, number, before + output.text, output, body, offsets)
            if (scored := shown.logprobs(index)) is not None:
                rendered["logprobs"] = concatenate(scored, rendered["logprobs"])
            choices.append(rendered | shown.fields(index))
        spent = usage(stream, sum(len(output.token_ids) for output in outputs))
        return msgspec.json.encode(head | {"choices": choices, "usage": spent})

    data = await state.on_thread(render) if shown.long else render()
    return Response(data, media_type="application/json")


def best_outputs(outputs: Sequence[CollectedOutput], made: int, shown: int) -> list[int]:
    """The indices of the outputs to show: of the `made` ones of each prompt, those with the highest mean logprob."""
    if made == shown:
        return list(range(len(outputs)))

    def quality(index: int) -> float:
        scored = outputs[index].logprobs
        return sum(entry.logprob for entry in scored) / max(len(scored), 1)

    groups = [range(begin, begin + made) for begin in range(0, len(outputs), made)]
    return [index for group in groups for index in sorted(group, key=quality, reverse=True)[:shown]]


def choice(
    state: ApiState, index: int, text: str, output: CollectedOutput, body: CompletionRequest, offsets: TextOffsets
) -> dict[str, Any]:
    shown: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": output.finish_reason}
    shown["stop_reason"] = output.stop_reason
    if body.top_logprobs is not None:
        shown["logprobs"] = completion_logprobs(
            state.tokenizer, output.logprobs, offsets, len(text), as_token_ids=bool(body.return_tokens_as_token_ids)
        )
    if body.return_token_ids:
        shown["token_ids"] = output.token_ids
    return shown
