"""Prometheus' own tools read the alerts and the dashboard, where they are installed (the package `prometheus`)."""

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.test_dashboards import FOLDER, exported_text, queries, rules
from tests.perf.prometheus import fill_in

PROMTOOL = shutil.which("promtool")
pytestmark = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
ALERTS = FOLDER / "alerts.yaml"
OWN = 'instance="host:8000", model_name="m"'
# For each alert, series that make it fire: name, further labels, values of each minute.
FIRING: dict[str, list[tuple[str, str, str]]] = {
    "RedlineDown": [("up", 'job="redline"', "0x30")],
    "RedlineStalled": [("vllm:num_requests_running", "", "3x30"), ("vllm:generation_tokens_total", "", "500x30")],
    "RedlineEngineRestarted": [("redline:core_restarts_total", "", "0x20 1x10")],
    "RedlineReplicaDown": [("redline:replica_up", 'replica="1"', "1x5 0x25")],
    "RedlineErrors": [
        ("vllm:request_success_total", 'finished_reason="error"', "0+2x30"),
        ("vllm:request_success_total", 'finished_reason="stop"', "0+98x30"),
    ],
    "RedlineQueueGrows": [("vllm:num_requests_waiting", "", "7x30")],
    "RedlinePreempts": [("vllm:num_preemptions_total", "", "0+12x30")],
    "RedlineKVCacheFull": [("vllm:kv_cache_usage_perc", "", "0.97x30")],
    "RedlineRefusesRequests": [("redline:requests_refused_total", 'limit="queue_full"', "0+1x30")],
    "RedlineRequestTimeouts": [("redline:request_timeouts_total", "", "0+1x30")],
    "RedlineSlowFirstToken": [
        ("vllm:time_to_first_token_seconds_bucket", f'le="{bound}"', f"0+{grown}x30")
        for bound, grown in (("5", 90), ("10", 100), ("+Inf", 100))
    ],
    "RedlineSlowTokens": [
        ("vllm:inter_token_latency_seconds_bucket", f'le="{bound}"', f"0+{grown}x30")
        for bound, grown in (("0.5", 90), ("1", 100), ("+Inf", 100))
    ],
    "RedlineInputsWait": [("redline:mm_pool_waiting", "", "2x30")],
    "RedlineMirrorDrift": [("redline:mm_mirror_misses_total", "", "0x20 1x10")],
    "RedlineKVSpillFaults": [("redline:kv_spill_faults_total", 'tier="disk"', "0x20 1x10")],
}
# A server with load and without troubles.
HEALTHY = [
    ("up", 'job="redline"', "1x30"),
    ("vllm:num_requests_running", "", "3x30"),
    ("vllm:num_requests_waiting", "", "0 4 0x28"),
    ("vllm:generation_tokens_total", "", "0+500x30"),
    ("redline:core_restarts_total", "", "0x30"),
    ("redline:replica_up", 'replica="1"', "1x30"),
    ("vllm:request_success_total", 'finished_reason="error"', "0x30"),
    ("vllm:request_success_total", 'finished_reason="stop"', "0+98x30"),
    ("vllm:num_preemptions_total", "", "0+1x30"),
    ("vllm:kv_cache_usage_perc", "", "0.9x30"),
    ("redline:requests_refused_total", 'limit="queue_full"', "3x30"),
    ("redline:request_timeouts_total", "", "0x30"),
    *(
        (f"vllm:{name}_seconds_bucket", f'le="{bound}"', "0+100x30")
        for name in ("time_to_first_token", "inter_token_latency")
        for bound in ("0.25", "+Inf")
    ),
    ("redline:mm_pool_waiting", "", "0 5 0x28"),
    ("redline:mm_mirror_misses_total", "", "0x30"),
    ("redline:kv_spill_faults_total", 'tier="disk"', "0x30"),
]  # fmt: skip


def run_tests(folder: Path, test: dict[str, Any]) -> None:
    """Run one of Prometheus' unit tests."""
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [test]}))
    found = subprocess.run([str(PROMTOOL), "test", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout + found.stderr


def inputs(series: Iterable[tuple[str, str, str]]) -> list[dict[str, str]]:
    return [
        {"series": f"{name}{{{', '.join(filter(None, (OWN, labels)))}}}", "values": values}
        for name, labels, values in series
    ]


def filled_in(text: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{ \$labels\.(\w+) }}", lambda part: labels[part[1]], text)


def test_the_alerts_are_valid() -> None:
    found = subprocess.run([str(PROMTOOL), "check", "rules", str(ALERTS)], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert f"{len(rules())} rules found" in found.stdout
    assert set(FIRING) == {rule["alert"] for rule in rules()}


@pytest.mark.parametrize("rule", rules(), ids=[rule["alert"] for rule in rules()])
def test_an_alert_fires_when_it_should(rule: dict[str, Any], tmp_path: Path) -> None:
    series = FIRING[rule["alert"]]
    labels = dict(re.findall(r'(\w+)="([^"]+)"', f"{OWN}, {series[0][1]}"))
    labels = {name: value for name, value in labels.items() if name not in ("le", "finished_reason")}
    annotations = {name: filled_in(text, labels) for name, text in rule["annotations"].items()}
    expected = {"exp_labels": labels | rule["labels"], "exp_annotations": annotations}
    alert = {"eval_time": "25m", "alertname": rule["alert"], "exp_alerts": [expected]}
    run_tests(tmp_path, {"interval": "1m", "input_series": inputs(series), "alert_rule_test": [alert]})


def test_a_healthy_server_fires_none(tmp_path: Path) -> None:
    quiet = [
        {"eval_time": f"{minute}m", "alertname": rule["alert"], "exp_alerts": []}
        for minute in (3, 15, 29)
        for rule in rules()
    ]
    run_tests(tmp_path, {"interval": "1m", "input_series": inputs(HEALTHY), "alert_rule_test": quiet})


def test_each_panel_has_values(tmp_path: Path) -> None:
    """Prometheus evaluates all queries over what a server exports, here with samples that grow."""
    samples = re.findall(r"^([\w:]+)(?:\{(.*)\})? \S+$", exported_text(), re.MULTILINE)
    series = [(name, labels, "0+1x30") for name, labels in samples]
    given = [{"series": f'{name}{{instance="a:1",{labels}}}', "values": values} for name, labels, values in series]
    panels = [query for what, query in queries() if what.startswith("panel")]
    one = [{"labels": "{}", "value": 1}]
    counted = [
        {"expr": f"count({fill_in(query, 240)}) > bool 0", "eval_time": "20m", "exp_samples": one} for query in panels
    ]
    assert len(counted) > 30
    run_tests(tmp_path, {"interval": "1m", "input_series": given, "promql_expr_test": counted})
