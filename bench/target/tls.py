"""TLS settings, the same for measured requests and control requests."""

import contextlib
import os
import ssl
from pathlib import Path

from bench.errors import BenchError


def tls_context(ca: str | None = None, *, insecure: bool = False, flag: str = "--ca") -> ssl.SSLContext:
    """The TLS context of connections to a server; raises BenchError naming a file that cannot be read.

    Trusted are the certificates of `ca` (a PEM file or a folder of hashed certificates), else of SSL_CERT_FILE or
    SSL_CERT_DIR, else the system's and certifi's. `insecure` skips the verification; `flag` names `ca` in errors.
    """
    if insecure:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif ca is not None:
        context = _ca_context(ca, flag)
    elif named := next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), None):
        context = _ca_context(os.environ[named], named)
    else:
        context = ssl.create_default_context()
        with contextlib.suppress(ImportError):
            import certifi

            context.load_verify_locations(certifi.where())
    context.set_alpn_protocols(["http/1.1"])
    return context


def _ca_context(path: str, named_by: str) -> ssl.SSLContext:
    try:
        if Path(path).is_dir():
            return ssl.create_default_context(capath=path)
        return ssl.create_default_context(cafile=path)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = "it contains no certificates in PEM format" if isinstance(error, ssl.SSLError) else error
        raise BenchError(f"{path} cannot be read as certificates: {reason} ({named_by})") from None
