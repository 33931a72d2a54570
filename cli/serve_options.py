"""Options of `redline serve` about the server: HTTP, keys, limits, processes, log and watchdog."""

import click

from cli.options import Finite, option
from engine.config import STEP_TIMEOUT_S

SERVER, LOG = "Server", "Log and watchdog"

SERVER_OPTIONS = (
    option(SERVER, "--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    option(
        SERVER, "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one."
    ),
    option(SERVER, "--served-model-name", help="Name of the model for clients [default: as given]."),
    option(SERVER, "--api-key", help="Key that clients must send as a bearer token."),
    option(
        SERVER,
        "--api-servers",
        default=1,
        show_default=True,
        type=click.IntRange(1, 64),
        help="API processes in front of the one engine.",
    ),
    option(LOG, "--disable-log-stats", is_flag=True, help="No line of figures every 10 s of traffic."),
    option(
        LOG,
        "--enable-log-requests/--disable-log-requests",
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
