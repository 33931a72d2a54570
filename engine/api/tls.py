"""The certificate for HTTPS, checked before a model is loaded."""

import ssl
from pathlib import Path

from engine.errors import ConfigError


def read_certificate(certfile: str | None, keyfile: str | None) -> ssl.SSLContext | None:
    """The context for HTTPS with a certificate and its key, both in PEM; None without a certificate.

    `keyfile` None: the key is in the certificate's file. Raises ConfigError if they can't be used.
    """
    if certfile is None:
        if keyfile is not None:
            raise ConfigError("--ssl-keyfile needs --ssl-certfile: a key alone does not enable HTTPS")
        return None
    for flag, file in (("--ssl-certfile", certfile), ("--ssl-keyfile", keyfile)):
        if file is not None:
            _check_readable(flag, file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    where = f"--ssl-certfile {certfile}" + (f", --ssl-keyfile {keyfile}" if keyfile else "")
    try:
        context.load_cert_chain(certfile, keyfile, password=_refuse_password)
    except _PasswordError:
        raise ConfigError(f"{where}: the key is protected by a password, which isn't supported") from None
    except ssl.SSLError as error:
        reason = error.reason.replace("_", " ").lower() if error.reason else "not a certificate and key in PEM"
        raise ConfigError(f"{where}: {reason}") from error
    return context


class _PasswordError(Exception):
    pass


def _refuse_password() -> str:
    # Otherwise OpenSSL would prompt for the password in the terminal.
    raise _PasswordError


def _check_readable(flag: str, file: str) -> None:
    try:
        Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag} {file} can't be read: {error.strerror or error}") from error
