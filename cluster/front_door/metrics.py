"""What a front door counts, under our names and under those that dashboards made for vLLM ask for.

The numbers of a DP group (running, waiting, cache) come from its own last message and are labelled with the group:
where several front doors report the same group, take the maximum, not the sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import CollectorRegistry

from cluster.front_door.call import Usage
from cluster.front_door.distribution import Distribution
from cluster.front_door.groups import Clock
from cluster.front_door.links import Links
from protos.shoal.v1 import session_pb2

__all__ = ["FrontDoorMetrics", "RequestMeter"]

# Bounds as vLLM has them, so that its dashboards' quantiles mean the same here.
_LONG_S = (1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, *_LONG_S, 160.0, 640.0, 2560.0)
_BETWEEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, *_LONG_S)
_MINUTES_S = (60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
_WHOLE_S = (0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, *_MINUTES_S)
_TOKENS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))


@dataclass(frozen=True, slots=True)
class _Named:
    """One distribution; the names are shoal_ and vllm: followed by these."""

    field: str
    name: str
    vllm: str
    bounds: tuple[float, ...]
    documentation: str


_DISTRIBUTIONS = (
    _Named(
        "first_token_s",
        "time_to_first_token_seconds",
        "time_to_first_token_seconds",
        _FIRST_TOKEN_S,
        "Arrival to first token.",
    ),
    _Named(
        "between_s",
        "inter_token_latency_seconds",
        "inter_token_latency_seconds",
        _BETWEEN_S,
        "Between two outputs of a choice.",
    ),
    _Named(
        "per_token_s",
        "time_per_output_token_seconds",
        "request_time_per_output_token_seconds",
        _BETWEEN_S,
        "Mean time per token behind the first, of a choice.",
    ),
    _Named("whole_s", "request_seconds", "e2e_request_latency_seconds", _WHOLE_S, "Arrival to end of a request."),
    _Named("queue_s", "queue_seconds", "request_queue_time_seconds", _WHOLE_S, "In a DP group's queue."),
    _Named("prefill_s", "prefill_seconds", "request_prefill_time_seconds", _WHOLE_S, "First scheduled to first token."),
    _Named("decode_s", "decode_seconds", "request_decode_time_seconds", _WHOLE_S, "First token to last, of a choice."),
    _Named("prompt_tokens", "request_prompt_tokens", "request_prompt_tokens", _TOKENS, "Tokens of a request's prompt."),
    _Named(
        "answer_tokens",
        "request_generation_tokens",
        "request_generation_tokens",
        _TOKENS,
        "Tokens of a request's answer.",
    ),
)


class FrontDoorMetrics:
    """A Prometheus collector, owned by the event loop; a scrape from another thread reads slightly old numbers."""

    def __init__(self, model_name: str, clock: Clock) -> None:
        self.clock = clock
        self.distributions = {named.field: Distribution(named.bounds) for named in _DISTRIBUTIONS}
        self.num_open = 0
        self.num_prompt_tokens = 0
        self.num_answer_tokens = 0
        self.num_cached_tokens = 0
        self.num_replays = 0
        self.ended: Counter[tuple[str, str]] = Counter()  # by door and outcome
        self.finished: Counter[str] = Counter()  # choices, by reason
        self._labels = {"model_name": model_name}
        self._links: Links | None = None

    def watch(self, links: Links) -> None:
        """Report these groups too."""
        self._links = links

    def register(self, registry: CollectorRegistry) -> None:
        registry.register(self)

    def open(self, door: str) -> RequestMeter:
        """A request begins."""
        return RequestMeter(self, door)

    def count(self, door: str, outcome: str) -> None:
        """A call ended: "ok", or an error's code."""
        self.ended[door or "direct", outcome] += 1

    def collect(self) -> Iterator[Metric]:
        for named in _DISTRIBUTIONS:
            distribution = self.distributions[named.field]
            yield distribution.family(f"shoal_{named.name}", named.documentation, self._labels)
            yield distribution.family(f"vllm:{named.vllm}", named.documentation, self._labels)
        yield from self._totals()
        yield from self._outcomes()
        if self._links is not None:
            yield from self._groups(self._links)

    def _totals(self) -> Iterator[Metric]:
        for name, value, documentation in (
            ("prompt_tokens", self.num_prompt_tokens, "Prompt tokens of requests that got a first token."),
            ("generation_tokens", self.num_answer_tokens, "Tokens generated."),
        ):
            yield self._counter(f"shoal_{name}", documentation, [({}, value)])
            yield self._counter(f"vllm:{name}", documentation, [({}, value)])
        yield self._counter(
            "shoal_cached_tokens", "Prompt tokens that a prefix cache held.", [({}, self.num_cached_tokens)]
        )
        yield self._counter("shoal_replays", "Sequences replayed after a failure.", [({}, self.num_replays)])
        yield self._gauge("shoal_open_requests", "Requests open at this front door.", [({}, self.num_open)])

    def _outcomes(self) -> Iterator[Metric]:
        ended = [({"door": door, "code": code}, count) for (door, code), count in self.ended.items()]
        yield self._counter("shoal_requests", "Requests ended, by door and outcome.", ended)
        errors = [(labels, count) for labels, count in ended if labels["code"] != "ok"]
        yield self._counter("shoal_errors", "Requests ended with an error, by door and code.", errors)
        finished = [({"finished_reason": reason}, count) for reason, count in self.finished.items()]
        yield self._counter("shoal_choices_finished", "Choices finished, by reason.", finished)
        yield self._counter("vllm:request_success", "Choices finished, by reason.", finished)

    def _groups(self, links: Links) -> Iterator[Metric]:
        loads = [({"engine": key}, link.load) for key, link in links.links.items()]
        gauges = (
            ("num_requests_running", [(by, load.num_running) for by, load in loads], "Sequences in the batch."),
            ("num_requests_waiting", [(by, load.num_waiting) for by, load in loads], "Sequences in the queue."),
            (
                "kv_cache_usage_perc",
                [(by, _used(load)) for by, load in loads],
                "Part of the KV cache in use; 1 is full.",
            ),
        )
        counters = (
            ("num_preemptions", [(by, load.num_preemptions) for by, load in loads], "Sequences preempted."),
            ("prefix_cache_queries", [(by, load.prefix_query_tokens) for by, load in loads], "Tokens looked up."),
            ("prefix_cache_hits", [(by, load.prefix_hit_tokens) for by, load in loads], "Tokens found."),
        )
        for prefix in ("shoal_", "vllm:"):
            yield from (self._gauge(prefix + name, text, rows) for name, rows, text in gauges)
            yield from (self._counter(prefix + name, text, rows) for name, rows, text in counters)
        yield self._gauge("shoal_step_seconds", "The last step's duration.", [(by, load.step_s) for by, load in loads])
        uneven = [(by, load.ep_imbalance) for by, load in loads if load.ep_imbalance]
        text = "Tokens of the fullest DP group in the last steps of an expert exchange, over the mean; 1 is even."
        yield self._gauge("shoal_ep_step_imbalance", text, uneven)
        ready = [({"engine": key}, int(link.ready)) for key, link in links.links.items()]
        yield self._gauge("shoal_group_ready", "Whether the stream to the group is up.", ready)
        lost = [({"engine": key}, link.num_lost) for key, link in links.links.items()]
        yield self._counter("shoal_streams_lost", "Streams to the group that broke.", lost)

    def _counter(self, name: str, documentation: str, rows: Iterable[tuple[dict[str, str], float]]) -> Metric:
        rows = list(rows)
        labels = list(self._labels | rows[0][0]) if rows else list(self._labels)
        family = CounterMetricFamily(name, documentation, labels=labels)
        for more, value in rows:
            family.add_metric(list((self._labels | more).values()), value)
        return family

    def _gauge(self, name: str, documentation: str, rows: Iterable[tuple[dict[str, str], float]]) -> Metric:
        rows = list(rows)
        labels = list(self._labels | rows[0][0]) if rows else list(self._labels)
        family = GaugeMetricFamily(name, documentation, labels=labels)
        for more, value in rows:
            family.add_metric(list((self._labels | more).values()), value)
        return family


class RequestMeter:
    """Measures one request."""

    __slots__ = ("_door", "_first_s", "_last_s", "_metrics", "_num_tokens", "arrival_s", "time_to_first_token_s")

    def __init__(self, metrics: FrontDoorMetrics, door: str) -> None:
        self.arrival_s = metrics.clock.time()
        self.time_to_first_token_s: float | None = None
        self._metrics = metrics
        self._door = door
        self._first_s: dict[int, float] = {}  # by choice
        self._last_s: dict[int, float] = {}
        self._num_tokens: Counter[int] = Counter()
        metrics.num_open += 1

    def tokens(self, index: int, num_new: int, output: session_pb2.SequenceOutput, num_prompt_tokens: int) -> None:
        """Choice `index` got tokens."""
        metrics, now_s = self._metrics, self._metrics.clock.time()
        metrics.num_answer_tokens += num_new
        self._num_tokens[index] += num_new
        last_s = self._last_s.get(index)
        self._last_s[index] = now_s
        if last_s is not None:
            metrics.distributions["between_s"].observe(now_s - last_s)
            return
        self._first_s[index] = now_s
        metrics.distributions["first_token_s"].observe(now_s - self.arrival_s)
        metrics.distributions["queue_s"].observe(output.queue_s)
        metrics.distributions["prefill_s"].observe(output.prefill_s)
        if self.time_to_first_token_s is None:
            self.time_to_first_token_s = now_s - self.arrival_s
            metrics.num_prompt_tokens += num_prompt_tokens
            metrics.num_cached_tokens += output.num_cached_tokens

    def end(self, outcome: str, reasons: Iterable[str], usage: Usage) -> None:
        """The request is over; `reasons` are those of its finished choices."""
        metrics, now_s = self._metrics, self._metrics.clock.time()
        metrics.num_open -= 1
        metrics.count(self._door, outcome)
        metrics.finished.update(reasons)
        for index, last_s in self._last_s.items():
            decode_s = last_s - self._first_s[index]
            metrics.distributions["decode_s"].observe(decode_s)
            if self._num_tokens[index] > 1:
                metrics.distributions["per_token_s"].observe(decode_s / (self._num_tokens[index] - 1))
        if self._last_s:
            metrics.distributions["whole_s"].observe(now_s - self.arrival_s)
            metrics.distributions["prompt_tokens"].observe(usage.prompt_tokens)
            metrics.distributions["answer_tokens"].observe(usage.completion_tokens)


def _used(load: session_pb2.Load) -> float:
    return 1.0 - load.num_free_blocks / load.num_blocks if load.num_blocks else 0.0
