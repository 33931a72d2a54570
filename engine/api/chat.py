"""/v1/chat/completions: continues a conversation."""

from typing import Any, NamedTuple

import msgspec
from fastapi import Request
from starlette.responses import Response

from engine.api.chat_answers import AnswerOptions, ChatAnswers, finish_reason
from engine.api.chat_protocol import ChatRequest, template_options
from engine.api.event_stream import EventStream, cancel_on_disconnect, run_until_disconnect
from engine.api.logprobs import chat_logprobs
from engine.api.render import Chunks, chunk_options, new_head, usage
from engine.api.request_id import client_id
from engine.api.shown_prompts import ShownPrompts
from engine.api.state import ApiState, message_texts
from engine.api.tools import choose_tools
from engine.errors import RequestError
from engine.frontend.media_inputs import Conversation
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.streams import CollectedOutput, RequestStream, collect_outputs
from engine.frontend.structured_outputs import check_grammar
from engine.frontend.thinking_budget import check_thinking_budget, with_thinking_budget

replace = msgspec.structs.replace


class StartedChat(NamedTuple):
    """A chat that the engine runs.

    Attributes:
        stream: of its outputs.
        answers: parses the outputs; None: they are plain contents.
        prompt_text: the prompt as the chat template wrote it, if the response contains it.
    """

    stream: RequestStream
    answers: ChatAnswers | None
    prompt_text: str | None


async def start_chat(state: ApiState, request: Request, body: ChatRequest, head: dict[str, Any]) -> StartedChat:
    """Check a chat and submit it to the engine; all endpoints for conversations use it.

    Args:
        state: of the API process.
        request: of the client.
        body: of the chat.
        head: the `id` and `model` of the response.

    Raises:
        RequestError: with the field that is not valid.
        ApiError: the model is unknown, or the queue is full.
    """
    adapter = await state.adapter_of(body.model)
    body.check()
    # Without a limit, the output may fill --max-model-len.
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    budget = body.thinking_token_budget
    params = body.sampling_params(
        state.sampling_defaults, max_tokens=max_tokens, logprobs=logprobs, thinking_token_budget=budget
    )
    options = answer_options(state, body)
    if options is not None:
        params = with_parsing(state, params, options)
    check_thinking_budget(params, state.answers)
    await check_grammar(state.client, params.structured_outputs)
    state.check_template(body.chat_template)
    conversation = state.conversation(body.messages)
    template = template_options(body) | {"tools_as_text": options is not None and bool(options.choice.tools)}
    prompt_text = await written_prompt(state, conversation, template) if body.return_prompt_text else None
    preparing = state.chat_prompt(
        conversation,
        params,
        as_ids=params.needs_prompt_ids or bool(body.return_token_ids),
        add_special_tokens=bool(body.add_special_tokens),
        **template,
    )
    prompt = await (cancel_on_disconnect(request.receive, preparing) if conversation.media else preparing)
    answers = None if options is None else ChatAnswers(state.answers, state.tokenizer, prompt.prompt, options)
    params = with_thinking_budget(params, state.answers, state.tokenizer, prompt.prompt)
    stream = state.submit(request, body, [prompt.prompt], params, head, adapter, [prompt.inputs])
    return StartedChat(stream, answers, prompt_text)


async def chat_completions(state: ApiState, request: Request) -> Response:
    body = await state.read_request(request, ChatRequest)
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    head = new_head("chatcmpl", kind, body.model or state.model, client_id(request.scope) or body.request_id or "")
    head["system_fingerprint"] = state.fingerprint
    stream, answers, prompt_text = await start_chat(state, request, body, head)
    shown = ShownPrompts(state.tokenizer, stream, body, prompt_text)
    echoed = echoed_message(body)
    if body.stream:
        make = Chunks if answers is None else answers.chunks
        chunks = make(
            stream,
            state.tokenizer,
            head,
            chat=True,
            options=chunk_options(body),
            echo=(lambda _index: echoed) if echoed else None,
            prompts=shown,
        )
        return EventStream(stream, chunks)
    outputs = await run_until_disconnect(request.receive, stream, lambda: collect_outputs(stream))

    def render() -> bytes:
        choices = [choice(state, index, output, body, answers, echoed) for index, output in enumerate(outputs)]
        reasoning = None if answers is None else answers.count_reasoning(stream, outputs)
        spent = usage(stream, sum(len(output.token_ids) for output in outputs), reasoning)
        return msgspec.json.encode(head | {"choices": choices, "usage": spent} | shown.fields(0))

    data = await state.on_thread(render) if shown.long else render()
    return Response(data, media_type="application/json")


def answer_options(state: ApiState, body: ChatRequest) -> AnswerOptions | None:
    """What the messages of the response contain; None if they are the plain output.

    Raises RequestError, with the field, for tools that can't be used.
    """
    choice = choose_tools(body.tools, body.tool_choice, parallel=body.parallel_tool_calls is not False)
    if choice.tools and not choice.enforced:
        state.check_calls(own_template=not body.chat_template)
    separate = body.separate_reasoning is not False
    if not choice.enforced and not state.answers.parses(tools=bool(choice.tools), reasoning=separate):
        return None
    return AnswerOptions(
        choice=choice,
        separate_reasoning=separate,
        include_reasoning=body.include_reasoning is not False,
    )


def with_parsing(state: ApiState, params: SamplingParams, options: AnswerOptions) -> SamplingParams:
    """The parameters of outputs that are parsed: with the special tokens and the constraints of calls."""
    wanted = options.choice.structured_outputs(state.answers.tools)
    given = params.structured_outputs
    # response_format is about the content, and a message with an enforced call has none.
    if given is not None and options.choice.enforced and given.field.startswith("response_format"):
        given = None
    if wanted is not None and given is not None:
        raise RequestError(f"{given.field} excludes strict tools, and a tool_choice that enforces a call", given.field)
    return replace(params, visible_special_ids=state.answers.visible_ids, structured_outputs=wanted or given)


def echoed_message(body: ChatRequest) -> str:
    """The text of the last message, if the request asks for it before its output and the assistant wrote it."""
    last = body.messages[-1] if body.messages else {}
    if not body.echo or last.get("role") != "assistant":
        return ""
    return "\n".join(message_texts([last]))


async def written_prompt(state: ApiState, conversation: Conversation, template: dict[str, Any]) -> str:
    """The conversation as the chat template writes it, before it is tokenized or truncated."""
    written = await state.render_chat(conversation, **template)
    return written if isinstance(written, str) else await state.decode(written)


def choice(
    state: ApiState, index: int, output: CollectedOutput, body: ChatRequest, answers: ChatAnswers | None, echoed: str
) -> dict[str, object]:
    if answers is None:
        message: dict[str, object] = {"role": "assistant", "content": echoed + output.text, "refusal": None}
    else:
        message = answers.message(output.text, echoed)
    named = answers is not None and bool(answers.options.choice.named)
    shown: dict[str, object] = {
        "index": index,
        "message": message,
        "logprobs": None,
        "finish_reason": finish_reason(output.finish_reason, called="tool_calls" in message, named=named),
        "stop_reason": output.stop_reason,
    }
    if body.logprobs:
        as_token_ids = bool(body.return_tokens_as_token_ids)
        shown["logprobs"] = chat_logprobs(state.tokenizer, output.logprobs, as_token_ids=as_token_ids)
    if body.return_token_ids:
        shown["token_ids"] = output.token_ids
    return shown
