"""Flags of `redline bench` that say which server is measured and how it is asked."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click
from click.core import ParameterSource

from bench.loadgen import Target


class HeaderType(click.ParamType):
    """NAME: VALUE -> (name, value)."""

    name = "name: value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, colon, text = value.partition(":")
        if not colon or not name.strip():
            self.fail("a header field is given as 'Name: value'", param, ctx)
        return name.strip(), text.strip()


class JsonObject(click.ParamType):
    """A JSON object."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        try:
            data = json.loads(value)
        except (ValueError, RecursionError) as error:
            self.fail(f"{value[:80]!r} is not JSON: {error}", param, ctx)
        if not isinstance(data, dict):
            self.fail(f"{value[:80]!r} is not a JSON object such as '{{\"top_k\": 1}}'", param, ctx)
        return data


_OPTIONS = (
    click.option(
        "--url", default="http://127.0.0.1:8000", show_default=True, help="The server to load; with or without /v1."
    ),
    click.option(
        "--model",
        help="Start a Redline server for this model instead; its flags follow after --. With --url: the model to ask "
        "for.",
    ),
    click.option(
        "--served-model", "--model-name", "served_model",
        help="The model to ask for, if the server has several or no list.",
    ),
    click.option("--api-key", envvar="REDLINE_API_KEY", help="Key of the server.  [env var: REDLINE_API_KEY]"),
    click.option(
        "-H", "--header", "headers", type=HeaderType(), multiple=True, metavar="'NAME: VALUE'",
        help="Send this header field with every request; may be repeated.",
    ),
    click.option("--ca", metavar="FILE", help="Certificates to trust (PEM file or folder) instead of the system's."),
    click.option("--insecure", is_flag=True, help="Trust any certificate of the server."),
    click.option(
        "--extra-body", type=JsonObject(), metavar="JSON",
        help="More fields of each request, e.g. '{\"top_k\": 1}'; null leaves one out that is sent otherwise.",
    ),
    click.option(
        "--ignore-eos/--no-ignore-eos", default=True, show_default=True,
        help="Ask for exactly the length; a server that refuses ignore_eos needs --no-ignore-eos.",
    ),
    click.option(
        "--stream-options/--no-stream-options", default=True, show_default=True,
        help="Ask the server to count tokens; one that refuses stream_options needs --no-stream-options.",
    ),
)  # fmt: skip


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add these flags to a command, in this order."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def check_target(ctx: click.Context, given: dict[str, Any]) -> None:
    """Settle what --model means, in `given`; raises UsageError for flags that contradict each other."""
    running = ctx.get_parameter_source("url") is ParameterSource.COMMANDLINE
    if given["serve_flags"] and (given["model"] is None or running):
        raise click.UsageError(
            f"{given['serve_flags'][0]!r}: flags of a server need --model without --url, which starts one"
        )
    if running and given["model"] is not None:
        if given["served_model"] not in (None, given["model"]):
            raise click.UsageError("with --url, --model is the model to ask for: give either it or --served-model")
        given["served_model"], given["model"] = given["model"], None
    if given["insecure"] and given["ca"] is not None:
        raise click.UsageError("give either --ca or --insecure")


def target_of(given: dict[str, Any], url: str | None = None) -> Target:
    """The target of the flags; `url` of a server that was started here stands in for --url."""
    target = Target(
        given["url"] if url is None else url,
        given["served_model"] or "",
        given["api_key"],
        given["headers"],
        given["ca"],
        given["insecure"],
        given["extra_body"] or {},
        given["ignore_eos"],
        given["stream_options"],
    )
    # A server started here has the certificate that its own flags name, for whatever host.
    return replace(target, insecure=True) if url is not None and target.is_tls and target.ca is None else target
