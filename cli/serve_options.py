"""Options of `redline serve` for the server: HTTP, keys, limits, processes, log and watchdog."""

import json
import re
from collections.abc import Callable
from typing import Any

import click

from cli.options import SIZE, Finite, option
from engine.api.http_options import Limits
from engine.config import SHUTDOWN_TIMEOUT_S, STEP_TIMEOUT_S

SERVER, LIMIT, LOG = "Server", "Limits of requests", "Log and watchdog"
LIMITS = Limits()


def split_origins(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Parse origins: separated by commas, or a JSON list as in vLLM."""
    found: list[str] = []
    for value in values:
        try:
            parts = json.loads(value) if value.lstrip().startswith("[") else value.split(",")
        except ValueError as error:
            raise click.BadParameter(
                f"{value!r} is neither a JSON list nor a comma-separated list of origins"
            ) from error
        found += (str(part).strip().rstrip("/") for part in parts)
    for origin in found:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise click.BadParameter(
                f"{origin!r} is not a valid origin: write it as https://example.com or http://localhost:3000"
            )
    return tuple(dict.fromkeys(found))


def as_root_path(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    """Normalize a path to one leading slash and no trailing slash; empty for no path."""
    path = value.strip().strip("/")
    if re.search(r"[?#\s]|//|://", path):
        raise click.BadParameter(f"{value!r} is not a valid path: write it as /llm")
    return f"/{path}" if path else ""


def limit(field: str, kind: click.ParamType, text: str) -> Callable[[Any], Any]:
    """The option for one field of `Limits`."""
    default = getattr(LIMITS, field)
    return option(
        LIMIT, "--" + field.replace("_", "-"), type=kind, default=default, show_default=default is not None, help=text
    )


SERVER_OPTIONS = (
    option(
        SERVER,
        "--host",
        default="127.0.0.1",
        show_default=True,
        help="Address to listen on; 0.0.0.0 serves other machines too.",
    ),
    option(
        SERVER,
        "--port",
        default=8000,
        show_default=True,
        type=click.IntRange(0, 65535),
        help="Port to listen on; 0 takes a free one.",
    ),
    option(
        SERVER,
        "--served-model-name",
        multiple=True,
        several=True,
        metavar="NAME…",
        help="Names that clients may use for the model; responses show the first [default: MODEL as given].",
    ),
    option(
        SERVER,
        "--api-key",
        "api_keys",
        multiple=True,
        several=True,
        metavar="KEY",
        help="Key that clients must send as a bearer token; may be repeated. Other users see it in the process list: "
        "prefer --api-key-file.",
    ),
    option(
        SERVER,
        "--api-key-file",
        metavar="FILE",
        help="File of API keys, one per line. The variable REDLINE_API_KEY holds keys separated by commas.",
    ),
    option(
        SERVER,
        "--allowed-origins",
        multiple=True,
        several=True,
        metavar="ORIGIN,…",
        callback=split_origins,
        help="Origins of web pages that may call the server (CORS); * for all [default: none].",
    ),
    option(SERVER, "--ssl-certfile", metavar="FILE", help="Certificate chain in PEM; enables HTTPS."),
    option(SERVER, "--ssl-keyfile", metavar="FILE", help="Private key in PEM [default: in the certificate's file]."),
    option(
        SERVER,
        "--root-path",
        default="",
        metavar="PATH",
        callback=as_root_path,
        help="Path under which a reverse proxy publishes the server, e.g. /llm.",
    ),
    option(
        SERVER,
        "--enable-runtime-lora",
        "runtime_lora",
        is_flag=True,
        help="Allow clients to load and unload LoRA adapters, from any folder that the server can read.",
    ),
    option(
        SERVER,
        "--trust-request-chat-template",
        is_flag=True,
        help="Run chat templates sent in requests. Templates are programs and may run forever.",
    ),
    option(
        SERVER,
        "--shutdown-timeout",
        default=SHUTDOWN_TIMEOUT_S,
        show_default=True,
        type=Finite(0),
        metavar="SECONDS",
        help="Time for running requests to finish after SIGTERM or Ctrl-C; the rest is aborted.",
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
        help="Number of API processes (HTTP, tokenizing). Raise it if one API process uses a full core.",
    ),
    limit("max_body_bytes", SIZE, "Largest request body in bytes, e.g. 32MiB."),
    limit("max_body_values", SIZE, "Most JSON values in a body; a list or an object counts as eight."),
    limit("max_prompts", click.IntRange(1), "Most prompts in one body."),
    limit("max_prompt_bytes", SIZE, "Longest prompt text in bytes [default: --max-model-len times the longest token]."),
    limit("max_n", click.IntRange(1, LIMITS.max_n), "Most outputs (n) per prompt."),
    limit("max_stop", click.IntRange(1, LIMITS.max_stop), "Most stop strings per request."),
    limit("max_stop_token_ids", click.IntRange(0), "Most stop token ids per request."),
    limit(
        "max_queue",
        click.IntRange(0),
        "Longest queue; further requests are answered with 503 instead of waiting [default: no limit].",
    ),
    option(LOG, "--disable-log-stats", is_flag=True, help="Do not log throughput and queue length every 10 s."),
    option(
        LOG,
        "--enable-log-requests/--disable-log-requests",
        " /--no-enable-log-requests",
        "log_requests",
        default=True,
        show_default=True,
        help="Log one JSON line for each finished output.",
    ),
    option(
        LOG,
        "--step-timeout",
        default=STEP_TIMEOUT_S,
        show_default=True,
        type=Finite(0),
        metavar="SECONDS",
        help="Watchdog: a step that takes longer is reported with the stacks of all threads; after twice the time the "
        "server ends. 0 disables the watchdog.",
    ),
)
