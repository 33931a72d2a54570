"""Anthropic's client: messages, streams, tools, images, parsed outputs, counted tokens, errors."""

import asyncio
from typing import Any, Literal

import anthropic
from checking import KEY, PROMPT, QUESTION, WEATHER, Target, check, check_weather, main, raised
from pydantic import BaseModel

# The client has no argument for the temperature.
GREEDY: dict[str, Any] = {"max_tokens": 24, "extra_body": {"temperature": 0}}
ASKED = [{"role": "user", "content": PROMPT}]
TOOL = {
    "name": "get_weather",
    "description": WEATHER["function"]["description"],
    "input_schema": WEATHER["function"]["parameters"],
}
FORCED: dict[str, Any] = {
    "messages": [{"role": "user", "content": QUESTION}],
    "tools": [TOOL],
    "tool_choice": {"type": "tool", "name": "get_weather"},
    "max_tokens": 100,
    "extra_body": {"temperature": 0},
}


class City(BaseModel):
    """A city."""

    continent: Literal["Africa", "America", "Asia", "Europe"]
    river: Literal["Tiber", "Seine", "Nile"]


def client_of(target: Target) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=target.url, api_key=KEY)


@check("messages")
def messages(target: Target) -> None:
    answer = client_of(target).messages.create(model=target.model, messages=ASKED, **GREEDY)
    (block,) = answer.content
    assert block.type == "text"
    assert block.text.strip()
    assert answer.stop_reason in ("end_turn", "max_tokens")
    assert 0 < answer.usage.output_tokens <= 24


@check("messages, async")
async def messages_async(target: Target) -> None:
    async with anthropic.AsyncAnthropic(base_url=target.url, api_key=KEY) as client:
        answers = await asyncio.gather(
            *(client.messages.create(model=target.model, messages=ASKED, **GREEDY) for _ in range(4))
        )
    assert len({answer.content[0].text for answer in answers}) == 1
    assert len({answer.id for answer in answers}) == 4


@check("streams")
def stream(target: Target) -> None:
    client = client_of(target)
    whole = client.messages.create(model=target.model, messages=ASKED, **GREEDY)
    with client.messages.stream(model=target.model, messages=ASKED, **GREEDY) as events:
        texts = list(events.text_stream)
        final = events.get_final_message()
    assert len(texts) > 3
    assert "".join(texts) == final.content[0].text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    kinds = [event.type for event in client.messages.create(model=target.model, messages=ASKED, stream=True, **GREEDY)]
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"


@check("streams, async")
async def stream_async(target: Target) -> None:
    async with (
        anthropic.AsyncAnthropic(base_url=target.url, api_key=KEY) as client,
        client.messages.stream(model=target.model, messages=ASKED, **GREEDY) as events,
    ):
        text = "".join([text async for text in events.text_stream])
    assert text == client_of(target).messages.create(model=target.model, messages=ASKED, **GREEDY).content[0].text


@check("system, stop sequences, a begun answer")
def parameters(target: Target) -> None:
    client = client_of(target)
    text = client.messages.create(model=target.model, messages=ASKED, **GREEDY).content[0].text
    word = text.split()[2]
    stopped = client.messages.create(model=target.model, messages=ASKED, stop_sequences=[word], **GREEDY)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
    assert stopped.content[0].text == text.partition(word)[0]
    short = client.messages.count_tokens(model=target.model, messages=ASKED, system="Be brief.").input_tokens
    assert (
        short
        < client.messages.count_tokens(
            model=target.model, messages=ASKED, system=[{"type": "text", "text": "Be brief, be brief, be brief."}]
        ).input_tokens
    )
    begun = [*ASKED, {"role": "assistant", "content": "The colors are"}]
    assert client.messages.create(model=target.model, messages=begun, **GREEDY).content[0].text


@check("tools and their results")
def tools(target: Target) -> None:
    client = client_of(target)
    answer = client.messages.create(model=target.model, **FORCED)
    assert answer.stop_reason == "tool_use"
    (call,) = answer.content
    assert (call.type, call.name) == ("tool_use", "get_weather")
    check_weather(call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "21 degrees"}
    turns = [
        *FORCED["messages"],
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    last = client.messages.create(model=target.model, messages=turns, tools=[TOOL], **GREEDY)
    assert last.content


@check("tools, any and none")
def tool_choices(target: Target) -> None:
    client = client_of(target)
    any_of = {**FORCED, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    (call,) = client.messages.create(model=target.model, **any_of).content
    check_weather(call.input)
    answer = client.messages.create(model=target.model, **{**FORCED, "tool_choice": {"type": "none"}})
    assert [block.type for block in answer.content] == ["text"]


@check("tools, streamed")
def tools_stream(target: Target) -> None:
    client = client_of(target)
    (whole,) = client.messages.create(model=target.model, **FORCED).content
    with client.messages.stream(model=target.model, **FORCED) as events:
        pieces = [event.partial_json for event in events if event.type == "input_json"]
        (call,) = events.get_final_message().content
    assert call.input == whole.input
    assert check_weather("".join(pieces)) == whole.input


@check("parse")
def parse(target: Target) -> None:
    client = client_of(target)
    answer = client.messages.parse(
        model=target.model, messages=ASKED, output_format=City, **{**GREEDY, "max_tokens": 80}
    )
    assert isinstance(answer.parsed_output, City)
    with client.messages.stream(
        model=target.model, messages=ASKED, output_format=City, **{**GREEDY, "max_tokens": 80}
    ) as events:
        assert events.get_final_message().parsed_output == answer.parsed_output


@check("count_tokens")
def count_tokens(target: Target) -> None:
    client = client_of(target)
    counted = client.messages.count_tokens(model=target.model, messages=ASKED).input_tokens
    usage = client.messages.create(model=target.model, messages=ASKED, **GREEDY).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0) + (
        usage.cache_creation_input_tokens or 0
    )


@check("image", "vision")
def image(target: Target) -> None:
    for picture in target.pictures:
        source = {"type": "base64", "media_type": "image/png", "data": picture.data}
        parts = [{"type": "image", "source": source}, {"type": "text", "text": "What color is the shape?"}]
        answer = client_of(target).messages.create(
            model=target.model, messages=[{"role": "user", "content": parts}], **{**GREEDY, "max_tokens": 8}
        )
        assert picture.color in answer.content[0].text.lower(), answer


@check("errors and request ids")
def errors(target: Target) -> None:
    client = client_of(target)

    def ask(**more: Any) -> Any:
        return client.messages.create(**{"model": target.model, "messages": ASKED, **GREEDY, **more})

    assert (
        raised(anthropic.NotFoundError, lambda: ask(model="no-such-model")).body["error"]["type"] == "not_found_error"
    )
    assert "temperature" in raised(anthropic.BadRequestError, lambda: ask(extra_body={"temperature": -1})).message
    assert ask()._request_id


if __name__ == "__main__":
    main("anthropic")
