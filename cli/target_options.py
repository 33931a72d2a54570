"""Options of `redline bench` about the target: which server is measured, and how requests are sent to it."""

from dataclasses import replace
from typing import Any

import click
from click.core import ParameterSource

from bench.target import Target
from cli.options import JsonObject, option

TARGET, REQUESTS = "Target", "Requests"


class HeaderType(click.ParamType):
    """NAME: VALUE -> (name, value)."""

    name = "name: value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, colon, text = value.partition(":")
        if not colon or not name.strip():
            self.fail("a header must have the form 'Name: value'", param, ctx)
        return name.strip(), text.strip()


TARGET_OPTIONS = (
    option(
        TARGET, "--url", default="http://127.0.0.1:8000", metavar="URL",
        help="Address of the server to measure, with or without /v1.",
    ),
    option(
        TARGET, "--model", metavar="MODEL",
        help="Start a Redline server for this model, measure it, and stop it. Together with --url, the server runs "
        "already, and this is the model name to request.",
    ),
    option(
        TARGET, "--served-model", "--model-name", "served_model", metavar="NAME",
        default_text="the first that the server lists",
        help="Model name to request. Set it if the server lists several models or none.",
    ),
    option(TARGET, "--api-key", envvar="REDLINE_API_KEY", metavar="KEY", help="API key to send as a bearer token."),
    option(
        TARGET, "--ca", metavar="PATH", default_text="the system's",
        help="CA certificates to trust, as a PEM file or a folder. Set it for a server with a private certificate "
        "authority.",
    ),
    option(TARGET, "--insecure", is_flag=True, help="Skip the verification of the server's TLS certificate."),
    option(
        REQUESTS, "-H", "--header", "headers", type=HeaderType(), multiple=True, metavar="'NAME: VALUE'",
        help="Header to send with every request. May be repeated.",
    ),
    option(
        REQUESTS, "--extra-body", type=JsonObject(), metavar="JSON",
        help="Fields to add to every request, such as '{\"top_k\": 1}'. The value null removes a field that is sent by "
        "default.",
    ),
    option(
        REQUESTS, "--ignore-eos/--no-ignore-eos", default=True,
        help="Send ignore_eos, so that outputs have exactly the requested length. Switch it off for servers that "
        "reject the field.",
    ),
    option(
        REQUESTS, "--stream-options/--no-stream-options", default=True,
        help="Send stream_options, so that the server reports token counts. Switch it off for servers that reject the "
        "field.",
    ),
)  # fmt: skip


def check_target(ctx: click.Context, params: dict[str, Any]) -> None:
    """Resolve the two meanings of --model, in `params`; raises UsageError for flags that contradict each other."""
    running = ctx.get_parameter_source("url") is ParameterSource.COMMANDLINE
    if params["serve_flags"] and (params["model"] is None or running):
        raise click.UsageError(
            f"{params['serve_flags'][0]!r}: server flags need --model without --url, so that a server is started"
        )
    if running and params["model"] is not None:
        if params["served_model"] not in (None, params["model"]):
            raise click.UsageError(
                "with --url, --model is the model name to request: use either --model or --served-model"
            )
        params["served_model"], params["model"] = params["model"], None
    if params["insecure"] and params["ca"] is not None:
        raise click.UsageError("use --ca or --insecure, not both")


def target_of(params: dict[str, Any], url: str | None = None) -> Target:
    """The target that the flags describe; `url`, of a server started for this run, replaces --url."""
    target = Target(
        params["url"] if url is None else url,
        params["served_model"] or "",
        params["api_key"],
        params["headers"],
        params["ca"],
        params["insecure"],
        params["extra_body"] or {},
        params["ignore_eos"],
        params["stream_options"],
    )
    # The certificate of a server started here is named by that server's flags and may be for any host.
    return replace(target, insecure=True) if url is not None and target.is_tls and target.ca is None else target
