"""The pages at / and /docs: whole, closed to other hosts, and true to the server that they talk to."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from engine.api.http_options import HttpOptions
from engine.api.server_page import FOLDER, SCRIPTS
from engine.messages import MMSpec
from tests.engine.api.conftest import TEMPLATE, InLoop, in_loop
from tests.engine.api.pooling_server import pooling_server
from tests.engine.pooling_models import build

PAGES = {"/": "index", "/docs": "docs"}


def script_of(name: str) -> str:
    return "".join((FOLDER / file).read_text() for file in SCRIPTS[name])


@pytest.mark.parametrize("path", list(PAGES))
async def test_a_page_is_whole_and_runs_its_own_scripts_alone(server: InLoop, path: str):
    answer = await server.http.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert not re.search(r"/\*(STYLE|SCRIPT)\*/", answer.text)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    for tag in ("script", "style"):
        [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert (await server.http.head(path)).status_code == 200


@pytest.mark.parametrize("path", list(PAGES))
async def test_nothing_comes_from_another_host(server: InLoop, path: str):
    text = (await server.http.get(path)).text
    assert set(re.findall(r"\w+://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<[^>]+ (style|on\w+)=", text), "the policy forbids it"
    assert not re.search(r"<(script|img|link)[^>]+(src|href)=\"(?!data:)", text)


@pytest.mark.parametrize("name", PAGES.values())
def test_scripts_use_elements_that_their_page_has(name: str):
    script = script_of(name)
    ids = set(re.findall(r' id="([\w-]+)"', (FOLDER / f"{name}.html").read_text()))
    used = set(re.findall(r'byId\("([\w-]+)"\)', script))
    assert used
    assert used <= ids


async def test_the_metrics_of_the_page_are_exported(server: InLoop):
    script = script_of("index")
    used = set(re.findall(r'"((?:vllm|redline):\w+)"', script))
    assert len(used) >= 9
    exported = (await server.http.get("/metrics")).text
    for name in used:
        assert re.search(rf"^{name}(_bucket)?\{{", exported, re.MULTILINE), name


async def test_the_endpoints_of_the_pages_are_served(server: InLoop):
    scripts = script_of("index") + script_of("docs")
    used = set(re.findall(r"\$\{base\}([\w./]+)", scripts))
    used |= set(re.findall(r'(?:\["(?=v1/)|open\(")([\w/]+)"', scripts))
    assert used == {"v1/models", "v1/completions", "v1/chat/completions", "metrics", "health", "openapi.json"}
    for path in used:
        assert (await server.http.get(f"/{path}")).status_code in (200, 405), path


async def test_fields_of_the_form_are_those_of_requests(server: InLoop):
    html = (FOLDER / "index.html").read_text()
    numbers = set(re.findall(r'<input id="(\w+)" type="number"', html))
    [listed] = re.findall(r"const SETTINGS = \[(.*?)\]", script_of("index"))
    assert set(re.findall(r'"(\w+)"', listed)) == numbers
    body = dict.fromkeys(numbers, 1)
    await server.post("/v1/completions", prompt="a", stream=False, **body)
    await server.post("/v1/chat/completions", messages=[{"role": "user", "content": "a"}], **body)


async def test_it_can_be_switched_off():
    async with in_loop(options=HttpOptions(page=False)) as server:
        for path in PAGES:
            assert (await server.http.get(path)).status_code == 404


async def test_with_keys_the_pages_are_open_and_the_model_is_not():
    async with in_loop(options=HttpOptions(api_keys=("one",))) as server:
        for path in PAGES:
            assert (await server.http.get(path)).status_code == 200
        assert 'data-keys="true"' in (await server.http.get("/")).text
        assert (await server.http.get("/v1/models")).status_code == 401


@pytest.mark.parametrize(
    ("mm", "images"),
    [
        (None, "false"),
        (MMSpec("m", {"audio": 1}, {"audio": 4}), "false"),
        (MMSpec("m", {"image": 1}, {"image": 4}), "true"),
        (MMSpec("m", {"image": 1}, {"image": 4}, {"image": 0}), "false"),
    ],
)
async def test_images_can_be_added_where_the_model_takes_them(server: InLoop, mm: MMSpec | None, images: str):
    server.client.ready = replace(server.client.ready, mm=mm)
    assert f'data-images="{images}"' in (await server.http.get("/")).text


async def test_chats_are_offered_where_the_model_has_a_template():
    for template, chats in ((TEMPLATE, "true"), (None, "false")):
        async with in_loop(template=template) as server:
            assert f'data-chats="{chats}"' in (await server.http.get("/")).text


async def test_models_that_pool_cannot_be_tried(tmp_path: Path, server: InLoop):
    assert 'data-generates="true"' in (await server.http.get("/")).text
    build("bert", tmp_path)
    async with pooling_server(tmp_path) as pooling:
        assert 'data-generates="false"' in (await pooling.http.get("/")).text


NODE = shutil.which("node")


def run_script(*functions: str, program: str, data: Any) -> Any:
    """Run a program with functions of the page in Node.js; `data` is its variable of that name."""
    script = script_of("index")
    sources = [re.search(rf"^function {name}\(.*?^}}$", script, re.DOTALL | re.MULTILINE) for name in functions]
    text = "\n".join(source[0] for source in sources if source is not None)
    command = f"{text}\nconst data = {json.dumps(data)};\nconsole.log(JSON.stringify({program}));"
    assert NODE is not None
    found = subprocess.run([NODE, "-e", command], capture_output=True, text=True, timeout=60, check=True)
    return json.loads(found.stdout)


@pytest.mark.skipif(NODE is None, reason="Node.js is not installed")
@pytest.mark.parametrize("name", PAGES.values())
def test_scripts_are_valid(name: str, tmp_path: Path):
    file = tmp_path / "page.js"
    file.write_text(script_of(name))
    found = subprocess.run([str(NODE), "--check", str(file)], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr


@pytest.mark.skipif(NODE is None, reason="Node.js is not installed")
async def test_the_page_reads_what_is_exported(server: InLoop):
    await server.post("/v1/completions", prompt=["ab", "cd"], n=2, max_tokens=6)
    text = (await server.http.get("/metrics")).text
    found = run_script("parseMetrics", program="parseMetrics(data)", data=text)
    assert found["sums"]["vllm:generation_tokens_total"] == 24
    assert found["sums"]["vllm:request_success_total"] == 4
    buckets = found["buckets"]["vllm:inter_token_latency_seconds_bucket"]
    assert buckets[-1][1] == found["sums"]["vllm:inter_token_latency_seconds_count"] == 20


@pytest.mark.skipif(NODE is None, reason="Node.js is not installed")
def test_quantiles_are_interpolated_as_prometheus_does():
    before = [[1, 5], [2, 5], [4, 5], ["Infinity", 5]]
    now = [[1, 5], [2, 9], [4, 14], ["Infinity", 15]]  # since then 4 up to 2, 5 up to 4, 1 above
    fix = "data.map(one => one.map(([bound, count]) => [Number(bound), count]))"
    program = f"(([now, before]) => [0.2, 0.5, 0.99].map(share => quantile(share, now, before)))({fix})"
    assert run_script("quantile", program=program, data=[now, before]) == pytest.approx([1.5, 2.4, 4])
    assert run_script("quantile", program=program, data=[before, before]) == [None, None, None]
