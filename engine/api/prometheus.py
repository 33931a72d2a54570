"""/metrics: the counters of front end and core under vLLM's names, so that its dashboards and clients work."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.api.mm_metrics import collect_inputs
from engine.api.spill_metrics import collect_spill
from engine.api.state import ApiState
from engine.frontend.core_client import CoreClient
from engine.frontend.front_end_stats import REASONS, FrontEndStats, Histogram
from engine.stats import Stats

PREFIX = "vllm:"
STATUSES = ("ok", "hung", "starting", "restarting", "draining", "dead")  # of replicas


class EngineCollector(Collector):
    """Reads the counters of the engine at each scrape, so that nothing is stored twice."""

    def __init__(self, state: ApiState):
        self._client = state.client
        self._ready = state.client.ready
        self._model = state.model

    def collect(self) -> Iterator[Metric]:
        stats = self._client.total_stats
        core = stats.core
        yield from self._gauges(stats, core)
        yield from self._counters(core)
        yield self._finished(stats)
        yield from self._overload(stats)
        yield from self._histograms(stats)
        yield from self._grammars(stats)
        if self._ready.role:
            yield from self._transfers(core)
        if self._ready.mm is not None:
            yield from collect_inputs(self._model, stats)
        if core.spill is not None:
            yield from collect_spill(self._model, core.spill)
        yield self._cache_info()
        yield self._engine_info()
        if self._client.replicas:
            yield from self._replicas(self._client.replicas)
        # If this grows although no request runs, tasks leak.
        yield GaugeMetricFamily(
            "redline:tasks", "Asyncio tasks of the API process that answers.", value=len(asyncio.all_tasks())
        )

    def _gauges(self, stats: FrontEndStats, core: Stats) -> Iterator[Metric]:
        for name, what, value in (
            ("num_requests_running", "Requests running (in a batch slot).", core.running),
            ("num_requests_waiting", "Requests waiting to be scheduled.", stats.num_waiting),
            ("kv_cache_usage_perc", "Fraction of the KV cache in use, 0 to 1.", core.kv_cache_usage),
            ("gpu_cache_usage_perc", "The same, under its older name.", core.kv_cache_usage),
        ):
            family = GaugeMetricFamily(PREFIX + name, what, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family

    def _counters(self, core: Stats) -> Iterator[Metric]:
        for name, what, value in (
            ("num_preemptions", "Preemptions.", core.preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", core.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", core.prefix_hits),
            ("prompt_tokens", "Prompt tokens of admitted requests.", core.prompt_tokens),
            ("generation_tokens", "Generated tokens.", core.generation_tokens),
            ("engine_steps", "Steps of the engine.", core.steps),
            ("spec_decode_num_draft_tokens", "Draft tokens proposed (--speculative).", core.num_draft_tokens),
            ("spec_decode_num_accepted_tokens", "Draft tokens accepted.", core.num_accepted_tokens),
        ):
            family = CounterMetricFamily(PREFIX + name, what, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family

    def _transfers(self, core: Stats) -> Iterator[Metric]:
        """Of prompts between prefill and decode replicas."""
        for name, what, value in (
            ("transfers", "Prompts computed by prefill replicas for decode replicas.", core.kv_transfers),
            ("transfers_lost", "Of these, those with blocks that were lost or refused.", core.kv_transfers_lost),
            ("blocks_sent", "KV blocks sent by prefill replicas.", core.kv_blocks_sent),
            ("blocks_received", "KV blocks received by decode replicas.", core.kv_blocks_received),
            ("blocks_rejected", "Of these, those that could not be used.", core.kv_blocks_rejected),
        ):
            family = CounterMetricFamily(f"redline:kv_{name}", what, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family

    def _finished(self, stats: FrontEndStats) -> Metric:
        family = CounterMetricFamily(
            PREFIX + "request_success", "Finished requests by reason.", labels=["model_name", "finished_reason"]
        )
        finished = stats.finished
        for reason in REASONS:
            family.add_metric([self._model, reason], finished[reason])
        return family

    def _overload(self, stats: FrontEndStats) -> Iterator[Metric]:
        refused = CounterMetricFamily(
            "redline:requests_refused", "Requests refused under load, by limit.", labels=["model_name", "limit"]
        )
        for event in ("queue_full", "key_limit"):
            refused.add_metric([self._model, event], stats.events(event))
        yield refused
        for name, what, event in (
            ("request_timeouts", "Requests that exceeded --request-timeout.", "timeout"),
            ("core_restarts", "Restarts of EngineCores (--restart-on-failure).", "restart"),
            ("drain_timeouts", "Requests that ended with a drained replica (--drain-timeout).", "drain_timeout"),
        ):
            family = CounterMetricFamily(f"redline:{name}", what, labels=["model_name"])
            family.add_metric([self._model], stats.events(event))
            yield family

    def _histograms(self, stats: FrontEndStats) -> Iterator[Metric]:
        for name, what, histogram in (
            ("time_to_first_token_seconds", "From a request's arrival to its first token.", stats.ttft),
            ("inter_token_latency_seconds", "Between two tokens of a request.", stats.itl),
            ("time_per_output_token_seconds", "The same, under its older name.", stats.itl),
            ("e2e_request_latency_seconds", "From a request's arrival to its end.", stats.e2e),
            (
                "request_queue_time_seconds",
                "From a request's arrival at the EngineCore until it is scheduled.",
                stats.queue,
            ),
            ("request_prompt_tokens", "Prompt tokens of finished requests.", stats.prompt_tokens),
            ("request_generation_tokens", "Output tokens of finished requests.", stats.generation_tokens),
            (
                "iteration_tokens_total",
                "Tokens per step: generated, and prompt tokens of requests admitted.",
                stats.step_tokens,
            ),
        ):
            yield self._histogram(PREFIX + name, what, histogram)

    def _grammars(self, stats: FrontEndStats) -> Iterator[Metric]:
        for name, what, counter in (
            ("grammar_requests", "Requests with structured output, refused ones included.", "requests"),
            ("grammar_cache_hits", "Of these, those whose grammar was compiled for an earlier one.", "hits"),
        ):
            family = CounterMetricFamily("redline:" + name, what, labels=["model_name"])
            family.add_metric([self._model], stats.grammars(counter))
            yield family
        what = "Compilation of a grammar, without the wait for it."
        yield self._histogram("redline:grammar_compile_seconds", what, stats.grammar_compilations)

    def _histogram(self, name: str, what: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(name, what, labels=["model_name"])
        family.add_metric([self._model], histogram.cumulative(), histogram.total)
        return family

    def _cache_info(self) -> Metric:
        ready = self._ready
        labels = {
            "block_size": str(ready.block_size),
            "num_gpu_blocks": str(ready.num_blocks),
            "enable_prefix_caching": str(ready.prefix_caching),
        }
        return self._info(PREFIX + "cache_config_info", "Configuration of the KV cache; always 1.", labels)

    def _engine_info(self) -> Metric:
        """What the engine resolved beyond the KV cache, so that a benchmark can record what it measured."""
        ready = self._ready
        labels = {
            "device": ready.device,
            "dtype": ready.dtype,
            "max_num_seqs": str(ready.max_num_seqs),
            "max_num_batched_tokens": str(ready.max_num_batched_tokens),
        }
        if self._client.replicas:  # the other labels are per replica
            labels |= {"replicas": str(len(self._client.replicas)), "routing": self._client.routing}
        return self._info("redline:engine_config_info", "Configuration of the engine; always 1.", labels)

    def _info(self, name: str, what: str, labels: dict[str, str]) -> Metric:
        labels = {"model_name": self._model, **labels}
        family = GaugeMetricFamily(name, what, labels=list(labels))
        family.add_metric(list(labels.values()), 1)
        return family

    def _replicas(self, replicas: Sequence[CoreClient]) -> Iterator[Metric]:
        """Figures of each replica; all other metrics are sums over them."""
        labels = ["model_name", "replica"]
        cores = [replica.total_stats.all_cores for replica in replicas]
        alive = [replica.dead is None for replica in replicas]
        numbers = [str(replica.replica) for replica in replicas]
        up = GaugeMetricFamily("redline:replica_up", "1 if the replica is alive.", labels=labels)
        for number, living in zip(numbers, alive, strict=True):
            up.add_metric([self._model, number], living)
        yield up
        states = Counter(state["status"] for state in self._client.replica_states())
        counted = GaugeMetricFamily("redline:replicas", "Replicas by status.", labels=["model_name", "status"])
        for status in STATUSES:
            counted.add_metric([self._model, status], states[status])
        yield counted
        for name, what, field in (
            ("num_requests_running", "Requests of the replica running (in a batch slot).", "running"),
            ("num_requests_waiting", "Requests of the replica waiting to be scheduled.", "waiting"),
            ("kv_cache_usage_perc", "Fraction of the replica's KV cache in use, 0 to 1.", "kv_cache_usage"),
        ):
            gauge = GaugeMetricFamily(f"redline:replica_{name}", what, labels=labels)
            for number, core, living in zip(numbers, cores, alive, strict=True):
                gauge.add_metric([self._model, number], getattr(core, field) if living else 0)
            yield gauge
        for name, what, field in (
            ("prefix_cache_queries", "Prompt tokens looked up in the replica's prefix cache.", "prefix_queries"),
            ("prefix_cache_hits", "Prompt tokens found in the replica's prefix cache.", "prefix_hits"),
            ("generation_tokens", "Tokens generated by the replica.", "generation_tokens"),
        ):
            counter = CounterMetricFamily(f"redline:replica_{name}", what, labels=labels)
            for number, core in zip(numbers, cores, strict=True):
                counter.add_metric([self._model, number], getattr(core, field))
            yield counter


def make_registry(state: ApiState) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(EngineCollector(state))
    if state.client.alone:  # with several processes, figures of the one that answers would mislead
        ProcessCollector(registry=registry)
    return registry
