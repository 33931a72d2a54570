"""The pages for people: `/` to try the model and watch the server, `/docs` for the API.

A page is one response, with its style and its scripts, and loads nothing from other hosts. A Content-Security-Policy
lets it run these scripts alone and call this server alone.
"""

import base64
import hashlib
from functools import lru_cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from engine.api.state import ApiState

FOLDER = Path(__file__).parent / "page"
SCRIPTS = {  # of each page, in this order; they are one script
    "index": ("common.js", "access.js", "metrics.js", "chat.js", "charts.js", "index.js"),
    "docs": ("common.js", "docs.js"),
}


async def server_page(state: ApiState, _request: Request) -> Response:
    ready = state.client.ready
    mm = ready.mm
    takes_images = mm is not None and "image" in mm.placeholders and mm.per_prompt.get("image") != 0
    return _response(
        "index",
        chats=bool(state.tokenizer.chat_source),
        generates=ready.pooling is None,
        images=takes_images,
        keys=bool(state.options.api_keys),
    )


async def docs_page(_state: ApiState, _request: Request) -> Response:
    return _response("docs")


def _response(name: str, **facts: bool) -> Response:
    html, policy = make_page(name)
    for fact, holds in facts.items():
        html = html.replace(f'data-{fact}="{fact.upper()}"', f'data-{fact}="{str(holds).lower()}"')
    return Response(
        html,
        media_type="text/html",
        headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"},
    )


@lru_cache
def make_page(name: str) -> tuple[str, str]:
    """A page and its Content-Security-Policy, from `NAME.html` in FOLDER and the page's scripts."""
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    script = "".join((FOLDER / file).read_text(encoding="utf-8") for file in SCRIPTS[name])
    html = (FOLDER / f"{name}.html").read_text(encoding="utf-8")
    html = html.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _source(text: str) -> str:
    """The source expression of an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
