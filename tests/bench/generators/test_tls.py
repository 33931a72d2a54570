"""Generators over TLS, and against servers whose certificates only the run has."""

import json
import queue
import re
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.errors import BenchError
from bench.generators import Generators, LostGeneratorError
from bench.generators.listener import Listener
from bench.target import Target
from bench.workloads import RequestSpec
from tests.bench.generators.process import TOKEN
from tests.bench.generators.test_generators import EVER, Connect, Counting, specs
from tests.bench.loadgen.process import KnownServer

pytestmark = pytest.mark.usefixtures("patient_generator", "patient_clocks")


def make_certificate(folder: Path, name: str) -> tuple[str, str]:
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    return str(certificate), str(key)


def test_tls(known_server: Any, listeners: Callable[..., list[Listener]], tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "mine")
    other, _ = make_certificate(tmp_path, "other")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    (secret,), (plain,) = listeners(1, tls=server), listeners(1)
    trusted, untrusted = (ssl.create_default_context(cafile=path) for path in (certificate, other))
    target = Target(known_server.url, json.dumps({"itl": 0.001}))
    with Generators([("127.0.0.1", secret.port)], TOKEN.encode(), trusted) as mine:
        mine.connect()
        requests = [RequestSpec(200_000, 300, prompt_ids=[7] * 200_000), *specs(3)]
        recording = mine.run_load(target, requests, np.zeros(4), observer=Counting(), time_limit_s=60)
        assert [(r.status, r.output_tokens) for r in recording.records(EVER)] == [("ok", n) for n in (300, 3, 4, 5)]
    for port, context, message in (
        (secret.port, untrusted, r"has a certificate that is not accepted: .*--generator-ca"),
        (secret.port, None, r"if it uses TLS, give --generator-ca"),
        (plain.port, trusted, r"does not use TLS: leave --generator-ca out, or start it with --ssl-certfile"),
    ):
        with (
            Generators([("127.0.0.1", port)], TOKEN.encode(), context) as mine,
            pytest.raises(LostGeneratorError, match=message),
        ):
            mine.connect()


def test_a_generator_says_that_a_run_does_not_use_tls(tmp_path: Path) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*make_certificate(tmp_path, "mine"))
    lines: queue.Queue[str] = queue.Queue()
    listener = Listener("127.0.0.1", 0, TOKEN.encode(), server, lines.put)
    try:
        with Generators([("127.0.0.1", listener.port)], TOKEN.encode()) as mine, pytest.raises(LostGeneratorError):
            mine.connect()
        assert re.fullmatch(r"connection of 127\.0\.0\.1:\d+: does not use TLS", lines.get(timeout=60))
    finally:
        listener.close()


def test_generators_trust_the_certificates_of_the_run(generators: Connect, tmp_path: Path) -> None:
    """Those of --ca, whose file they do not have."""
    certificate, key = make_certificate(tmp_path, "server")
    server = KnownServer(tmp_path, (Path(certificate), Path(key)))
    mine = generators(2)
    try:
        for ca, expected in ((certificate, "ok"), (None, "connection")):
            target = Target(server.url, json.dumps({}), ca=ca)
            recording = mine.run_load(target, specs(4), np.zeros(4), observer=Counting(), time_limit_s=60)
            assert [r.status for r in recording.records(EVER)] == [expected] * 4
        target = Target(server.url, json.dumps({}), ca=str(tmp_path))
        with pytest.raises(BenchError, match=r"--ca .* is a folder: with --generators it must be one PEM file"):
            mine.run_load(target, specs(4), np.zeros(4), observer=Counting(), time_limit_s=60)
    finally:
        server.stop()
