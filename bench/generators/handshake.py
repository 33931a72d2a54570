"""Both sides prove to each other that they have the token, without sending it: HMAC-SHA256 over the nonces of both.

The run proves it first, so that a stranger who connects to a generator learns nothing that depends on the token.
"""

import hashlib
import hmac
import os
import secrets
import socket
import uuid
from pathlib import Path

from bench.errors import BenchError
from bench.generators.channel import MOST_BYTES, Channel, ChannelError
from bench.generators.messages import VERSION, AnyMessage, Challenge, Hello, Proof, Refused, Welcome
from engine.host import cores

TOKEN_VARIABLE = "REDLINE_GENERATOR_TOKEN"
LIMIT_S = 10.0  # of a handshake
_SHORTEST_TOKEN = 16  # bytes: a shorter one could be found by trying
_NONCE_BYTES = 32
_OF_RUN, _OF_GENERATOR = b"redline bench", b"redline generate"


class RefusedError(ChannelError):
    """The other side does not accept this one; it may help to try again if `busy`."""

    def __init__(self, message: str, *, busy: bool = False):
        super().__init__(message)
        self.busy = busy


def read_token(file: Path | None, flag: str) -> bytes:
    """The token that a run and its generators share: of a file, else of the environment; raises BenchError.

    Args:
        file: its whole content counts, without white space at both ends; None: the environment variable.
        flag: that names the file.
    """
    if file is None:
        token, source = os.environ.get(TOKEN_VARIABLE, "").strip().encode(), TOKEN_VARIABLE
        if not token:
            raise BenchError(f"generators need a token: give {flag}, or set {TOKEN_VARIABLE}")
    else:
        source = f"{flag} {file}"
        try:
            token = file.read_bytes().strip()
        except OSError as error:
            raise BenchError(f"{source} can't be read: {error.strerror or error}") from None
    if len(token) < _SHORTEST_TOKEN:
        raise BenchError(f"{source}: the token has {len(token)} bytes; it needs at least {_SHORTEST_TOKEN}")
    return token


def network() -> str:
    """A name of what 127.0.0.1 is here: a machine until it is started again, or one of its containers."""
    return _place("net")


def processes() -> str:
    """A name of the machine or container within which process ids have a meaning."""
    return _place("pid")


def _place(namespace: str) -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path(f'/proc/self/ns/{namespace}').stat().st_ino}"
    except OSError:  # not Linux
        return f"{socket.gethostname()}/{uuid.getnode()}"


def join(channel: Channel, token: bytes) -> Welcome:
    """The run's side, after connecting. Raises ChannelError."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    channel.send(Hello(VERSION, nonce))
    challenge = _next(channel)
    if not isinstance(challenge, Challenge):
        raise ChannelError("does not speak the protocol of redline generate")
    if challenge.version != VERSION:
        raise ChannelError(_versions(challenge.version))
    channel.send(Proof(_code(token, _OF_RUN, nonce, challenge.nonce)))
    welcome = _next(channel)
    if not isinstance(welcome, Welcome):
        raise ChannelError("does not speak the protocol of redline generate")
    if not hmac.compare_digest(welcome.code, _code(token, _OF_GENERATOR, nonce, challenge.nonce)):
        raise ChannelError("does not have the token of this run")
    channel.most_bytes = MOST_BYTES
    return welcome


def admit(channel: Channel, token: bytes) -> Welcome:
    """The generator's side: returns the Welcome that is still to be sent. Raises ChannelError."""
    hello = _next(channel)
    if not isinstance(hello, Hello):
        raise ChannelError("does not speak the protocol of redline bench")
    if hello.version != VERSION:
        channel.send(Refused(f"it {_versions(hello.version)}"))
        raise ChannelError(_versions(hello.version))
    nonce = secrets.token_bytes(_NONCE_BYTES)
    channel.send(Challenge(VERSION, nonce))
    proof = _next(channel)
    right = _code(token, _OF_RUN, hello.nonce, nonce)
    if not isinstance(proof, Proof) or not hmac.compare_digest(proof.code, right):
        channel.send(Refused("it has another token (--generator-token-file of the run, --token-file of the generator)"))
        raise ChannelError("does not have the token")
    channel.most_bytes = MOST_BYTES
    return Welcome(_code(token, _OF_GENERATOR, hello.nonce, nonce), network(), processes(), os.getpid(), cores())


def _next(channel: Channel) -> AnyMessage:
    message = channel.receive(LIMIT_S)
    if message is None:
        raise ChannelError(f"did not answer within {LIMIT_S:.0f} s")
    if isinstance(message, Refused):
        raise RefusedError(f"refused this run: {message.reason}", busy=message.busy)
    return message


def _code(token: bytes, side: bytes, nonce: bytes, other: bytes) -> bytes:
    return hmac.new(token, b"|".join((side, nonce, other)), hashlib.sha256).digest()


def _versions(other: int) -> str:
    return f"speaks version {other} of the protocol, not {VERSION}: use the same release of Redline on all hosts"
