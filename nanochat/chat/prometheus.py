"""Counters of the server, in Prometheus' text format (exposition format 0.0.4)."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Counter:
    """A number per label that only grows."""

    name: str
    help: str
    label: str | None = None
    values: dict[str, float] = field(default_factory=dict)

    def add(self, amount: float = 1, label: str = "") -> None:
        self.values[label] = self.values.get(label, 0) + amount

    def render(self) -> list[str]:
        values = self.values if self.label else {"": self.values.get("", 0)}
        lines = [f"# HELP {self.name} {self.help}", f"# TYPE {self.name} counter"]
        for value, amount in sorted(values.items()):
            labels = f'{{{self.label}="{value}"}}' if self.label else ""
            lines.append(f"{self.name}{labels} {amount:.15g}")
        return lines


@dataclass
class Histogram:
    """How many observations, in seconds, were at most as long as each bound."""

    name: str
    help: str
    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    sum_s: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum_s += seconds

    def render(self) -> list[str]:
        lines = [f"# HELP {self.name} {self.help}", f"# TYPE {self.name} histogram"]
        total = 0
        for bound, count in zip((*SECONDS, "+Inf"), self.counts, strict=True):
            total += count
            lines.append(f'{self.name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{self.name}_sum {self.sum_s:.6f}", f"{self.name}_count {total}"]


@dataclass
class Gauge:
    """A number that is read when asked for."""

    name: str
    help: str
    read: Callable[[], float]

    def render(self) -> list[str]:
        return [
            f"# HELP {self.name} {self.help}",
            f"# TYPE {self.name} gauge",
            f"{self.name} {self.read():g}",
        ]


class ServerMetrics:
    """What /metrics shows."""

    def __init__(self, gauges: list[Gauge]) -> None:
        self.requests = Counter(
            "nanochat_requests_total", "HTTP requests answered, by status.", "status"
        )
        self.prompt_tokens = Counter("nanochat_prompt_tokens_total", "Tokens of prompts taken in.")
        self.generated_tokens = Counter("nanochat_generated_tokens_total", "Tokens written.")
        self.cancelled = Counter(
            "nanochat_cancelled_total", "Answers given up because the client had gone."
        )
        self.first_token_s = Histogram(
            "nanochat_time_to_first_token_seconds", "From a request to its first token."
        )
        self.answer_s = Histogram("nanochat_answer_seconds", "From a request to its last token.")
        self._gauges = gauges

    def render(self) -> str:
        parts: list[Counter | Histogram | Gauge] = [
            self.requests,
            self.prompt_tokens,
            self.generated_tokens,
            self.cancelled,
            self.first_token_s,
            self.answer_s,
            *self._gauges,
        ]
        return "\n".join(line for part in parts for line in part.render()) + "\n"
