"""LangChain's package for OpenAI's API."""

from typing import Any, Literal

from checking import KEY, PROMPT, QUESTION, WEATHER, Target, check, check_weather, main, raised
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field


class City(BaseModel, extra="forbid"):
    """A city."""

    name: str = Field(max_length=24)
    continent: Literal["Africa", "America", "Asia", "Europe"]


@tool
def add(a: Literal[1, 2, 3], b: Literal[1, 2, 3]) -> int:
    """Add two numbers."""
    return a + b


def chat_of(target: Target, **more: Any) -> ChatOpenAI:
    given = {"temperature": 0, "max_tokens": 24, **more}
    return ChatOpenAI(model=target.model, base_url=target.base_url, api_key=KEY, **given)


@check("invoke and batch")
def invoke(target: Target) -> None:
    chat = chat_of(target)
    answer = chat.invoke(PROMPT)
    assert answer.content.strip()
    assert 0 < answer.usage_metadata["output_tokens"] <= 24
    assert [one.content for one in chat.batch([PROMPT] * 3)] == [answer.content] * 3


@check("ainvoke")
async def ainvoke(target: Target) -> None:
    answer = await chat_of(target).ainvoke(PROMPT)
    assert answer.content == chat_of(target).invoke(PROMPT).content


@check("stream and astream")
async def stream(target: Target) -> None:
    chat = chat_of(target, stream_usage=True)
    chunks = list(chat.stream(PROMPT))
    whole = chat.invoke(PROMPT)
    assert len(chunks) > 3
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert "".join([chunk.content async for chunk in chat.astream(PROMPT)]) == whole.content
    joined = chunks[0]
    for chunk in chunks[1:]:
        joined += chunk
    assert joined.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]


@check("bind_tools, and their results")
def bind_tools(target: Target) -> None:
    chat = chat_of(target, max_tokens=100)
    asked = HumanMessage(QUESTION)
    answer = chat.bind_tools([WEATHER], tool_choice="get_weather").invoke([asked])
    (call,) = answer.tool_calls
    assert call["name"] == "get_weather"
    check_weather(call["args"])
    result = ToolMessage("21 degrees", tool_call_id=call["id"])
    assert chat.invoke([asked, answer, result]).content.strip()


@check("bind_tools, a Python function")
def python_tool(target: Target) -> None:
    answer = chat_of(target, max_tokens=100).bind_tools([add], tool_choice="any").invoke("How much is 1 and 2?")
    assert answer.tool_calls
    for call in answer.tool_calls:
        assert int(add.invoke(call).content) == call["args"]["a"] + call["args"]["b"]


@check("bind_tools, streamed")
def tools_stream(target: Target) -> None:
    bound = chat_of(target, max_tokens=100).bind_tools([WEATHER], tool_choice="get_weather")
    joined = None
    for chunk in bound.stream(QUESTION):
        joined = chunk if joined is None else joined + chunk
    (call,) = joined.tool_calls
    assert call["args"] == bound.invoke(QUESTION).tool_calls[0]["args"]


@check("with_structured_output, JSON schema")
def structured(target: Target) -> None:
    assert isinstance(chat_of(target, max_tokens=100).with_structured_output(City).invoke("Describe Rome."), City)


@check("with_structured_output, function calling")
def structured_tool(target: Target) -> None:
    chat = chat_of(target, max_tokens=100).with_structured_output(City, method="function_calling")
    assert isinstance(chat.invoke("Describe Rome."), City)


@check("with_structured_output, JSON mode")
def structured_json(target: Target) -> None:
    chat = chat_of(target, max_tokens=200).with_structured_output(method="json_mode")
    answer = chat.invoke('Write the JSON {"city": "Rome"} and nothing else.')
    assert isinstance(answer, dict)


@check("with_structured_output, streamed")
def structured_stream(target: Target) -> None:
    schema = {"title": "city", **City.model_json_schema()}
    chat = chat_of(target, max_tokens=100).with_structured_output(schema)
    City.model_validate(list(chat.stream("Describe Rome."))[-1])


@check("responses API")
def responses(target: Target) -> None:
    chat = chat_of(target, use_responses_api=True, max_tokens=100)
    assert chat.invoke(PROMPT).text == chat_of(target, max_tokens=100).invoke(PROMPT).content
    (call,) = chat.bind_tools([WEATHER], tool_choice="get_weather").invoke(QUESTION).tool_calls
    check_weather(call["args"])
    assert isinstance(chat.with_structured_output(City).invoke("Describe Rome."), City)


@check("image", "vision")
def image(target: Target) -> None:
    for picture in target.pictures:
        url = {"url": f"data:image/png;base64,{picture.data}"}
        parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What color is the shape?"}]
        answer = chat_of(target, max_tokens=8).invoke([HumanMessage(parts)])
        assert picture.color in answer.content.lower()


@check("completions (OpenAI)")
def completions(target: Target) -> None:
    model = OpenAI(model=target.model, base_url=target.base_url, api_key=KEY, temperature=0, max_tokens=24)
    whole = model.invoke("The capital of France is")
    assert "Paris" in whole
    assert "".join(model.stream("The capital of France is")) == whole


@check("OpenAIEmbeddings", "embedding")
def embeddings(target: Target) -> None:
    model = OpenAIEmbeddings(
        model=target.model, base_url=target.base_url, api_key=KEY, check_embedding_ctx_length=False
    )
    texts = model.embed_documents(["Use sorted() to order a list.", "The cat sleeps on the sofa."])
    query = model.embed_query("How do I sort a list?")
    near, far = (sum(a * b for a, b in zip(query, text, strict=True)) for text in texts)
    assert len(query) == 384
    assert near > far


@check("a prompt that is too long is a ContextOverflowError")
def too_long(target: Target) -> None:
    raised(ContextOverflowError, lambda: chat_of(target).invoke("a " * 9000))


if __name__ == "__main__":
    main("langchain-openai")
