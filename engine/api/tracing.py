"""OpenTelemetry traces of requests (`--otlp-traces-endpoint`), made from their records when they have ended.

A span for each output, `llm_request`, has children for its phases: `queue`, `prefill`, `decode`, and `preempted` for
the times between a preemption and the next slot. Names and attributes are vLLM's and those of OpenTelemetry's
conventions for generative AI. The parent is the span that the client sent in W3C's header `traceparent`.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError
from engine.frontend.listener import OutputRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

NS = 1_000_000_000
SERVICE = "redline"


class RequestTraces:
    """Makes the spans of requests and exports them from a thread."""

    def __init__(self, exporter: "SpanExporter", clock_ns: Callable[[], int] = time.time_ns):
        """`clock_ns` is the wall clock."""
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # The variables of OpenTelemetry (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, …) hold.
        resource = Resource.create()
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": SERVICE}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("redline")
        self._extract = TraceContextTextMapPropagator().extract
        self._set_span_in_context = trace.set_span_in_context
        self._kind = trace.SpanKind.SERVER
        self._error = trace.StatusCode.ERROR
        self._clock_ns = clock_ns

    def add(self, record: OutputRecord) -> None:
        """Make the spans of an output that has ended just now."""
        end = self._clock_ns()
        start = end - round(record.e2e_s * NS)
        span = self._tracer.start_span(
            "llm_request",
            context=self._extract(record.trace),
            kind=self._kind,
            start_time=start,
            attributes=attributes_of(record),
        )
        if record.error is not None:
            span.set_status(self._error, record.error)
        context = self._set_span_in_context(span)
        for name, begin_s, end_s in phases_of(record):
            child = self._tracer.start_span(name, context=context, start_time=start + round(begin_s * NS))
            child.end(start + round(end_s * NS))
        span.end(end)

    def close(self) -> None:
        """Export what is left."""
        self._provider.shutdown()


def make_traces(endpoint: str) -> RequestTraces:
    """Traces for a collector at `endpoint`, which receives OTLP over HTTP. Raises ConfigError without the libraries."""
    check_installed()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return RequestTraces(OTLPSpanExporter(endpoint=endpoint))


def check_installed() -> None:
    """Raise ConfigError without OpenTelemetry's libraries."""
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--otlp-traces-endpoint needs the extra `tracing`: pip install 'redline-llm[tracing]' ({error})"
        ) from error


def phases_of(record: OutputRecord) -> list[tuple[str, float, float]]:
    """The phases of an output, each with its begin and end in seconds since the request's arrival.

    An output that ended before a phase began does not have it; one that ended within a phase ends it.
    """
    end = record.e2e_s
    scheduled = min(record.queue_s, end) if record.admitted else end
    first = end if record.ttft_s is None else min(max(record.ttft_s, scheduled), end)
    phases = [("queue", 0.0, scheduled)]
    if record.admitted:
        phases.append(("prefill", scheduled, first))
    if record.ttft_s is not None:
        phases.append(("decode", first, end))
    return phases + [("preempted", min(begin, end), min(until, end)) for begin, until in record.preempted]


def attributes_of(record: OutputRecord) -> dict[str, Any]:
    """The attributes of an output's span."""
    given = {
        "gen_ai.operation.name": "text_completion" if record.request.startswith("cmpl") else "chat",
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.request.id": record.request,
        "gen_ai.response.finish_reasons": [record.finish_reason],
        "gen_ai.usage.prompt_tokens": record.prompt_tokens,
        "gen_ai.usage.completion_tokens": record.output_tokens,
        "gen_ai.usage.cached_tokens": record.cached_tokens,
        "gen_ai.latency.time_in_queue": record.queue_s,
        "gen_ai.latency.time_to_first_token": record.ttft_s,
        "gen_ai.latency.e2e": record.e2e_s,
        "redline.output_index": record.index,
        "redline.preemptions": record.preemptions,
        "redline.replica": record.replica,
        "redline.front_end": record.front_end,
    }
    return {name: value for name, value in given.items() if value is not None}
