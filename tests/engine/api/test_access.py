"""Keys from all sources, and web pages of allowed origins."""

from pathlib import Path

import pytest

from engine.api.http_options import HttpOptions
from engine.api.keys import read_keys
from engine.errors import ConfigError
from tests.engine.api.conftest import in_loop


def test_keys_come_from_the_command_a_file_and_the_environment(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("# of the team\nfirst\n\n second  # of the tests\n")
    assert read_keys((), None, {}) == ()
    assert read_keys(("a", "b"), str(file), {"REDLINE_API_KEY": "c, a"}) == ("a", "b", "first", "second", "c")


@pytest.mark.parametrize(
    ("given", "text", "variable", "said"),
    [
        (("",), None, None, "--api-key is empty"),
        (("a b",), None, None, "space"),
        (("clé",), None, None, "ASCII"),
        ((), "# none\n", None, "has no keys"),
        ((), None, "", "REDLINE_API_KEY is empty"),
        ((), None, "a,,b", "REDLINE_API_KEY is empty"),
    ],
)
def test_a_key_that_protects_nothing_is_refused(
    tmp_path: Path, given: tuple[str, ...], text: str | None, variable: str | None, said: str
):
    if text is not None:
        (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_keys(
            given,
            None if text is None else str(tmp_path / "keys"),
            {} if variable is None else {"REDLINE_API_KEY": variable},
        )
    with pytest.raises(ConfigError, match="can't be read"):
        read_keys((), str(tmp_path / "missing"), {})


async def test_each_of_several_keys_opens_the_server():
    async with in_loop(options=HttpOptions(api_keys=("one", "two"))) as server:
        for header, status, said in (
            ("Bearer one", 200, '"model"'),
            ("bearer two", 200, '"model"'),
            ("Bearer three", 401, "the API key is not one of this server's"),
            ("one", 401, "an API key is required"),
            ("", 401, "an API key is required"),
        ):
            answer = await server.http.get("/v1/models", headers={"authorization": header})
            assert answer.status_code == status, header
            assert said in answer.text


async def test_only_pages_of_allowed_origins_may_call():
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    options = HttpOptions(api_keys=("key",), allowed_origins=("https://good.example",))
    async with in_loop(options=options) as server:
        asked = {**ask, "origin": "https://good.example"}
        answer = await server.http.options("/v1/chat/completions", headers=asked)
        assert answer.status_code == 200, "asked without the key, as browsers do"
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        assert "content-type" in answer.headers["access-control-allow-headers"]
        headers = {"authorization": "Bearer key", "origin": "https://good.example"}
        answer = await server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://good.example")
        asked["origin"] = "https://bad.example"
        answer = await server.http.options("/v1/chat/completions", headers=asked)
        assert "access-control-allow-origin" not in answer.headers
        assert answer.status_code == 400
    async with in_loop() as server:
        answer = await server.http.options("/reset_prefix_cache", headers={**ask, "origin": "https://good.example"})
        assert answer.status_code == 405
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_adapters_are_loaded_over_http_only_where_that_is_allowed():
    async with in_loop(options=HttpOptions()) as server:
        for path, body in (
            ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/etc"}),
            ("/v1/unload_lora_adapter", {"lora_name": "a"}),
        ):
            error = await server.refusal(path, body, 403)
            assert "--enable-runtime-lora" in error["message"]
