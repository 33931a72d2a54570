"""The metrics of `--kv-spill`: evicted KV blocks in host memory and in files."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from engine.stats import SpillStats

# Name, what it counts, and the fields of `SpillStats` by tier.
GAUGES = (
    ("kv_spill_blocks", "KV blocks that a tier has.", {"host": "host_used", "disk": "disk_used"}),
    ("kv_spill_capacity_blocks", "KV blocks that fit into a tier.", {"host": "host_blocks", "disk": "disk_blocks"}),
)
COUNTERS = (
    ("kv_spill_stored", "KV blocks copied or written to a tier.", {"host": "spilled", "disk": "disk_written"}),
    ("kv_spill_hits", "KV blocks found for requests, by where.", {"host": "host_hits", "disk": "disk_hits"}),
    ("kv_spill_reads", "KV blocks read from files ahead of requests.", {"disk": "disk_read"}),
    ("kv_spill_lost", "KV blocks evicted that no tier had room for.", {"host": "lost"}),
    ("kv_spill_faults", "Files that could not be written, or not be used.", {"disk": "disk_faults"}),
)


def collect_spill(model: str, stats: SpillStats) -> Iterator[Metric]:
    """The metrics of an engine with `--kv-spill`."""
    labels = ["model_name", "tier"]
    for kind, families in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
        for name, what, fields in families:
            family = kind(f"redline:{name}", what, labels=labels)
            for tier, field in fields.items():
                family.add_metric([model, tier], getattr(stats, field))
            yield family
