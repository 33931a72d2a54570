"""Traces of requests, with OpenTelemetry's own exporter in memory."""

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from engine.api.state import LONGEST_TRACE
from engine.api.tracing import NS, RequestTraces, phases_of
from engine.frontend.listener import OutputRecord
from engine.frontend.logs import RequestLog
from tests.engine.api.conftest import in_loop

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOW = 1_000 * NS


def record(**more) -> OutputRecord:
    given = {
        "request": "cmpl-1", "index": 0, "model": "tiny", "client": "", "front_end": 0, "prompt_tokens": 3,
        "cached_tokens": 0, "output_tokens": 4, "finish_reason": "length", "ttft_s": 1.5, "itl_s": 0.5, "e2e_s": 3.0,
        "queue_s": 1.0,
    }  # fmt: skip
    return OutputRecord(**{**given, **more})


def spans_of(*records: OutputRecord) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    traces = RequestTraces(exporter, lambda: NOW)
    for one in records:
        traces.add(one)
    traces.close()
    return list(exporter.get_finished_spans())


def times(spans: list[ReadableSpan]) -> dict[str, list[tuple[float, float]]]:
    """Begin and end of all spans by name, in seconds before the request's end."""
    found: dict[str, list[tuple[float, float]]] = {}
    for span in spans:
        found.setdefault(span.name, []).append(((span.start_time - NOW) / NS, (span.end_time - NOW) / NS))
    return found


def test_a_request_has_a_span_for_each_phase():
    spans = spans_of(record(preemptions=2, preempted=((1.75, 2.0), (2.25, 2.5))))
    assert times(spans) == {
        "llm_request": [(-3.0, 0.0)],
        "queue": [(-3.0, -2.0)],
        "prefill": [(-2.0, -1.5)],
        "decode": [(-1.5, 0.0)],
        "preempted": [(-1.25, -1.0), (-0.75, -0.5)],
    }
    [root] = [span for span in spans if span.name == "llm_request"]
    assert root.kind == SpanKind.SERVER
    assert root.parent is None
    assert all(span.parent.span_id == root.context.span_id for span in spans if span is not root)
    assert root.attributes["gen_ai.usage.completion_tokens"] == 4
    assert root.attributes["redline.preemptions"] == 2
    assert root.resource.attributes["service.name"] == "redline"


def test_a_client_s_trace_is_continued():
    spans = spans_of(record(trace={"traceparent": PARENT, "tracestate": "vendor=1"}))
    assert {f"{span.context.trace_id:032x}" for span in spans} == {PARENT.split("-")[1]}
    [root] = [span for span in spans if span.name == "llm_request"]
    assert f"{root.parent.span_id:016x}" == PARENT.split("-")[2]
    assert root.context.trace_state.get("vendor") == "1"


def test_a_trace_that_the_client_did_not_sample_is_not_exported():
    assert spans_of(record(trace={"traceparent": PARENT[:-2] + "00"})) == []


@pytest.mark.parametrize("bad", ["", "nonsense", "00-0-0-00"])
def test_a_header_that_names_no_trace_begins_one(bad: str):
    [root] = [span for span in spans_of(record(trace={"traceparent": bad})) if span.name == "llm_request"]
    assert root.parent is None


def test_the_service_name_can_be_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    assert {span.resource.attributes["service.name"] for span in spans_of(record())} == {"ours"}


@pytest.mark.parametrize(
    ("ended", "phases"),
    [
        ({"admitted": False, "ttft_s": None, "queue_s": 0.0}, [("queue", 0.0, 3.0)]),
        ({"ttft_s": None}, [("queue", 0.0, 1.0), ("prefill", 1.0, 3.0)]),
        ({"queue_s": 9.0, "ttft_s": 9.0}, [("queue", 0.0, 3.0), ("prefill", 3.0, 3.0), ("decode", 3.0, 3.0)]),
    ],
)
def test_what_ended_early_has_the_phases_that_it_reached(ended: dict, phases: list):
    assert phases_of(record(**ended)) == phases


def test_failures_are_errors_with_their_cause():
    [root] = [one for one in spans_of(record(finish_reason="error", error="no room")) if one.name == "llm_request"]
    assert (root.status.status_code, root.status.description) == (StatusCode.ERROR, "no room")


async def test_requests_of_a_server_are_traced_with_their_preemptions():
    exporter = InMemorySpanExporter()
    traces = RequestTraces(exporter)
    async with in_loop(num_blocks=20, max_model_len=64, enable_prefix_caching=False) as server:
        server.client.listener = RequestLog(logged=False, traced=traces.add)
        body = {"prompt": [[1] * 30, [2] * 30], "max_tokens": 30, "ignore_eos": True}
        answer = await server.http.post("/v1/completions", json=body, headers={"traceparent": PARENT})
        assert answer.status_code == 200
        long = {"traceparent": "0" * (LONGEST_TRACE + 1)}
        assert (await server.http.post("/v1/completions", json=body, headers=long)).status_code == 200
        assert server.client.total_stats.core.preemptions
    traces.close()
    spans = exporter.get_finished_spans()
    mine = [span for span in spans if f"{span.context.trace_id:032x}" == PARENT.split("-")[1]]
    names = [span.name for span in mine]
    assert {name: names.count(name) for name in ("llm_request", "queue", "prefill", "decode")} == dict.fromkeys(
        ("llm_request", "queue", "prefill", "decode"), 2
    )
    roots = {span.context.span_id: span for span in mine if span.name == "llm_request"}
    preempted = [span for span in mine if span.name == "preempted"]
    assert len(preempted) == sum(span.attributes["redline.preemptions"] for span in roots.values()) > 0
    for span in preempted:
        root = roots[span.parent.span_id]
        assert root.start_time <= span.start_time < span.end_time <= root.end_time
