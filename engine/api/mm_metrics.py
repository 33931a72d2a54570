"""The metrics of multimodal inputs: the caches that they pass, and the pool of processes."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from engine.frontend.front_end_stats import FrontEndStats
from engine.stats import MMStats

# Name, what it counts, and the counter of the front ends (`MM_COUNTERS`).
OF_FRONT_ENDS = (
    ("vllm:mm_cache_queries", "Multimodal inputs looked up in the feature cache.", "queries"),
    ("vllm:mm_cache_hits", "Multimodal inputs found in the feature cache, or just being processed.", "hits"),
    ("redline:mm_pool_inputs", "Multimodal inputs processed, also in vain.", "jobs"),
    ("redline:mm_pool_failures", "Multimodal inputs that could not be processed.", "failures"),
    ("redline:mm_pool_seconds", "Seconds that processes have spent on multimodal inputs.", "seconds"),
)
GAUGES_OF_FRONT_ENDS = (
    ("redline:mm_cache_bytes", "Bytes of the feature caches.", "bytes"),
    ("redline:mm_pool_waiting", "Multimodal inputs that wait for a process.", "waiting"),
    ("redline:mm_pool_processes", "Processes for multimodal inputs.", "processes"),
)
# The same with the fields of `MMStats`.
OF_CORES = (
    ("redline:mm_mirror_queries", "Multimodal inputs of requests that reached the engine.", "mirror_queries"),
    ("redline:mm_mirror_hits", "Of these, inputs whose features were there already.", "mirror_hits"),
    ("redline:mm_mirror_misses", "Of these, inputs whose features were missing: always 0.", "mirror_misses"),
    ("redline:mm_encoder_cache_queries", "Multimodal inputs that requests began to compute.", "encoder_queries"),
    ("redline:mm_encoder_cache_hits", "Of these, inputs whose embeddings were on the device.", "encoder_hits"),
)
GAUGES_OF_CORES = (
    ("redline:mm_mirror_bytes", "Bytes of the feature files that the engine has.", "mirror_bytes"),
    ("redline:mm_encoder_cache_embeddings", "Embeddings on the device.", "encoder_embeddings"),
)


def collect_inputs(model: str, stats: FrontEndStats) -> Iterator[Metric]:
    """The metrics of a model that takes multimodal inputs."""
    core, inputs = stats.core.mm or MMStats(), stats.inputs
    counters = [(name, what, inputs.get(field)) for name, what, field in OF_FRONT_ENDS]
    counters += [(name, what, getattr(core, field)) for name, what, field in OF_CORES]
    gauges = [(name, what, inputs.get(field)) for name, what, field in GAUGES_OF_FRONT_ENDS]
    gauges += [(name, what, getattr(core, field)) for name, what, field in GAUGES_OF_CORES]
    for name, what, value in counters:
        counter = CounterMetricFamily(name, what, labels=["model_name"])
        counter.add_metric([model], value)
        yield counter
    for name, what, value in gauges:
        gauge = GaugeMetricFamily(name, what, labels=["model_name"])
        gauge.add_metric([model], value)
        yield gauge
