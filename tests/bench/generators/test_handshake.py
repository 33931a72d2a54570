"""Who has the token is let in, and nobody else; both sides say why."""

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.generators import handshake
from bench.generators.channel import Channel, ChannelError
from bench.generators.handshake import RefusedError, admit, join, network, processes, read_token
from bench.generators.messages import Challenge, Hello, Ping, Welcome

RIGHT, WRONG = b"the token of this run", b"another token of 20 bytes"


def meet(run: Callable[[Channel], object], generator: Callable[[Channel], object]) -> tuple[object, object]:
    """Both sides of a handshake at once; errors are returned."""
    ends = socket.socketpair()
    found: list[object] = [None, None]

    def play(number: int, side: Callable[[Channel], object]) -> None:
        channel = Channel(ends[number], f"peer:{number}")
        try:
            found[number] = side(channel)
        except ChannelError as error:
            found[number] = error
            channel.close()

    other = threading.Thread(target=play, args=(1, generator))
    other.start()
    play(0, run)
    other.join()
    for end in ends:
        end.close()
    return found[0], found[1]


def welcoming(channel: Channel) -> Welcome:
    welcome = admit(channel, RIGHT)
    channel.send(welcome)
    return welcome


def test_with_the_token_both_know_each_other() -> None:
    joined, admitted = meet(lambda channel: join(channel, RIGHT), welcoming)
    assert isinstance(joined, Welcome)
    assert joined == admitted
    assert (joined.network, joined.processes) == (network(), processes())
    assert network() != processes()
    assert joined.cores >= 1


def test_a_run_without_the_token_is_refused() -> None:
    joined, admitted = meet(lambda channel: join(channel, WRONG), welcoming)
    assert isinstance(joined, RefusedError)
    assert str(joined) == (
        "refused this run: it has another token (--generator-token-file of the run, --token-file of the generator)"
    )
    assert isinstance(admitted, ChannelError)
    assert str(admitted) == "does not have the token"


def test_a_generator_without_the_token_is_not_used() -> None:
    def pretend(channel: Channel) -> None:
        hello = channel.receive(5.0)
        assert isinstance(hello, Hello)
        channel.send(Challenge(handshake.VERSION, b"n" * 32))
        channel.receive(5.0)
        channel.send(Welcome(b"c" * 32, "n", "p", 1, 1))

    joined, _ = meet(lambda channel: join(channel, RIGHT), pretend)
    assert isinstance(joined, ChannelError)
    assert str(joined) == "does not have the token of this run"


def test_a_stranger_without_a_proof_is_refused() -> None:
    def ask(channel: Channel) -> None:
        channel.send(Hello(handshake.VERSION, b"n" * 32))
        assert isinstance(channel.receive(5.0), Challenge)
        channel.send(Ping())
        handshake._next(channel)

    asked, admitted = meet(ask, welcoming)
    assert isinstance(asked, RefusedError)
    assert str(admitted) == "does not have the token"


def test_other_versions_are_named() -> None:
    def ask(channel: Channel) -> None:
        channel.send(Hello(99, b"n" * 32))
        handshake._next(channel)

    joined, admitted = meet(ask, welcoming)
    assert str(joined) == (
        f"refused this run: it speaks version 99 of the protocol, not {handshake.VERSION}: use the same release of "
        "Redline on all hosts"
    )
    assert "speaks version 99" in str(admitted)


def test_strangers_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "LIMIT_S", 0.05)
    _, admitted = meet(lambda channel: channel.receive(5.0), welcoming)
    assert "did not answer within" in str(admitted)
    _, admitted = meet(lambda channel: channel.send(Ping()), welcoming)
    assert str(admitted) == "does not speak the protocol of redline bench"


def test_tokens_of_files_and_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(handshake.TOKEN_VARIABLE, raising=False)
    with pytest.raises(BenchError, match="generators need a token: give --token-file, or set REDLINE_GENERATOR_TOKEN"):
        read_token(None, "--token-file")
    monkeypatch.setenv(handshake.TOKEN_VARIABLE, " from the environment\n")
    assert read_token(None, "--token-file") == b"from the environment"
    file = tmp_path / "token"
    with pytest.raises(BenchError, match=r"--token-file .*token can't be read: No such file"):
        read_token(file, "--token-file")
    file.write_bytes(b"short\n")
    with pytest.raises(BenchError, match="the token has 5 bytes; it needs at least 16"):
        read_token(file, "--token-file")
    file.write_bytes(b"0123456789abcdef\n")
    assert read_token(file, "--token-file") == b"0123456789abcdef"
