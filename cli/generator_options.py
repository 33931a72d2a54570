"""Options of `redline bench` and `redline sweep` about load generators on other hosts, and of addresses in general."""

import contextlib
import re
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import Finite, option

if TYPE_CHECKING:
    from bench.generators import Generators

GENERATORS = "Load generators"
TOKEN_FLAG = "--generator-token-file"
SYSTEM = "system"

Address = tuple[str, int]


class AddressType(click.ParamType):
    """HOST:PORT, or [IPV6]:PORT -> (host, port).

    Args:
        least_port: 0 if a free port may be asked for.
    """

    name = "host:port"

    def __init__(self, least_port: int = 1):
        self._least_port = least_port

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Address:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/@\[\]]+)):(\d{1,5})", value.strip())
        if match is None or not self._least_port <= int(match[3]) <= 65535:
            self.fail(f"{value!r} is not an address: use HOST:PORT, such as 10.0.0.5:7070", param, ctx)
        return match[1] or match[2], int(match[3])


class AddressesType(click.ParamType):
    """HOST:PORT,HOST:PORT -> [(host, port), …]."""

    name = "host:port,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Address]:
        if not isinstance(value, str):
            return value
        found = [AddressType().convert(part, param, ctx) for part in value.split(",")]
        for address in found:
            if found.count(address) > 1:
                self.fail(f"{address[0]}:{address[1]} is named twice", param, ctx)
        return found


GENERATOR_OPTIONS = (
    option(
        GENERATORS, "--generators", type=AddressesType(), metavar="HOST:PORT,…",
        help="Hosts that send the load; `redline generate` runs on each. They divide the requests of the same "
        "schedule, and their records are merged.",
    ),
    option(
        GENERATORS, TOKEN_FLAG, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
        help="File with the token of the generators. The environment variable REDLINE_GENERATOR_TOKEN may hold it "
        "instead.",
    ),
    option(
        GENERATORS, "--generator-ca", metavar="FILE",
        help="Connect to the generators with TLS, and trust these CA certificates in PEM format; `system` means those "
        "of the system.",
    ),
    option(
        GENERATORS, "--generator-timeout", type=Finite(0, 1e5), metavar="SECONDS", default_text="30",
        help="How long the run waits for a generator that cannot be reached: it may be starting, or start again.",
    ),
)  # fmt: skip


def generators_of(
    params: Mapping[str, Any], seed: int, show: Callable[[str], None]
) -> "Generators | contextlib.nullcontext[None]":
    """The generators that the flags name, connected; None without any. Raises BenchError, or UsageError.

    Args:
        params: the command's parameters.
        seed: of the run.
        show: called with lines about generators that cannot be reached, also later; from several threads.
    """
    if not params["generators"]:
        for name in ("generator_token_file", "generator_ca", "generator_timeout"):
            if params[name] is not None:
                raise click.UsageError(f"--{name.replace('_', '-')} needs --generators")
        return contextlib.nullcontext(None)
    from bench.generators import WAIT_LIMIT_S, Generators, Waiting
    from bench.generators.handshake import read_token

    token = read_token(params["generator_token_file"], TOKEN_FLAG)
    limit_s = params["generator_timeout"]
    waiting = Waiting(WAIT_LIMIT_S if limit_s is None else limit_s, show)
    generators = Generators(params["generators"], token, _tls(params["generator_ca"]), seed, waiting)
    try:
        generators.connect()
    except BaseException:
        generators.close()
        raise
    return generators


def _tls(ca: str | None) -> ssl.SSLContext | None:
    from bench.target.tls import tls_context

    if ca is None:
        return None
    return tls_context() if ca == SYSTEM else tls_context(ca, flag="--generator-ca")
