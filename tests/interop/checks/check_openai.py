"""OpenAI's client: chats, completions, tools, parsed outputs, embeddings, images, errors."""

import asyncio
import json
import math
from typing import Any, Literal

import openai
from checking import FORCED, KEY, PROMPT, WEATHER, WEATHER_ASKED, Target, check, check_weather, main, raised
from pydantic import BaseModel, Field

ASKED = [{"role": "user", "content": PROMPT}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=24)
    continent: Literal["Africa", "America", "Asia", "Europe"]
    rivers: list[Literal["Tiber", "Seine", "Nile"]] = Field(max_length=2)


def client_of(target: Target) -> openai.OpenAI:
    return openai.OpenAI(base_url=target.base_url, api_key=KEY)


def async_client_of(target: Target) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=target.base_url, api_key=KEY)


def content_of(target: Target, **more: Any) -> str:
    answer = client_of(target).chat.completions.create(model=target.model, messages=ASKED, **{**GREEDY, **more})
    text = answer.choices[0].message.content
    assert text, answer
    return text


@check("list and retrieve models")
def models(target: Target) -> None:
    client = client_of(target)
    assert [one.id for one in client.models.list()] == [target.model]
    assert client.models.retrieve(target.model).id == target.model


@check("chat")
def chat(target: Target) -> None:
    answer = client_of(target).chat.completions.create(model=target.model, messages=ASKED, **GREEDY)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content.strip()
    assert choice.finish_reason in ("stop", "length")
    assert answer.model == target.model
    assert 0 < answer.usage.completion_tokens <= 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@check("chat, streamed")
def chat_stream(target: Target) -> None:
    client = client_of(target)
    chunks = list(
        client.chat.completions.create(
            model=target.model, messages=ASKED, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert len(chunks) > 3
    assert text == content_of(target)
    assert not chunks[-1].choices
    assert 0 < chunks[-1].usage.completion_tokens <= 24


@check("chat, async")
async def chat_async(target: Target) -> None:
    async with async_client_of(target) as client:
        answers = await asyncio.gather(
            *(client.chat.completions.create(model=target.model, messages=ASKED, **GREEDY) for _ in range(8))
        )
    assert {answer.choices[0].message.content for answer in answers} == {content_of(target)}
    assert len({answer.id for answer in answers}) == 8


@check("chat, async and streamed")
async def chat_async_stream(target: Target) -> None:
    text = ""
    async with async_client_of(target) as client:
        stream = await client.chat.completions.create(model=target.model, messages=ASKED, stream=True, **GREEDY)
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    assert text == content_of(target)


@check("helper for streams")
def stream_helper(target: Target) -> None:
    deltas = ""
    with client_of(target).chat.completions.stream(model=target.model, messages=ASKED, **GREEDY) as stream:
        for event in stream:
            if event.type == "content.delta":
                deltas += event.delta
        final = stream.get_final_completion()
    assert deltas == final.choices[0].message.content == content_of(target)


@check("n, seed, stop, logprobs")
def parameters(target: Target) -> None:
    client = client_of(target)
    drawn = [
        client.chat.completions.create(model=target.model, messages=ASKED, n=2, seed=7, temperature=1, max_tokens=12)
        for _ in range(2)
    ]
    texts = [[choice.message.content for choice in one.choices] for one in drawn]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]
    whole = content_of(target)
    word = whole.split()[2]
    stopped = content_of(target, stop=word)
    assert stopped == whole.partition(word)[0]
    answer = client.chat.completions.create(
        model=target.model, messages=ASKED, logprobs=True, top_logprobs=3, **GREEDY
    ).choices[0]
    text = b"".join(bytes(token.bytes) for token in answer.logprobs.content).decode()
    # As in vLLM, the token that ends the message has logprobs too.
    assert text in (answer.message.content, f"{answer.message.content}<|im_end|>")
    for token in answer.logprobs.content:
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert sum(math.exp(one.logprob) for one in token.top_logprobs) <= 1 + 1e-6


@check("tools, named function, and its result")
def tools(target: Target) -> None:
    client = client_of(target)
    message = client.chat.completions.create(model=target.model, **FORCED).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "get_weather"
    check_weather(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 21, "sky": "clear"}'}
    answer = client.chat.completions.create(
        model=target.model, messages=[*WEATHER_ASKED, message, result], tools=[WEATHER], tool_choice="none", **GREEDY
    )
    assert answer.choices[0].message.content.strip()


@check("tools, streamed")
def tools_stream(target: Target) -> None:
    client = client_of(target)
    whole = client.chat.completions.create(model=target.model, **FORCED).choices[0].message.tool_calls[0]
    name, arguments, ids, pieces = "", "", set(), 0
    for chunk in client.chat.completions.create(model=target.model, stream=True, **FORCED):
        for delta in chunk.choices[0].delta.tool_calls or []:
            assert delta.index == 0
            ids |= {delta.id} - {None}
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
            pieces += 1
    assert (name, arguments) == ("get_weather", whole.function.arguments)
    assert len(ids) == 1
    assert pieces > 3


@check("tools, required and auto")
def tools_choice(target: Target) -> None:
    client = client_of(target)
    required = client.chat.completions.create(
        model=target.model,
        messages=WEATHER_ASKED,
        tools=[WEATHER],
        tool_choice="required",
        temperature=0,
        parallel_tool_calls=False,
    ).choices[0]
    assert required.finish_reason == "tool_calls"
    (call,) = required.message.tool_calls
    check_weather(call.function.arguments)
    auto = client.chat.completions.create(model=target.model, messages=ASKED, tools=[WEATHER], **GREEDY).choices[0]
    assert auto.message.content or auto.message.tool_calls


@check("JSON schema and JSON object")
def json_modes(target: Target) -> None:
    schema = {"name": "city", "schema": City.model_json_schema(), "strict": True}
    text = content_of(target, response_format={"type": "json_schema", "json_schema": schema}, max_tokens=100)
    City.model_validate_json(text)
    pair = {"role": "user", "content": 'Answer with {"a": 1}.'}
    answer = (
        client_of(target)
        .chat.completions.create(
            model=target.model, messages=[pair], response_format={"type": "json_object"}, temperature=0, max_tokens=200
        )
        .choices[0]
    )
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict)
    assert answer.message.content.lstrip().startswith("{")


@check("parse")
def parse(target: Target) -> None:
    message = (
        client_of(target)
        .chat.completions.parse(model=target.model, messages=ASKED, response_format=City, temperature=0)
        .choices[0]
        .message
    )
    assert isinstance(message.parsed, City)
    assert message.parsed == City.model_validate_json(message.content)


@check("parse, tools")
def parse_tools(target: Target) -> None:
    message = (
        client_of(target)
        .chat.completions.parse(
            model=target.model,
            messages=ASKED,
            tools=[openai.pydantic_function_tool(City)],
            tool_choice="required",
            temperature=0,
            parallel_tool_calls=False,
        )
        .choices[0]
        .message
    )
    (call,) = message.tool_calls
    assert isinstance(call.function.parsed_arguments, City)


@check("parse, streamed")
def parse_stream(target: Target) -> None:
    client = client_of(target)
    with client.chat.completions.stream(
        model=target.model, messages=ASKED, response_format=City, temperature=0
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, City)


@check("completions")
def completions(target: Target) -> None:
    client = client_of(target)
    whole = client.completions.create(model=target.model, prompt="The capital of France is", **GREEDY)
    assert "Paris" in whole.choices[0].text
    chunks = client.completions.create(model=target.model, prompt="The capital of France is", stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    echoed = client.completions.create(
        model=target.model, prompt=["One two three", "A b c"], max_tokens=0, echo=True, logprobs=1
    )
    assert [choice.text for choice in echoed.choices] == ["One two three", "A b c"]
    first = echoed.choices[0].logprobs
    assert "".join(first.tokens) == "One two three"
    assert first.token_logprobs[0] is None
    assert all(value < 0 for value in first.token_logprobs[1:])


@check("image", "vision")
def image(target: Target) -> None:
    for picture in target.pictures:
        url = {"url": f"data:image/png;base64,{picture.data}"}
        parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What color is the shape?"}]
        answer = client_of(target).chat.completions.create(
            model=target.model, messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=8
        )
        assert picture.color in answer.choices[0].message.content.lower(), answer


@check("embeddings", "embedding")
def embeddings(target: Target) -> None:
    client = client_of(target)
    texts = ["How do I sort a list?", "Use sorted() to order it.", "The cat sleeps on the sofa."]
    packed = client.embeddings.create(model=target.model, input=texts)  # base64 by default
    plain = client.embeddings.create(model=target.model, input=texts, encoding_format="float")
    assert [one.index for one in packed.data] == [0, 1, 2]
    for one, other in zip(packed.data, plain.data, strict=True):
        assert len(one.embedding) == 384
        assert max(abs(a - b) for a, b in zip(one.embedding, other.embedding, strict=True)) < 1e-6
    query, near, far = (one.embedding for one in packed.data)
    assert sum(a * b for a, b in zip(query, near, strict=True)) > sum(a * b for a, b in zip(query, far, strict=True))


@check("embeddings, async", "embedding")
async def embeddings_async(target: Target) -> None:
    async with async_client_of(target) as client:
        answers = await asyncio.gather(*(client.embeddings.create(model=target.model, input="a b") for _ in range(4)))
    assert len({tuple(answer.data[0].embedding) for answer in answers}) == 1


@check("errors and request ids")
def errors(target: Target) -> None:
    client = client_of(target)

    def ask(**more: Any) -> Any:
        return client.chat.completions.create(**{"model": target.model, "messages": ASKED, **more})

    unknown = raised(openai.NotFoundError, lambda: ask(model="no-such-model"))
    assert unknown.code == "model_not_found"
    assert unknown.request_id
    assert raised(openai.BadRequestError, lambda: ask(temperature=-1)).param == "temperature"
    long = [{"role": "user", "content": "a " * 9000}]
    assert raised(openai.BadRequestError, lambda: ask(messages=long)).code == "context_length_exceeded"
    raw = client.chat.completions.with_raw_response.create(model=target.model, messages=ASKED, **GREEDY)
    assert raw.headers["x-request-id"] == raw.parse()._request_id


if __name__ == "__main__":
    main("openai")
