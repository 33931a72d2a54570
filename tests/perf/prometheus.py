"""Prometheus beside a server: it scrapes `/metrics`, and answers the queries of the dashboard as in Grafana."""

import contextlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.perf.child_processes import start_child
from tests.serving import free_port

DASHBOARD = Path(__file__).parents[2] / "docs" / "serving" / "dashboards" / "redline.json"
SCRAPE_S = 5
# As Grafana computes it for a step that isn't longer than the scrape interval.
RATE_S = 4 * SCRAPE_S
START_S = 60.0


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a panel: its name in the legend, and its values at times, in seconds since 1970."""

    name: str
    times: list[float]
    values: list[float]


def read_panels() -> list[dict[str, Any]]:
    """The panels and headings of the dashboard."""
    panels: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return panels


def fill_in(query: str, rate_s: int = RATE_S) -> str:
    """A query of the dashboard as Grafana sends it, for all models and all servers."""
    query = re.sub(r'=~"\$\w+"', '=~".*"', query)
    return query.replace("$__rate_interval", f"{rate_s}s")


@dataclass(frozen=True, slots=True)
class Prometheus:
    client: httpx.Client
    version: str

    def lines(self, target: dict[str, Any], start: float, end: float) -> list[Line]:
        """What a panel shows of one of its queries."""
        params: dict[str, Any] = {"query": fill_in(target["expr"]), "start": start, "end": end, "step": SCRAPE_S}
        answer = self.client.get("/api/v1/query_range", params=params).raise_for_status().json()
        found = []
        for series in answer["data"]["result"]:
            name = target["legendFormat"]
            for label, value in series["metric"].items():
                name = name.replace(f"{{{{{label}}}}}", value)
            times, values = zip(*series["values"], strict=True)
            found.append(Line(name, [float(at) for at in times], [float(value) for value in values]))
        return sorted(found, key=lambda line: line.name)


@contextlib.contextmanager
def prometheus(folder: Path, *urls: str) -> Iterator[Prometheus]:
    """Prometheus with its data in `folder`, which scrapes the servers at `urls`; it must be installed."""
    config = folder / "prometheus.yml"
    job = {"job_name": "redline", "static_configs": [{"targets": [url.removeprefix("http://") for url in urls]}]}
    config.write_text(yaml.safe_dump({"global": {"scrape_interval": f"{SCRAPE_S}s"}, "scrape_configs": [job]}))
    port = free_port()
    command = [
        str(shutil.which("prometheus")), f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
    ]  # fmt: skip
    process = start_child(command)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            _wait(client, process)
            build = client.get("/api/v1/status/buildinfo").json()["data"]["version"]
            yield Prometheus(client, build.partition("+")[0])
    finally:
        process.terminate()
        process.wait()


def _wait(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/-/ready").status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("Prometheus did not start")
        time.sleep(0.1)
