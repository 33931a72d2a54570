"""`make fuzz-api`: schemathesis against a server of a tiny model, from the server's own OpenAPI document.

No request may be answered by a 5xx, by a status or media type that the document doesn't have, or by a body that isn't
of its schema; methods that the document doesn't have are answered by 405 with `Allow`, and bodies that aren't of a
request's schema are refused. Not asked: that every body of a request's schema is accepted, since no schema can say that
token ids lie in the vocabulary or that fields fit together.

EXAMPLES=2000 is the least number of requests in all, SEED=1 the generator's. Rows go to results/fuzz-api.json, one
an operation: operation, requests, failures.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.serving import serve
from tests.tiny import write_tiny

RESULTS = Path("results") / "fuzz-api.json"
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "negative_data_rejection", "unsupported_method", "allow_header_conformance",
)  # fmt: skip
SERVER = ("--load-format", "dummy", "--served-model-name", "tiny", "--max-model-len", "512", "--disable-log-requests")


@dataclass
class Fuzzed:
    """What schemathesis found."""

    requests: Counter[str]  # by operation
    failures: Counter[str]
    output: str
    exit_code: int


def fuzz(url: str, examples: int, seed: int, folder: Path, phases: str = "coverage,fuzzing") -> Fuzzed:
    """Run schemathesis with so many examples of each operation."""
    report = folder / "events.ndjson"
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--checks", ",".join(CHECKS),
        "--max-examples", str(examples), "--seed", str(seed), "--continue-on-failure", "--phases", phases,
        "--request-timeout", "60", "--report", "ndjson", "--report-ndjson-path", str(report), "--no-color",
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)
    requests, failures = Counter[str](), Counter[str]()
    for line in report.read_text().splitlines() if report.exists() else ():
        count(json.loads(line), requests, failures)
    return Fuzzed(requests, failures, done.stdout + done.stderr, done.returncode)


def count(event: dict[str, Any], requests: Counter[str], failures: Counter[str]) -> None:
    """Add an event's requests and failed checks to the counts by operation."""
    recorder = event.get("ScenarioFinished", {}).get("recorder")
    if recorder is None:
        return
    label = recorder["label"]
    requests[label] += len(recorder["interactions"])
    for checks in recorder["checks"].values():
        failures[label] += sum(check["status"] == "failure" for check in checks)


def main() -> int:
    examples, seed = int(os.environ.get("EXAMPLES", "2000")), int(os.environ.get("SEED", "1"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serve(folder, write_tiny(folder), *SERVER) as served:
            found = fuzz(served.url, examples // 8, seed, folder)
            alive, log = served.process.poll() is None, served.output()
    total, failed = found.requests.total(), found.failures.total()
    RESULTS.parent.mkdir(exist_ok=True)
    rows = [
        {"operation": operation, "requests": requests, "failures": found.failures[operation]}
        for operation, requests in sorted(found.requests.items())
    ]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(f"{row['operation']}: {row['requests']} requests, {row['failures']} failures")
    if failed or found.exit_code:
        print(found.output)
    print(f"{total:,} requests, {failed} failures, {log.count('Traceback')} tracebacks in the server's log")
    return 0 if alive and total >= examples and not (failed or found.exit_code or "Traceback" in log) else 1


if __name__ == "__main__":
    sys.exit(main())
