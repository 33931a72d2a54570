"""`redline generate`: generates load on this host for runs of `redline bench` and `redline sweep` on another one."""

import signal
import time
from pathlib import Path

import click

from cli.generator_options import Address, AddressType
from cli.options import GroupedCommand, option, with_options
from engine.signals import EndSignal

GENERATE_OPTIONS = (
    option(
        "Options", "--listen", type=AddressType(least_port=0), default="127.0.0.1:7070", metavar="HOST:PORT",
        help="Address to listen on, such as 0.0.0.0:7070 for all IPv4 addresses of this host. Port 0 is a free one.",
    ),
    option(
        "Options", "--token-file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
        help="File with the token that runs must have, of at least 16 bytes. The environment variable "
        "REDLINE_GENERATOR_TOKEN may hold it instead.",
    ),
    option(
        "Options", "--ssl-certfile", metavar="FILE", default_text="none",
        help="Certificate chain in PEM format. With a certificate, connections of runs use TLS.",
    ),
    option(
        "Options", "--ssl-keyfile", metavar="FILE", default_text="in the certificate's file",
        help="Private key of the certificate in PEM format, without a password.",
    ),
)  # fmt: skip


@click.command(name="generate", cls=GroupedCommand)
@with_options(*GENERATE_OPTIONS)
def command(listen: Address, token_file: Path | None, ssl_certfile: str | None, ssl_keyfile: str | None) -> None:
    """Generate load for runs on other hosts, until Ctrl-C.

    Start it on each host that shall send load, with the same token, and name the hosts in the run:

    \b
      redline generate --listen 0.0.0.0:7070 --token-file token
      redline bench --generators host1:7070,host2:7070 \\
        --generator-token-file token --url http://server:8000
    """
    from bench.generators.handshake import read_token
    from bench.generators.listener import Listener, address_of
    from engine.api.tls import read_certificate

    token = read_token(token_file, "--token-file")
    tls = read_certificate(ssl_certfile, ssl_keyfile)
    host, port = listen
    listener = Listener(host, port, token, tls, _show)
    for number in (signal.SIGINT, signal.SIGTERM):  # even if the parent shell ignores Ctrl-C
        signal.signal(number, _end)
    _show(f"waiting for runs on {address_of(host, listener.port)}{', with TLS' if tls is not None else ''}")
    listener.serve()


def _show(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


def _end(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second signal of the same request
    raise EndSignal(number)
