"""Options of `redline serve` about the server: HTTP, keys, limits, processes, log and watchdog."""

import json
import re
from collections.abc import Callable
from typing import Any

import click

from cli.options import SIZE, Finite, option
from engine.api.options import Limits
from engine.config import SHUTDOWN_TIMEOUT_S, STEP_TIMEOUT_S

SERVER, LIMIT, LOG = "Server", "Limits of requests", "Log and watchdog"
LIMITS = Limits()


def split_origins(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Origins with commas between, or as a JSON list, which is how vLLM's command takes them."""
    found: list[str] = []
    for value in values:
        try:
            parts = json.loads(value) if value.lstrip().startswith("[") else value.split(",")
        except ValueError as error:
            raise click.BadParameter(f"{value!r} is neither a JSON list nor origins with commas between") from error
        found += (str(part).strip().rstrip("/") for part in parts)
    for origin in found:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise click.BadParameter(
                f"{origin!r} is no origin: write it as https://example.com or http://localhost:3000"
            )
    return tuple(dict.fromkeys(found))


def as_root_path(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    """With a slash before it and none after it; empty for none."""
    path = value.strip().strip("/")
    if re.search(r"[?#\s]|//|://", path):
        raise click.BadParameter(f"{value!r} is no path: write it as /llm")
    return f"/{path}" if path else ""


def limit(field: str, kind: click.ParamType, text: str) -> Callable[[Any], Any]:
    """The option of one of `Limits`."""
    default = getattr(LIMITS, field)
    return option(
        LIMIT, "--" + field.replace("_", "-"), type=kind, default=default, show_default=default is not None, help=text
    )


SERVER_OPTIONS = (
    option(SERVER, "--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    option(
        SERVER, "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one."
    ),
    option(
        SERVER,
        "--served-model-name",
        multiple=True,
        several=True,
        metavar="NAME…",
        help="Names of the model for clients; answers show the first [default: as given].",
    ),
    option(
        SERVER,
        "--api-key",
        "api_keys",
        multiple=True,
        several=True,
        metavar="KEY",
        help="Key that clients must send as a bearer token; may be repeated. Others see it in the list of processes.",
    ),
    option(SERVER, "--api-key-file", metavar="FILE", help="Keys, one a line; REDLINE_API_KEY has them with commas."),
    option(
        SERVER,
        "--allowed-origins",
        multiple=True,
        several=True,
        metavar="ORIGIN,…",
        callback=split_origins,
        help="Origins of web pages that may call the server, * for all [default: none].",
    ),
    option(SERVER, "--ssl-certfile", metavar="FILE", help="Certificate, in PEM, with those of its issuers: for HTTPS."),
    option(SERVER, "--ssl-keyfile", metavar="FILE", help="The certificate's key [default: in the certificate's file]."),
    option(
        SERVER,
        "--root-path",
        default="",
        metavar="PATH",
        callback=as_root_path,
        help="Path under which a proxy shows the server, e.g. /llm.",
    ),
    option(
        SERVER,
        "--enable-runtime-lora",
        "runtime_lora",
        is_flag=True,
        help="Let clients load and unload adapters, from any folder that the server can read.",
    ),
    option(
        SERVER,
        "--trust-request-chat-template",
        is_flag=True,
        help="Run the chat templates that requests bring along: programs, which may never end.",
    ),
    option(
        SERVER,
        "--shutdown-timeout",
        default=SHUTDOWN_TIMEOUT_S,
        show_default=True,
        type=Finite(0),
        metavar="SECONDS",
        help="After SIGTERM or Ctrl-C running requests have so long to end; the rest is aborted.",
    ),
    option(
        SERVER,
        "-asc",
        "--api-servers",
        "--api-server-count",
        "api_servers",
        default=1,
        show_default=True,
        type=click.IntRange(1, 64),
        help="API processes in front of the one engine.",
    ),
    limit("max_body_bytes", SIZE, "Bytes of a request's body, e.g. 32MiB."),
    limit("max_body_values", SIZE, "JSON values in a body; a list or an object counts as eight."),
    limit("max_prompts", click.IntRange(1), "Prompts in one body."),
    limit("max_prompt_bytes", SIZE, "Bytes of a prompt's text [default: --max-model-len times the longest token]."),
    limit("max_n", click.IntRange(1, LIMITS.max_n), "Outputs for one prompt."),
    limit("max_stop", click.IntRange(1, LIMITS.max_stop), "Stop strings of a request."),
    limit("max_stop_token_ids", click.IntRange(0), "Stop token ids of a request."),
    limit("max_queue", click.IntRange(0), "Requests that wait; more are answered with 503 [default: no limit]."),
    option(LOG, "--disable-log-stats", is_flag=True, help="No line of figures every 10 s of traffic."),
    option(
        LOG,
        "--enable-log-requests/--disable-log-requests",
        " /--no-enable-log-requests",
        "log_requests",
        default=True,
        show_default=True,
        help="A line of JSON for each request that ended.",
    ),
    option(
        LOG,
        "--step-timeout",
        default=STEP_TIMEOUT_S,
        show_default=True,
        type=Finite(0),
        metavar="SECONDS",
        help="A step that takes longer is named, with all stacks; after as long again the server ends. 0: never.",
    ),
)
