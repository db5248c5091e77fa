"""Prometheus metrics: ``steeple_*``, and on request the same under the names that load tools know from vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from steeple.serve.loop import EngineLoop
from steeple.serve.tally import Buckets

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

Labels = Mapping[str, str]
PER_POSITION = "spec_decode_num_accepted_tokens_per_pos"


class Metrics:
    """A registry of its own, read from the loop's tally whenever somebody asks.

    Args: loop: the engine's; model: the name it is served under; vllm: export vLLM's names too.
    """

    def __init__(self, loop: EngineLoop, model: str, *, vllm: bool = False) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(Reading(loop, "steeple_", {"model_name": model}))
        if vllm:
            self._registry.register(Reading(loop, "vllm:", {"model_name": model, "engine": "0"}))

    def text(self) -> bytes:
        """The exposition, of type ``CONTENT_TYPE_LATEST``."""
        return generate_latest(self._registry)


class Reading(Collector):
    """What the tally says, as metrics. Args: prefix of the names; labels of every sample."""

    def __init__(self, loop: EngineLoop, prefix: str, labels: Labels) -> None:
        self._loop, self._prefix = loop, prefix
        self._names, self._values = list(labels), list(labels.values())

    def collect(self) -> Iterator[Metric]:
        """The metrics as of now."""
        tally, pool = self._loop.tally, self._loop.engine.cache.pool
        yield self._gauge("num_requests_running", "sequences in the engine's batch", self._loop.running)
        yield self._gauge("num_requests_waiting", "sequences that wait", self._loop.waiting)
        yield self._gauge("kv_cache_usage_perc", "share of the cache's blocks in use, 0 to 1", pool.held / pool.count)
        yield self._counter("prompt_tokens", "tokens read", tally.prompt_tokens)
        yield self._counter("generation_tokens", "tokens written", tally.generation_tokens)
        yield self._counter("num_preemptions", "requests computed again for want of blocks", self._preemptions)
        yield self._counter("engine_failures", "steps of the engine that failed", tally.failures)
        yield self._by("request_success", "finished requests by how they ended", "finished_reason", tally.outcomes)
        speculation = tally.speculation
        yield self._counter("spec_decode_num_drafts", "rounds with a draft", tally.drafts)
        yield self._counter("spec_decode_num_draft_tokens", "tokens drafted", speculation.drafted)
        yield self._counter("spec_decode_num_accepted_tokens", "drafted tokens accepted", speculation.accepted)
        positions = {str(j): kept for j, kept in enumerate(list(speculation.accepted_at))}
        yield self._by(PER_POSITION, "drafted tokens accepted, by their depth", "position", positions)
        yield self._histogram("time_to_first_token_seconds", "until the first token", tally.first_token)
        yield self._histogram("inter_token_latency_seconds", "between two updates", tally.between_tokens)
        yield self._histogram("request_time_per_output_token_seconds", "mean of a request", tally.per_token)
        yield self._histogram("e2e_request_latency_seconds", "from arrival to end", tally.whole)

    @property
    def _preemptions(self) -> int:
        return self._loop.engine.stats.preemptions

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, help, labels=self._names)
        family.add_metric(self._values, value)
        return family

    def _counter(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(self._prefix + name, help, labels=self._names)
        family.add_metric(self._values, value)
        return family

    def _by(self, name: str, help: str, label: str, values: Mapping[str, int]) -> Metric:
        family = CounterMetricFamily(self._prefix + name, help, labels=[*self._names, label])
        for key, value in list(values.items()):
            family.add_metric([*self._values, key], value)
        return family

    def _histogram(self, name: str, help: str, buckets: Buckets) -> Metric:
        family = HistogramMetricFamily(self._prefix + name, help, labels=self._names)
        family.add_metric(self._values, buckets.cumulative(), buckets.sum)
        return family
