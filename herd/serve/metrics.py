"""Prometheus' metrics: of requests, counted here, and of engines, as they tell them themselves when somebody asks."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from herd.chat import Usage

if TYPE_CHECKING:
    from herd.engine.stats import PoolStats, Stats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_TOKENS = tuple(float(1 << power) for power in range(0, 25, 2))


class Metrics:
    """What one server counts."""

    def __init__(self, stats: "Callable[[], Mapping[str, Stats | None]]") -> None:
        """stats: of the engines by model, None for those that are not in memory."""
        r = self._registry = CollectorRegistry()
        self.requests = Counter(
            "herd_http_requests", "Requests by route and status; gone: the client left.", ["path", "status"], registry=r
        )
        self.seconds = Histogram(
            "herd_http_request_seconds", "From a request's start to its reply's last byte.", ["path"], buckets=_SECONDS, registry=r
        )
        self.in_flight = Gauge("herd_http_requests_in_flight", "Requests under way.", registry=r)
        self.first = Histogram("herd_first_token_seconds", "Until something of a reply was there.", ["model"], buckets=_SECONDS, registry=r)
        self.each = Histogram(
            "herd_token_seconds", "Per token after the first, mean of a reply.", ["model"], buckets=_TOKEN_SECONDS, registry=r
        )
        self.prompts = Histogram("herd_request_prompt_tokens", "Prompt tokens of a reply.", ["model"], buckets=_TOKENS, registry=r)
        self.replies = Histogram("herd_request_reply_tokens", "Tokens of a reply.", ["model"], buckets=_TOKENS, registry=r)
        r.register(_Engines(stats))

    def ended(self, model: str, usage: Usage, first_s: float, rest_s: float) -> None:
        """A reply has ended. first_s: seconds until something of it was there.  rest_s: from then on."""
        self.first.labels(model).observe(first_s)
        if usage.completion_tokens > 1:
            self.each.labels(model).observe(rest_s / (usage.completion_tokens - 1))
        self.prompts.labels(model).observe(usage.prompt_tokens)
        self.replies.labels(model).observe(usage.completion_tokens)

    def finished(self, scope: Scope, status: str, seconds: float) -> None:
        """A request has ended. Paths that are no route count together, or anybody could make metrics without end."""
        path = getattr(scope.get("route"), "path", "none")
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


_COUNTERS: "dict[str, tuple[str, Callable[[Stats], float]]]" = {
    "herd_prompt_tokens": ("Tokens of prompts that were read, cached ones included.", lambda s: s.prompt_tokens),
    "herd_generated_tokens": ("Tokens of replies.", lambda s: s.generated_tokens),
    "herd_computed_tokens": ("Tokens that went through the model.", lambda s: s.computed_tokens),
    "herd_prefix_hit_tokens": ("Prompt tokens taken over from the cache.", lambda s: s.hit_tokens),
    "herd_prefix_restored_tokens": ("Tokens read back from the disk into the cache.", lambda s: s.restored_tokens),
    "herd_drafted_tokens": ("Tokens that were tested ahead.", lambda s: s.drafted_tokens),
    "herd_accepted_tokens": ("Drafted tokens that were right.", lambda s: s.accepted_tokens),
    "herd_preemptions": ("Times that a sequence gave its pages up.", lambda s: s.num_preempted),
    "herd_steps": ("Steps of the engine.", lambda s: s.num_steps),
}
_GAUGES: "dict[str, tuple[str, Callable[[Stats], float]]]" = {
    "herd_sequences_running": ("Sequences that are computed.", lambda s: s.num_running),
    "herd_sequences_waiting": ("Sequences in the queue.", lambda s: s.num_waiting),
}


class _Engines(Collector):
    def __init__(self, stats: "Callable[[], Mapping[str, Stats | None]]") -> None:
        self._stats = stats

    def describe(self) -> list[Metric]:
        return []  # nothing is asked of the engines when this is registered

    def collect(self) -> Iterator[Metric]:
        all_stats = dict(self._stats())
        present = {model: stats for model, stats in all_stats.items() if stats is not None}
        loaded = GaugeMetricFamily("herd_model_loaded", "Whether a model is in memory.", labels=["model"])
        for model, stats in all_stats.items():
            loaded.add_metric([model], float(stats is not None))
        yield loaded
        for name, (help_text, read) in _COUNTERS.items():
            yield _filled(CounterMetricFamily(name, help_text, labels=["model"]), present, read)
        for name, (help_text, read) in _GAUGES.items():
            yield _filled(GaugeMetricFamily(name, help_text, labels=["model"]), present, read)
        finished = CounterMetricFamily("herd_sequences_finished", "Sequences that ended, by why.", labels=["model", "reason"])
        seconds = CounterMetricFamily("herd_step_seconds", "Where the engine's time went.", labels=["model", "part"])
        pages = GaugeMetricFamily("herd_pages", "Pages of keys and values.", labels=["model", "layers", "state"])
        evicted = CounterMetricFamily("herd_pages_evicted", "Cached pages taken for something else.", labels=["model", "layers"])
        for model, stats in present.items():
            for reason, count in (*stats.num_finished.items(), ("aborted", stats.num_aborted), ("failed", stats.num_failed)):
                finished.add_metric([model, reason], count)
            for part, spent in stats.seconds.items():
                seconds.add_metric([model, part], spent)
            pools: dict[str, PoolStats] = {"global": stats.full_pages, "local": stats.local_pages}
            for layers, pool in pools.items():
                for state in ("used", "cached", "free"):
                    pages.add_metric([model, layers, state], getattr(pool, state))
                evicted.add_metric([model, layers], pool.evicted)
        yield from (finished, seconds, pages, evicted)


def _filled(
    family: CounterMetricFamily | GaugeMetricFamily, present: "Mapping[str, Stats]", read: "Callable[[Stats], float]"
) -> CounterMetricFamily | GaugeMetricFamily:
    for model, stats in present.items():
        family.add_metric([model], read(stats))
    return family
