"""The server's pages in a real browser: what a person does there, and what they see."""

import asyncio
import base64
import math
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from PIL import Image
from playwright.async_api import Browser, expect

from engine.api.http_options import HttpOptions
from tests.browser import needs_browser, open_browser
from tests.engine.api.page_site import TEXT, Site, ask, last, open_site
from tests.engine.media.make_images import encode

pytestmark = [needs_browser, pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("light_processes")]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with open_browser() as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def site(browser: Browser) -> AsyncIterator[Site]:
    async with open_site(browser) as opened:
        yield opened


async def test_a_chat_streams_with_the_settings_of_the_form(site: Site):
    fields = {
        "Temperature": 0.5,
        "Output tokens": len(TEXT),
        "Top-p": 0.9,
        "Top-k": 3,
        "Presence penalty": 1,
        "Seed": 7,
    }
    names = ("temperature", "max_tokens", "top_p", "top_k", "presence_penalty", "seed")
    async with site.visit() as page:
        await expect(page.get_by_role("heading", level=1)).to_have_text("fake")
        for label, value in fields.items():
            await page.get_by_label(label).fill(str(value))
        await page.get_by_label("System message").fill("Be brief.")
        site.hold_at(5)
        body = await ask(page, "Hello?")
        assert {name: body[name] for name in names} == dict(zip(names, fields.values(), strict=True))
        system, question = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}
        assert (body["model"], body["stream"], body["messages"]) == ("fake", True, [system, question])
        await expect(last(page, "user")).to_have_text("Hello?")
        await expect(last(page, "assistant")).to_have_text(re.compile(f"^{TEXT[:5]}"))
        assert await last(page, "assistant").inner_text() != TEXT, "it is shown while it is generated"
        await expect(page.get_by_label("Conversation")).to_have_attribute("aria-busy", "true")
        site.release()
        await expect(page.get_by_text(f"{len(TEXT)} output tokens")).to_be_visible()
        await expect(last(page, "assistant")).to_have_text(TEXT)
        await expect(page.get_by_text("ended by the limit of tokens")).to_be_visible()
        await expect(page.get_by_label("Conversation")).to_have_attribute("aria-busy", "false")
        assert (await ask(page, "And?"))["messages"] == [
            system, question, {"role": "assistant", "content": TEXT}, {"role": "user", "content": "And?"},
        ]  # fmt: skip
        await page.get_by_role("button", name="Clear").click()
        await expect(page.locator(".message")).to_have_count(0)
        assert (await ask(page, "Anew"))["messages"] == [system, {"role": "user", "content": "Anew"}]


async def test_stop_ends_the_request_and_keeps_what_has_arrived(site: Site):
    async with site.visit() as page:
        site.hold_at(5)
        await ask(page, "Hello?")
        await expect(last(page, "assistant")).not_to_be_empty()
        await page.get_by_role("button", name="Stop").click()
        await expect(page.get_by_text("stopped")).to_be_visible()
        await expect(page.get_by_role("button", name="Send")).to_be_visible()
        site.release()
        while not site.inner.client.total_stats.finished["abort"]:
            await asyncio.sleep(0.01)
        shown = await last(page, "assistant").inner_text()
        assert TEXT.startswith(shown.rstrip())
        answer = (await ask(page, "And?"))["messages"][1]
        assert (answer["role"], answer["content"].rstrip()) == ("assistant", shown.rstrip())


async def test_what_was_stopped_before_it_began_is_given_back(site: Site):
    async with site.visit() as page:
        site.steps.held = lambda: True
        await ask(page, "Hello?")
        await page.get_by_role("button", name="Stop").click()
        await expect(page.locator(".message")).to_have_count(0)
        await expect(page.locator("#text")).to_have_value("Hello?")
        site.release()


async def test_a_text_is_completed(site: Site):
    async with site.visit() as page:
        await page.get_by_label("Kind").select_option("Text completion")
        await page.get_by_label("Output tokens").fill(str(len(TEXT)))
        assert await page.get_by_label("System message").is_hidden()
        assert await page.get_by_text("Add images").is_hidden()
        body = await ask(page, "Once")
        assert (body["prompt"], "messages" in body) == ("Once", False)
        await expect(last(page, "assistant")).to_have_text(TEXT)


async def test_models_without_a_template_complete_texts(browser: Browser):
    async with open_site(browser, template=None) as site, site.visit() as page:
        await expect(page.get_by_text("The model has no chat template.")).to_be_visible()
        assert (await ask(page, "Once"))["prompt"] == "Once"


async def test_images_are_chosen_shown_and_sent(site: Site):
    red, blue = (encode(Image.new("RGB", (3, 2), color), "PNG") for color in ("red", "blue"))
    files: Any = [
        {"name": f"{name}.png", "mimeType": "image/png", "buffer": data}
        for name, data in (("red", red), ("blue", blue))
    ]
    async with site.visit() as page:
        await page.get_by_label("Output tokens").fill(str(len(TEXT)))
        await page.get_by_label("Add images").set_input_files(files[0])
        await page.get_by_label("Add images").set_input_files(files[1])
        await page.get_by_role("button", name="Remove red.png").click()
        image, text = (await ask(page, "What?"))["messages"][0]["content"]
        assert image["image_url"]["url"] == f"data:image/png;base64,{base64.b64encode(blue).decode()}"
        assert text == {"type": "text", "text": "What?"}
        await expect(page.get_by_role("button", name=re.compile("^Remove"))).to_have_count(0)
        assert await page.get_by_role("img", name="blue.png").evaluate("image => image.naturalWidth") == 3
        await expect(last(page, "assistant")).to_have_text(TEXT)


async def test_errors_are_shown_in_words(site: Site):
    async with site.visit(failed=1) as page:
        await page.get_by_label("Top-p").fill("5")
        await ask(page, "Hello?")
        await expect(page.get_by_role("alert")).to_contain_text("top_p")
        await expect(page.locator(".message.user")).to_have_count(0)
        await expect(page.locator("#text")).to_have_value("Hello?")
        await page.get_by_label("Top-p").fill("")
        await page.get_by_label("Seed").press_sequentially("1e")  # no number, which must not be dropped in silence
        await page.locator("#text").press("Enter")
        await expect(page.get_by_label("Seed")).to_be_focused()
        assert (await page.locator("#text").input_value(), await page.locator(".message").count()) == ("Hello?", 1)


async def test_a_server_that_is_gone_is_reported(site: Site):
    async with site.visit(failed=None) as page:
        await expect(page.get_by_role("status")).to_have_text("serving")
        await page.route(re.compile("/(metrics|health)$"), lambda route: route.abort("timedout"))
        await page.clock.install()
        await page.reload()
        await expect(page.get_by_role("status")).to_have_text("The connection to the server was lost.")
        await page.unroute_all()
        await page.clock.run_for(3000)
        await expect(page.get_by_role("status")).to_have_text("serving")


async def test_a_key_is_asked_for_and_kept_for_the_session_only(browser: Browser):
    async with open_site(browser, HttpOptions(api_keys=("right",))) as site:
        async with site.visit(failed=1) as page:
            key = page.get_by_label("This server needs an API key.")
            await expect(key).to_be_focused()
            await expect(page.get_by_role("heading", name="Try the model")).to_be_hidden()
            await expect(page.get_by_role("status")).to_have_text("serving")
            await key.fill("wrong")
            await page.keyboard.press("Enter")
            refused = page.get_by_label("The server refused this key.")
            await expect(refused).to_have_value("")
            await refused.fill("right")
            await page.get_by_role("button", name="Use this key").click()
            await ask(page, "Hello?")
            await expect(last(page, "assistant")).not_to_be_empty()
            await page.reload()
            await expect(page.get_by_role("heading", name="Try the model")).to_be_visible()
            assert await page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
            assert (await page.context.storage_state())["origins"] == []
            await page.get_by_role("button", name="Forget the API key").click()
            await expect(key).to_be_focused()
            assert await page.evaluate("sessionStorage.length") == 0
        async with site.visit() as page:
            await expect(page.get_by_label("This server needs an API key.")).to_be_visible()


def sums(text: str, name: str) -> float:
    return sum(map(float, re.findall(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE)))


def quantile(text: str, name: str, share: float) -> float:
    """As Prometheus interpolates it, over all that was counted."""
    buckets = re.findall(rf'^{name}_bucket{{.*le="([^"]+)".*}} (\S+)$', text, re.MULTILINE)
    total, low, below = float(buckets[-1][1]), 0.0, 0.0
    for bound, counted in buckets:
        if float(counted) >= share * total:
            return low + (float(bound) - low) * (share * total - below) / (float(counted) - below)
        low, below = float(bound), float(counted)
    raise AssertionError(name)


def number(value: float) -> str:
    rounded = math.floor(value + 0.5) if value >= 10 else math.floor(10 * value + 0.5) / 10
    return f"{rounded:,.1f}".removesuffix(".0")


def seconds(value: float) -> str:
    return (
        f"{number(1000 * value)} ms"
        if value < 1
        else f"{number(value) if value >= 10 else f'{value:.2f}'.rstrip('0')} s"
    )


async def test_the_charts_show_what_metrics_says(browser: Browser):
    async with open_site(browser, num_blocks=60) as site, site.visit() as page:
        await page.clock.install(time=0)
        await page.reload()
        await expect(page.get_by_role("status")).to_have_text("serving")
        await page.clock.pause_at(20)
        site.hold_at(200)
        body = {"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 90, "ignore_eos": True}
        requests = [asyncio.ensure_future(site.inner.post("/v1/chat/completions", **body)) for _ in range(6)]
        while not site.steps.held():
            await asyncio.sleep(0.01)
        chart = {
            name: page.get_by_role("img", name=re.compile(f"^{name}"))
            for name in ("Requests", "Tokens", "Time", "Inter", "Caches", "Preemptions")
        }
        for held in (True, False):
            if not held:
                site.release()
                await asyncio.gather(*requests)
            text = (await site.inner.http.get("/metrics")).text
            running, waiting = (sums(text, f"vllm:num_requests_{state}") for state in ("running", "waiting"))
            assert (running + waiting, waiting > 0) == ((6, True) if held else (0, False))
            await page.clock.run_for(2500)
            state = f"Requests: running {number(running)}, waiting {number(waiting)}"
            await expect(chart["Requests"]).to_have_attribute("aria-label", state)
            for short, name in (("Time", "time_to_first_token"), ("Inter", "inter_token_latency")):
                p50, p99 = (quantile(text, f"vllm:{name}_seconds", share) for share in (0.5, 0.99))
                label = re.compile(rf": P50 {re.escape(seconds(p50))}, P99 {re.escape(seconds(p99))}$")
                await expect(chart[short]).to_have_attribute("aria-label", label)
            hits = sums(text, "vllm:prefix_cache_hits_total") / sums(text, "vllm:prefix_cache_queries_total")
            blocks = sums(text, "vllm:kv_cache_usage_perc")
            assert (blocks > 0.5) == held
            label = f"Caches: KV blocks in use {number(100 * blocks)} %, prefix hits {number(100 * hits)} %"
            await expect(chart["Caches"]).to_have_attribute("aria-label", label)
            preempted = sums(text, "vllm:num_preemptions_total")
            label = f"Preemptions: in 30 s {number(preempted)}"
            await expect(chart["Preemptions"]).to_have_attribute("aria-label", label)
        assert preempted > 0
        for name, drawing in chart.items():
            path = await drawing.locator("path.first").get_attribute("d")
            assert path is not None
            assert re.search(r"L[\d.]+ [\d.]+", path), f"{name} has a line"


async def test_a_pointer_shows_earlier_numbers(site: Site):
    async with site.visit() as page:
        await page.clock.install()
        await page.reload()
        await expect(page.get_by_role("status")).to_have_text("serving")
        await asyncio.gather(*(site.inner.post("/v1/completions", prompt="ab", max_tokens=50) for _ in range(2)))
        tokens = page.locator(".legend .first b").nth(1)
        await expect(tokens).to_have_text("–")  # the first sample has none before it
        await page.clock.run_for(2500)
        await expect(tokens).not_to_have_text("–")
        chart = page.get_by_role("img", name=re.compile("^Tokens"))
        await chart.hover(position={"x": 5, "y": 50})  # before the first sample, which is the nearest
        await expect(tokens).to_have_text("–")
        await expect(page.get_by_text(re.compile(r"^at the line: \d+ s ago$"))).to_have_count(6)
        await page.get_by_role("heading", level=1).hover()
        await expect(tokens).not_to_have_text("–")


@pytest.mark.parametrize("path", ["/", "/docs"])
@pytest.mark.parametrize("width", [320, 390, 1280])
async def test_pages_fit_and_follow_the_system_to_dark(site: Site, path: str, width: int):
    async with site.visit(path, viewport={"width": width, "height": 800}, color_scheme="dark") as page:
        if path == "/":
            await ask(page, f"Hello {'word' * 60}")
            await expect(page.get_by_text("256 output tokens")).to_be_visible()
        else:
            await expect(page.locator("details").first).to_be_visible()
            await page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        dark = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", dark))) < 64
        await page.emulate_media(color_scheme="light")
        assert await page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


async def test_everything_has_a_name_and_can_be_reached_by_keyboard(site: Site):
    async with site.visit() as page:
        await ask(page, "Hello?")
        await expect(page.get_by_text(re.compile(r"\d output tokens"))).to_be_visible()
        tree = await page.locator("body").aria_snapshot()
        named = re.findall(r"^ *- '?(?:textbox|button|combobox|spinbutton|link|img|log)( \".+\")?", tree, re.MULTILINE)
        assert all(named), tree
        assert len(named) >= 20
        wanted = await page.evaluate(
            """() => [...document.querySelectorAll("a, button, input, select, textarea, [tabindex]")]
                 .filter(one => one.checkVisibility()).map(one => one.id || one.textContent)"""
        )
        reached = set()
        for _ in range(len(wanted) + 1):  # from the end of the page, it goes on at the beginning
            await page.keyboard.press("Tab")
            reached.add(await page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        assert set(wanted) <= reached
        assert len(wanted) >= 14
