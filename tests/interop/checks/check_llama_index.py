"""LlamaIndex, with its packages for servers that are like OpenAI's."""

from typing import Any, Literal

from checking import KEY, PROMPT, QUESTION, Target, check, main
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.base.llms.types import ImageBlock, TextBlock
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from llama_index.llms.openai_like.responses import OpenAILikeResponses
from pydantic import BaseModel, Field


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=24)
    continent: Literal["Africa", "America", "Asia", "Europe"]


def get_weather(city: Literal["Rome", "Paris"], unit: Literal["celsius", "fahrenheit"]) -> str:
    """Weather of a city."""
    return f"21 degrees {unit} in {city}"


WEATHER = FunctionTool.from_defaults(get_weather)


def llm_of(target: Target, **more: Any) -> OpenAILike:
    given = {"is_chat_model": True, "is_function_calling_model": True, "temperature": 0, "max_tokens": 24, **more}
    return OpenAILike(model=target.model, api_base=target.base_url, api_key=KEY, **given)


def embedder_of(target: Target) -> OpenAILikeEmbedding:
    return OpenAILikeEmbedding(model_name=target.model, api_base=target.base_url, api_key=KEY)


@check("complete, of a chat model and of another one")
def complete(target: Target) -> None:
    assert llm_of(target).complete(PROMPT).text.strip()
    assert "Paris" in llm_of(target, is_chat_model=False).complete("The capital of France is").text


@check("chat, stream_chat")
def chat(target: Target) -> None:
    llm, messages = llm_of(target), [ChatMessage(role="user", content=PROMPT)]
    whole = llm.chat(messages).message.content
    chunks = list(llm.stream_chat(messages))
    assert len(chunks) > 3
    assert "".join(chunk.delta for chunk in chunks) == chunks[-1].message.content == whole


@check("achat, astream_chat")
async def achat(target: Target) -> None:
    llm, messages = llm_of(target), [ChatMessage(role="user", content=PROMPT)]
    whole = (await llm.achat(messages)).message.content
    assert whole.strip()
    assert "".join([chunk.delta async for chunk in await llm.astream_chat(messages)]) == whole


@check("chat_with_tools, predict_and_call")
def tools(target: Target) -> None:
    llm = llm_of(target, max_tokens=100)
    answer = llm.chat_with_tools([WEATHER], user_msg=QUESTION, tool_required=True)
    (call,) = llm.get_tool_calls_from_response(answer)
    assert call.tool_name == "get_weather"
    assert "21 degrees" in get_weather(**call.tool_kwargs)
    called = llm.predict_and_call([WEATHER], QUESTION, tool_required=True)
    assert called.response == get_weather(**call.tool_kwargs)


@check("stream_chat_with_tools")
def tools_stream(target: Target) -> None:
    llm = llm_of(target, max_tokens=100)
    last = list(llm.stream_chat_with_tools([WEATHER], user_msg=QUESTION, tool_required=True))[-1]
    whole = llm.chat_with_tools([WEATHER], user_msg=QUESTION, tool_required=True)
    calls = [llm.get_tool_calls_from_response(one)[0].tool_kwargs for one in (last, whole)]
    assert calls[0] == calls[1]


@check("structured_predict, by tools and by JSON schema")
def structured(target: Target) -> None:
    prompt = PromptTemplate("Describe {city}.")
    for by_schema in (False, True):
        llm = llm_of(target, max_tokens=100, should_use_structured_outputs=by_schema)
        assert isinstance(llm.structured_predict(City, prompt, city="Rome"), City)
    assert isinstance(llm_of(target, max_tokens=100).as_structured_llm(City).complete("Describe Rome.").raw, City)


@check("responses API")
def responses(target: Target) -> None:
    llm = OpenAILikeResponses(
        model=target.model,
        api_base=target.base_url,
        api_key=KEY,
        temperature=0,
        max_output_tokens=24,
        is_function_calling_model=True,
    )
    messages = [ChatMessage(role="user", content=PROMPT)]
    whole = llm.chat(messages).message.content
    assert whole == llm_of(target).chat(messages).message.content
    assert "".join(chunk.delta for chunk in llm.stream_chat(messages)) == whole


@check("image", "vision")
def image(target: Target) -> None:
    for picture in target.pictures:
        block = ImageBlock(url=f"data:image/png;base64,{picture.data}", image_mimetype="image/png")
        message = ChatMessage(role="user", blocks=[block, TextBlock(text="What color is the shape?")])
        assert picture.color in llm_of(target, max_tokens=8).chat([message]).message.content.lower()


@check("embeddings", "embedding")
def embeddings(target: Target) -> None:
    embedder = embedder_of(target)
    texts = embedder.get_text_embedding_batch(["Use sorted() to order a list.", "The cat sleeps on the sofa."])
    query = embedder.get_query_embedding("How do I sort a list?")
    assert len(query) == 384
    near, far = (sum(a * b for a, b in zip(query, text, strict=True)) for text in texts)
    assert near > far


@check("retrieval from an index", "embedding")
def retrieval(target: Target) -> None:
    texts = ["Use sorted() to order a list.", "The cat sleeps on the sofa.", "Rome lies on the Tiber."]
    index = VectorStoreIndex.from_documents([Document(text=text) for text in texts], embed_model=embedder_of(target))
    (found,) = index.as_retriever(similarity_top_k=1).retrieve("Which river is in Rome?")
    assert found.text == texts[2]


if __name__ == "__main__":
    main("llama-index-core")
