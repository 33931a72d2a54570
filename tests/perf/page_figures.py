"""`make page-figures`: pictures of the server's page and of the dashboard, from servers under load: docs/figures.

A server with two replicas gets two kinds of load for five minutes, from `redline bench`. Meanwhile its page is open in
a browser, at the widths of a desktop and of a phone, where a question about a picture is asked. A second server, with a
prefill and a decode replica, gets a light load of its own. The dashboard's queries about both servers are answered by
Prometheus; its figure is left out where Prometheus is not installed.
"""

import asyncio
import io
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from PIL import Image
from playwright.async_api import Browser, Page
from rich.console import Console

from bench.results.environment import hardware
from plots.style import WIDTH_IN
from tests.browser import BROWSER, open_browser
from tests.perf.dashboard_figure import dashboard_figure
from tests.perf.prometheus import Prometheus, prometheus, read_panels
from tests.serving import serve
from training.pictures import load

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "figures"
MODEL = "smollm2-135m-vision"
SIZES = ("--max-num-seqs", "8", "--max-model-len", "1024", "--kv-cache-memory-bytes", "64MiB")
FLAGS = ("--dp", "2", *SIZES, "--speculative", "ngram", "--kv-spill", "host=32MiB,disk=kv:1GiB")
OTHER_MODEL = "smollm2-135m"
OTHER_FLAGS = ("--prefill-replicas", "1", "--decode-replicas", "1", *SIZES)
OTHER_LOAD = ("--workload", "shared-prefix", "--rate", "0.3")
UNENDING = {"--concurrency": ("--num-requests", "10000"), "--rate": ("--window", "3600", "--max-minutes", "120")}
LOADS = (  # seconds, flags of `redline bench`
    (100, ("--workload", "shared-prefix", "--concurrency", "6")),
    (130, ("--workload", "visionarena-sample", "--concurrency", "24")),
    (60, ("--workload", "shared-prefix", "--concurrency", "12")),
)
IDLE_S = 10  # before the first load
CHAT_S = 60  # before the end: when a question is asked
QUESTION = "What color is the shape in the picture?"
VIEWS = {  # of each picture: width and height, pixels of the screen for one of the page, color scheme
    "page-wide": (1280, 900, 1, "light"),
    "page-phone": (390, 844, 2, "light"),
    "page-dark": (1280, 900, 1, "dark"),
}
DASHBOARD_PIXELS = 1600  # width
BETWEEN = 24  # pixels of the screen between the halves of the phone's page


def main() -> None:
    if BROWSER is None:
        raise SystemExit("no browser is installed: apt-get install chromium")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        flags = [flag.replace("disk=", f"disk={folder}/") for flag in FLAGS]
        url = stack.enter_context(serve(folder, MODEL, *flags)).url
        other = stack.enter_context(serve(folder, OTHER_MODEL, *OTHER_FLAGS)).url
        found = shutil.which("prometheus") and stack.enter_context(prometheus(folder, url, other))
        start = time.time()
        asyncio.run(take_pictures(url, other, folder))
        if isinstance(found, Prometheus):
            draw_dashboard(found, start, time.time())
        else:
            Console().print("no dashboard: Prometheus is not installed")


async def take_pictures(url: str, other: str, folder: Path) -> None:
    async with open_browser() as browser:
        pages = {name: await open_page(browser, url, *view) for name, view in VIEWS.items()}
        await asyncio.sleep(IDLE_S)
        seconds = sum(seconds for seconds, _ in LOADS)
        loading = asyncio.gather(
            put_load(url, folder / "page", LOADS), put_load(other, folder / "other", [(seconds, OTHER_LOAD)])
        )
        await asyncio.sleep(seconds - CHAT_S)
        for page in pages.values():
            await ask(page)
        await asyncio.wait([loading], timeout=CHAT_S / 2)
        for name, page in pages.items():
            await page.evaluate("document.activeElement.blur()")
            picture = Image.open(io.BytesIO(await page.screenshot(full_page=True))).convert("RGB")
            half = await page.locator("#charts-title").evaluate("heading => heading.offsetTop - 20")
            save_picture(picture if name != "page-phone" else halves(picture, half * VIEWS[name][2]), name)
        await loading


def halves(picture: Image.Image, at: int) -> Image.Image:
    """The upper and the lower part of a long picture, side by side."""
    parts = picture.crop((0, 0, picture.width, at)), picture.crop((0, at, picture.width, picture.height))
    both = Image.new("RGB", (2 * picture.width + BETWEEN, max(part.height for part in parts)), "#e5e7eb")
    for number, part in enumerate(parts):
        both.paste(
            "white",
            (number * (picture.width + BETWEEN), 0, number * (picture.width + BETWEEN) + picture.width, both.height),
        )
        both.paste(part, (number * (picture.width + BETWEEN), 0))
    return both


def save_picture(picture: Image.Image, name: str) -> None:
    """Write a picture with 256 colors, which take a third of the bytes."""
    colors = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    colors.save(FIGURES / f"{name}.png", optimize=True)
    Console().print(f"docs/figures/{name}.png")


async def open_page(browser: Browser, url: str, width: int, height: int, scale: int, scheme: str) -> Page:
    assert scheme in ("light", "dark")
    context = await browser.new_context(
        viewport={"width": width, "height": height}, device_scale_factor=scale, color_scheme=scheme
    )
    page = await context.new_page()
    await page.goto(url)
    return page


async def ask(page: Page) -> None:
    """Ask a question about a picture that the model has not seen in training."""
    await page.get_by_label("Add images").set_input_files(load("test").files[7])
    await page.locator("#text").fill(QUESTION)
    await page.keyboard.press("Enter")
    await page.get_by_text(re.compile(r"\d output tokens")).wait_for(timeout=CHAT_S * 1000)


async def put_load(url: str, folder: Path, loads: Sequence[tuple[float, Sequence[str]]]) -> None:
    """All loads of a server, one after another; each is ended by Ctrl-C."""
    for number, (seconds, flags) in enumerate(loads):
        command = [sys.executable, "-m", "cli.main", "bench", "--url", url, *flags]
        more = [word for name, words in UNENDING.items() if name in flags for word in words]
        process = await asyncio.create_subprocess_exec(
            *command, *more, "--out", str(folder / f"load-{number}"), stdout=asyncio.subprocess.DEVNULL
        )
        try:
            await asyncio.wait_for(process.wait(), seconds)
        except TimeoutError:
            process.send_signal(signal.SIGINT)
            await process.wait()
        else:
            raise SystemExit(f"redline bench ended by itself with status {process.returncode}")


def draw_dashboard(server: Prometheus, start: float, end: float) -> None:
    panels = read_panels()
    lines = {
        panel["id"]: [line for target in panel["targets"] for line in server.lines(target, start, end)]
        for panel in panels
        if panel["type"] != "row"
    }
    machine = hardware()
    facts = (
        f"redline serve {MODEL} {' '.join(FLAGS)}",
        *(f"Load: redline bench {' '.join(flags)} for {seconds} s" for seconds, flags in LOADS),
        f"Beside it: redline serve {OTHER_MODEL} {' '.join(OTHER_FLAGS)}",
        f"Its load: redline bench {' '.join(OTHER_LOAD)}",
        f"Hardware: {machine['cpu']}, cores: {machine['cores']}",
        f"Drawn from the answers of Prometheus {server.version} to the queries of all panels, not by Grafana",
    )
    figure = dashboard_figure(panels, lines, (start, end), facts)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DASHBOARD_PIXELS / WIDTH_IN)
    save_picture(Image.open(drawn).convert("RGB"), "dashboard")
    empty = [panel["title"] for panel in panels if panel["type"] != "row" and not lines[panel["id"]]]
    Console().print(f"panels without data: {', '.join(empty) or 'none'}")


if __name__ == "__main__":
    main()
