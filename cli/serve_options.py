"""Options of `redline serve` for the server: HTTP, keys, limits, processes, log and watchdog."""

import json
import re
from collections.abc import Callable
from typing import Any

import click

from cli.options import SIZE, Finite, option
from engine.api.http_options import MEDIA_BODY, TEXT_BODY, Limits
from engine.config import SHUTDOWN_TIMEOUT_S, STEP_TIMEOUT_S
from engine.frontend.parsing.names import AUTO, NONE, REASONING_PARSERS, TOOL_PARSERS
from engine.log_format import FORMATS

SERVER, ACCESS, LIMIT, LOG = "Server", "Access", "Request limits", "Log and watchdog"
ANSWERS = "Tool calls and reasoning"
TOOL_NAMES, REASONING_NAMES = ", ".join(TOOL_PARSERS), ", ".join(REASONING_PARSERS)
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


def limit(
    field: str, kind: click.ParamType, text: str, metavar: str = "N", default_text: str = ""
) -> Callable[[Any], Any]:
    """The option for one field of `Limits`."""
    name, default = "--" + field.replace("_", "-"), getattr(LIMITS, field)
    return option(LIMIT, name, type=kind, metavar=metavar, default=default, default_text=default_text, help=text)


SERVER_OPTIONS = (
    option(
        SERVER, "--host", default="127.0.0.1", metavar="ADDRESS",
        help="Address to listen on. Use 0.0.0.0 to serve other machines.",
    ),
    option(
        SERVER, "--port", default=8000, type=click.IntRange(0, 65535), metavar="PORT",
        help="Port to listen on. With 0, the system chooses a free port, which the server prints.",
    ),
    option(
        SERVER, "--served-model-name", multiple=True, several=True, metavar="NAME…", default_text="MODEL as given",
        help="Names that clients may use for the model. Responses show the first name.",
    ),
    option(
        SERVER, "--root-path", default="", metavar="PATH", default_text="none", callback=as_root_path,
        help="Path under which a reverse proxy publishes the server, such as /llm.",
    ),
    option(
        SERVER, "-asc", "--api-servers", "--api-server-count", "api_servers", default=1, type=click.IntRange(1, 64),
        metavar="N",
        help="Number of API processes, which do HTTP and tokenization, up to 64. Raise it if one API process uses a "
        "full core.",
    ),
    option(
        SERVER, "--shutdown-timeout", default=SHUTDOWN_TIMEOUT_S, type=Finite(0), metavar="SECONDS",
        help="Time for running requests to finish after SIGTERM or Ctrl-C. Requests that take longer are aborted.",
    ),
    option(
        SERVER, "--page/--no-page", default=True,
        help="Serve a page at / to try the model and watch the server, and the API's documentation at /docs.",
    ),
    option(
        SERVER, "--restart-on-failure", type=click.IntRange(0, 100), metavar="COUNT",
        default_text="5 for several replicas, 0 for one",
        help="Restart an engine that ended by itself, up to COUNT times within 10 minutes for each replica. Its "
        "running requests fail with the cause. With 0, a replica stays down, and the server exits with the last one.",
    ),
    option(
        ACCESS, "--api-key", "api_keys", multiple=True, several=True, metavar="KEY…", default_text="none",
        help="API keys. Clients must send one of them as a bearer token. Other users of this machine can see the keys "
        "in the process list; --api-key-file avoids that.",
    ),
    option(
        ACCESS, "--api-key-file", metavar="FILE", default_text="none",
        help="File of API keys, one per line. The environment variable REDLINE_API_KEY may hold keys too, separated by "
        "commas.",
    ),
    option(
        ACCESS, "--allowed-origins", multiple=True, several=True, metavar="ORIGIN,…", default_text="none",
        callback=split_origins,
        help="Origins of web pages that may call the server from a browser (CORS), such as https://example.com. Use * "
        "for all origins.",
    ),
    option(
        ACCESS, "--ssl-certfile", metavar="FILE", default_text="none",
        help="Certificate chain in PEM format. With a certificate, the server uses HTTPS.",
    ),
    option(
        ACCESS, "--ssl-keyfile", metavar="FILE", default_text="in the certificate's file",
        help="Private key of the certificate in PEM format, without a password.",
    ),
    option(
        ACCESS, "--enable-runtime-lora", "runtime_lora", is_flag=True,
        help="Let clients load and unload LoRA adapters, from any folder that the server can read.",
    ),
    option(
        ACCESS, "--trust-request-chat-template", is_flag=True,
        help="Run chat templates that clients send with requests. A template is a program that may run forever, so use "
        "this only if all clients are trusted.",
    ),
    option(
        ANSWERS, "--tool-call-parser", default=AUTO, type=click.Choice((AUTO, NONE, *TOOL_PARSERS)), metavar="NAME",
        help=f"Form in which the model writes tool calls: {TOOL_NAMES} or none. Use auto to read it from the chat "
        "template.",
    ),
    option(
        ANSWERS, "--reasoning-parser", default=AUTO, type=click.Choice((AUTO, NONE, *REASONING_PARSERS)),
        metavar="NAME",
        help=f"Form in which the model writes reasoning: {REASONING_NAMES} or none. Use auto to read it from the chat "
        "template.",
    ),
    limit(
        "max_body_bytes", SIZE, "Maximum size of a request body.", "SIZE",
        f"{TEXT_BODY >> 20}MiB, or {MEDIA_BODY >> 20}MiB if the model takes images, audio or video",
    ),
    limit(
        "max_body_values", SIZE,
        "Maximum number of JSON values in a request body. A list or an object counts as eight values. Decoding a body "
        "pauses all streams of its API process; this limit bounds the pause.",
    ),
    limit("max_prompts", click.IntRange(1), "Maximum number of prompts in a request body."),
    limit(
        "max_prompt_bytes", SIZE,
        "Maximum size of the text of a prompt, checked before it is tokenized.",
        "SIZE", "--max-model-len times the longest token",
    ),
    limit("max_n", click.IntRange(1, LIMITS.max_n), f"Maximum number of outputs (n) per prompt, up to {LIMITS.max_n}."),
    limit(
        "max_stop", click.IntRange(1, LIMITS.max_stop),
        f"Maximum number of stop strings per request, up to {LIMITS.max_stop}.",
    ),
    limit("max_stop_token_ids", click.IntRange(0), "Maximum number of stop token ids per request."),
    limit(
        "max_queue", click.IntRange(0),
        "Maximum number of waiting requests. Further requests are refused with HTTP 503. Set it so that clients get an "
        "early error under overload instead of a long wait.",
        default_text="no limit",
    ),
    limit(
        "max_requests_per_key", click.IntRange(1),
        "Maximum number of requests that one API key may have at once. Further requests are refused with HTTP 429.",
        default_text="no limit",
    ),
    limit(
        "max_stored_responses", click.IntRange(0),
        "Maximum number of responses of /v1/responses that each API process keeps in memory. Those that were not used "
        "for the longest time are evicted. With 0, none is kept.",
    ),
    limit("max_stored_bytes", SIZE, "Maximum size of these responses with their conversations.", "SIZE", "64MiB"),
    limit(
        "request_timeout", Finite(0, min_open=True),
        "Time from the arrival of a request to the end of its answer. Requests that take longer end with an error.",
        "SECONDS", "no limit",
    ),
    option(
        LOG, "--disable-log-stats", is_flag=True,
        help="Do not log throughput, queue length and KV cache utilization every 10 s.",
    ),
    option(
        LOG, "--enable-log-requests/--disable-log-requests", " /--no-enable-log-requests", "log_requests", default=True,
        help="Log one line of JSON for each finished output. Prompts and outputs are not logged.",
    ),
    option(
        LOG, "--log-format", default="text", type=click.Choice(FORMATS), metavar="FORMAT",
        help="Format of the log: text, or json for one JSON object per line, from all processes.",
    ),
    option(
        LOG, "--otlp-traces-endpoint", metavar="URL", default_text="none",
        help="Send an OpenTelemetry trace of each request to this collector, by OTLP over HTTP, such as "
        "http://localhost:4318/v1/traces. Needs the extra `tracing`.",
    ),
    option(
        LOG, "--step-timeout", default=STEP_TIMEOUT_S, type=Finite(0), metavar="SECONDS",
        help="Time after which the watchdog reports a step as hanging: /health answers 503, and the stacks of all "
        "threads are logged. After twice that time the server exits. Raise it if a single step may take that long. 0 "
        "disables the watchdog.",
    ),
)  # fmt: skip
