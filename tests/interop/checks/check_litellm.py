"""LiteLLM, with its providers for OpenAI's API in general and for vLLM."""

import asyncio
from typing import Any, Literal

import litellm
from checking import FORCED, KEY, PROMPT, WEATHER, Target, check, check_weather, main, raised
from pydantic import BaseModel, Field

ASKED = [{"role": "user", "content": PROMPT}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=24)
    continent: Literal["Africa", "America", "Asia", "Europe"]


def at(target: Target, provider: str = "hosted_vllm") -> dict[str, Any]:
    """The arguments that name the model and its server."""
    return {"model": f"{provider}/{target.model}", "api_base": target.base_url, "api_key": KEY}


@check("completion, as OpenAI's and as vLLM's API")
def completion(target: Target) -> None:
    texts = {
        litellm.completion(**at(target, provider), messages=ASKED, **GREEDY).choices[0].message.content
        for provider in ("openai", "hosted_vllm")
    }
    assert len(texts) == 1
    assert texts.pop().strip()


@check("acompletion")
async def acompletion(target: Target) -> None:
    answers = await asyncio.gather(*(litellm.acompletion(**at(target), messages=ASKED, **GREEDY) for _ in range(4)))
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    assert all(answer.usage.completion_tokens > 0 for answer in answers)


@check("streams")
def stream(target: Target) -> None:
    whole = litellm.completion(**at(target), messages=ASKED, **GREEDY)
    chunks = list(
        litellm.completion(**at(target), messages=ASKED, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    built = litellm.stream_chunk_builder(chunks, messages=ASKED)
    assert len(chunks) > 3
    assert built.choices[0].message.content == whole.choices[0].message.content
    assert built.usage.completion_tokens == whole.usage.completion_tokens


@check("tools and their results")
def tools(target: Target) -> None:
    message = litellm.completion(**at(target), **FORCED).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "get_weather"
    check_weather(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": "21 degrees"}
    answer = litellm.completion(
        **at(target), messages=[*FORCED["messages"], message, result], tools=[WEATHER], tool_choice="none", **GREEDY
    )
    assert answer.choices[0].message.content.strip()


@check("tools, streamed")
def tools_stream(target: Target) -> None:
    (whole,) = litellm.completion(**at(target), **FORCED).choices[0].message.tool_calls
    built = litellm.stream_chunk_builder(list(litellm.completion(**at(target), stream=True, **FORCED)))
    (call,) = built.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", whole.function.arguments)


@check("response_format")
def response_format(target: Target) -> None:
    answer = litellm.completion(**at(target), messages=ASKED, response_format=City, temperature=0)
    City.model_validate_json(answer.choices[0].message.content)


@check("text_completion")
def text_completion(target: Target) -> None:
    answer = litellm.text_completion(
        **at(target, "text-completion-openai"), prompt="The capital of France is", **GREEDY
    )
    assert "Paris" in answer.choices[0].text


@check("responses")
def responses(target: Target) -> None:
    chat = litellm.completion(**at(target, "openai"), messages=ASKED, **GREEDY).choices[0].message.content
    given = {**at(target, "openai"), "input": PROMPT, "temperature": 0, "max_output_tokens": 24}
    answer = litellm.responses(**given)
    assert answer.output[0].content[0].text == chat
    deltas = [event.delta for event in litellm.responses(**given, stream=True) if event.type.endswith("text.delta")]
    assert "".join(deltas) == chat


@check("Anthropic's API")
def messages(target: Target) -> None:
    given = {"model": f"anthropic/{target.model}", "api_base": target.url, "api_key": KEY, "messages": ASKED}
    answer = litellm.completion(**given, **GREEDY).choices[0].message.content
    assert answer == litellm.completion(**at(target), messages=ASKED, **GREEDY).choices[0].message.content
    chunks = litellm.completion(**given, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer


@check("image", "vision")
def image(target: Target) -> None:
    for picture in target.pictures:
        url = {"url": f"data:image/png;base64,{picture.data}"}
        parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What color is the shape?"}]
        answer = litellm.completion(
            **at(target), messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=8
        )
        assert picture.color in answer.choices[0].message.content.lower()


@check("embedding", "embedding")
def embedding(target: Target) -> None:
    answers = [
        litellm.embedding(**at(target, provider), input=["one text", "another one"])
        for provider in ("openai", "hosted_vllm")
    ]
    vectors = [[one["embedding"] for one in answer.data] for answer in answers]
    assert [len(vector) for vector in vectors[0]] == [384, 384]
    for one, other in zip(*vectors, strict=True):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 1e-6


@check("rerank", "embedding")
def rerank(target: Target) -> None:
    documents = ["The cat sleeps on the sofa.", "Use sorted() to order a list.", "Rome lies on the Tiber."]
    for url in (target.url, target.base_url):
        given = {**at(target), "api_base": url}
        answer = litellm.rerank(**given, query="How do I sort a list?", documents=documents, top_n=2)
        assert len(answer.results) == 2
        assert answer.results[0]["index"] == 1


@check("errors as LiteLLM's exceptions")
def errors(target: Target) -> None:
    expected = (
        (litellm.NotFoundError, {**at(target), "model": "hosted_vllm/no-such-model", "messages": ASKED}),
        (litellm.BadRequestError, {**at(target), "messages": ASKED, "temperature": -1}),
        (litellm.ContextWindowExceededError, {**at(target), "messages": [{"role": "user", "content": "a " * 9000}]}),
    )
    for kind, given in expected:
        raised(kind, lambda given=given: litellm.completion(**given))


if __name__ == "__main__":
    main("litellm")
