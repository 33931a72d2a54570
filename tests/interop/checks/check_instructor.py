"""instructor, in its modes for OpenAI's API."""

import json
from typing import Any, Literal

import instructor
import openai
from checking import KEY, Target, check, main
from pydantic import BaseModel, Field

ASKED = [{"role": "user", "content": "Rome is a city in Europe on the Tiber. Describe it."}]


class City(BaseModel, extra="forbid"):
    """A city."""

    name: str = Field(max_length=24)
    continent: Literal["Africa", "America", "Asia", "Europe"]
    rivers: list[Literal["Tiber", "Seine", "Nile"]] = Field(max_length=2)


class Answer(BaseModel):
    """An answer."""

    answer: Literal["yes", "no"]


def client_of(target: Target, mode: instructor.Mode = instructor.Mode.TOOLS) -> instructor.Instructor:
    return instructor.from_openai(openai.OpenAI(base_url=target.base_url, api_key=KEY), mode=mode)


def ask(client: instructor.Instructor, target: Target, **more: Any) -> City:
    """A city, without a second attempt."""
    given: dict[str, Any] = {"response_model": City, "temperature": 0, "max_tokens": 100, "max_retries": 0, **more}
    return client.create(model=target.model, messages=ASKED, **given)


@check("tools")
def tools(target: Target) -> None:
    assert isinstance(ask(client_of(target), target), City)


@check("tools, strict")
def tools_strict(target: Target) -> None:
    assert isinstance(ask(client_of(target), target, strict=True), City)


@check("JSON schema")
def json_schema(target: Target) -> None:
    assert isinstance(ask(client_of(target, instructor.Mode.JSON_SCHEMA), target), City)


@check("responses, tools")
def responses(target: Target) -> None:
    assert isinstance(ask(client_of(target, instructor.Mode.RESPONSES_TOOLS), target), City)


@check("from_provider")
def provider(target: Target) -> None:
    client = instructor.from_provider(f"openai/{target.model}", base_url=target.base_url, api_key=KEY)
    city = client.create(messages=ASKED, response_model=City, temperature=0, max_tokens=100, max_retries=0)
    assert isinstance(city, City)


@check("the completion beside the model")
def with_completion(target: Target) -> None:
    city, completion = client_of(target).create_with_completion(
        model=target.model, messages=ASKED, response_model=City, temperature=0, max_tokens=100, max_retries=0
    )
    (call,) = completion.choices[0].message.tool_calls
    assert city.model_dump() == json.loads(call.function.arguments)
    assert completion.usage.completion_tokens > 0


@check("async")
async def asynchronous(target: Target) -> None:
    client = instructor.from_openai(openai.AsyncOpenAI(base_url=target.base_url, api_key=KEY))
    city = await client.create(
        model=target.model, messages=ASKED, response_model=City, temperature=0, max_tokens=100, max_retries=0
    )
    assert city.model_dump() == ask(client_of(target), target).model_dump()


@check("partial objects of a stream")
def partial(target: Target) -> None:
    client = client_of(target)
    parts = list(
        client.create_partial(
            model=target.model, messages=ASKED, response_model=City, temperature=0, max_tokens=100, max_retries=0
        )
    )
    assert len(parts) > 3
    assert parts[-1].model_dump() == ask(client, target).model_dump()


@check("a list of objects of a stream")
def iterable(target: Target) -> None:
    found = list(
        client_of(target).create_iterable(
            model=target.model, messages=ASKED, response_model=Answer, temperature=0, max_tokens=60, max_retries=0
        )
    )
    assert all(isinstance(one, Answer) for one in found)
    assert found


@check("a second attempt after a failed validation")
def retries(target: Target) -> None:
    attempts = []

    class Checked(Answer):
        """An answer of which the first one is refused."""

        def model_post_init(self, context: Any) -> None:
            attempts.append(self.answer)
            if len(attempts) == 1:
                raise ValueError("look again")

    given = {"response_model": Checked, "max_retries": 1}
    client_of(target).create(model=target.model, messages=ASKED, temperature=0, max_tokens=100, **given)
    assert len(attempts) == 2


if __name__ == "__main__":
    main("instructor")
