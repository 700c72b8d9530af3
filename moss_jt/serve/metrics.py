"""Numbers about the server for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from moss_jt.serve.answer_events import Finished

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1200)


class Metrics:
    """One server's, in a registry of its own.

    Args:
        gauges: name -> what it is, and what gives it.
    """

    def __init__(self, gauges: dict[str, tuple[str, Callable[[], int]]]) -> None:
        self._registry = CollectorRegistry()
        self.answers = self._counter("answers", "Answers by interface and outcome", "interface", "outcome")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts")
        self._cached = self._counter("prompt_tokens_cached", "Of these, that had not to be computed")
        self._new = self._counter("new_tokens", "Tokens written")
        self._first = Histogram(
            "mossjt_first_token_seconds",
            "Until an answer's first token, waiting included",
            buckets=SECONDS,
            registry=self._registry,
        )
        for name, (description, value) in gauges.items():
            Gauge(f"mossjt_{name}", description, registry=self._registry).set_function(value)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(f"mossjt_{name}", description, labels, registry=self._registry)

    def count(self, finished: Finished) -> None:
        self._prompt.inc(finished.usage.prompt)
        self._cached.inc(finished.usage.cached)
        self._new.inc(finished.usage.new)
        if finished.seconds[0]:
            self._first.observe(finished.seconds[0])

    def text(self) -> bytes:
        return generate_latest(self._registry)
