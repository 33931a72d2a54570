"""Which certificates are trusted, the same for measured requests and all others."""

import contextlib
import os
import ssl
from pathlib import Path

from bench.errors import BenchError


def tls_context(ca: str | None = None, *, insecure: bool = False) -> ssl.SSLContext:
    """The context of connections to a server.

    `ca` is a PEM file or a folder of hashed certificates to trust instead of the usual ones: those of SSL_CERT_FILE or
    SSL_CERT_DIR, else the system's and certifi's. `insecure` trusts any. Raises BenchError naming what can't be read.
    """
    if insecure:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif ca is not None:
        context = _trusting(ca, "--ca")
    elif named := next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), None):
        context = _trusting(os.environ[named], named)
    else:
        context = ssl.create_default_context()
        with contextlib.suppress(ImportError):
            import certifi

            context.load_verify_locations(certifi.where())
    context.set_alpn_protocols(["http/1.1"])
    return context


def _trusting(path: str, named_by: str) -> ssl.SSLContext:
    try:
        if Path(path).is_dir():
            return ssl.create_default_context(capath=path)
        return ssl.create_default_context(cafile=path)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = "it holds no certificates in PEM form" if isinstance(error, ssl.SSLError) else error
        raise BenchError(f"{path} can't be read as certificates: {reason} ({named_by})") from None
