"""OpenAI's client: responses, with streams, tools, parsed outputs and stored conversations."""

import asyncio
from typing import Any, Literal

import openai
from checking import KEY, PROMPT, QUESTION, WEATHER, Target, check, check_weather, main, raised
from pydantic import BaseModel, Field

GREEDY: dict[str, Any] = {"temperature": 0, "max_output_tokens": 24}
FUNCTION = {"type": "function", "strict": True, **WEATHER["function"]}
FORCED: dict[str, Any] = {
    "input": QUESTION,
    "tools": [FUNCTION],
    "tool_choice": {"type": "function", "name": "get_weather"},
    "temperature": 0,
}


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=24)
    continent: Literal["Africa", "America", "Asia", "Europe"]


def client_of(target: Target) -> openai.OpenAI:
    return openai.OpenAI(base_url=target.base_url, api_key=KEY)


@check("responses, as chats")
def text(target: Target) -> None:
    client = client_of(target)
    answer = client.responses.create(model=target.model, input=PROMPT, **GREEDY)
    chat = client.chat.completions.create(
        model=target.model, messages=[{"role": "user", "content": PROMPT}], temperature=0, max_tokens=24
    )
    assert answer.output_text == chat.choices[0].message.content
    assert answer.status in ("completed", "incomplete")
    assert answer.usage.output_tokens == chat.usage.completion_tokens


@check("responses, async")
async def text_async(target: Target) -> None:
    async with openai.AsyncOpenAI(base_url=target.base_url, api_key=KEY) as client:
        answers = await asyncio.gather(
            *(client.responses.create(model=target.model, input=PROMPT, **GREEDY) for _ in range(4))
        )
    assert len({answer.output_text for answer in answers}) == 1
    assert len({answer.id for answer in answers}) == 4


@check("responses, streamed")
def stream(target: Target) -> None:
    client = client_of(target)
    whole = client.responses.create(model=target.model, input=PROMPT, **GREEDY)
    deltas, numbers = "", []
    with client.responses.stream(model=target.model, input=PROMPT, **GREEDY) as events:
        for event in events:
            numbers.append(event.sequence_number)
            if event.type == "response.output_text.delta":
                deltas += event.delta
        final = events.get_final_response()
    assert deltas == final.output_text == whole.output_text
    assert numbers == list(range(len(numbers)))


@check("stored responses")
def stored(target: Target) -> None:
    client = client_of(target)
    first = client.responses.create(model=target.model, input="My name is Ada.", **GREEDY)
    second = client.responses.create(
        model=target.model, input="What is my name?", previous_response_id=first.id, **GREEDY
    )
    turns = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "What is my name?"},
    ]
    assert second.output_text == client.responses.create(model=target.model, input=turns, **GREEDY).output_text
    assert client.responses.retrieve(second.id).output_text == second.output_text
    client.responses.delete(first.id)
    raised(openai.NotFoundError, lambda: client.responses.retrieve(first.id))


@check("responses, tools and their results")
def tools(target: Target) -> None:
    client = client_of(target)
    (call,) = client.responses.create(model=target.model, **FORCED).output
    assert (call.type, call.name) == ("function_call", "get_weather")
    check_weather(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"degrees": 21}'}
    items = [{"role": "user", "content": QUESTION}, call, result]
    answer = client.responses.create(model=target.model, input=items, tools=[FUNCTION], tool_choice="none", **GREEDY)
    assert answer.output_text.strip()


@check("responses, tools streamed")
def tools_stream(target: Target) -> None:
    client = client_of(target)
    (whole,) = client.responses.create(model=target.model, **FORCED).output
    deltas = ""
    with client.responses.stream(model=target.model, **FORCED) as events:
        for event in events:
            if event.type == "response.function_call_arguments.delta":
                deltas += event.delta
    assert deltas == whole.arguments


@check("responses, parse")
def parse(target: Target) -> None:
    answer = client_of(target).responses.parse(
        model=target.model, input="Describe Rome.", text_format=City, temperature=0
    )
    assert isinstance(answer.output_parsed, City)
    assert answer.output_parsed == City.model_validate_json(answer.output_text)


@check("responses, image", "vision")
def image(target: Target) -> None:
    for picture in target.pictures:
        parts = [
            {"type": "input_image", "image_url": f"data:image/png;base64,{picture.data}", "detail": "auto"},
            {"type": "input_text", "text": "What color is the shape?"},
        ]
        answer = client_of(target).responses.create(
            model=target.model, input=[{"role": "user", "content": parts}], temperature=0, max_output_tokens=16
        )
        assert picture.color in answer.output_text.lower(), answer.output_text


if __name__ == "__main__":
    main("openai")
