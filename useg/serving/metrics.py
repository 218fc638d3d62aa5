"""What the service did -> Prometheus's text format (version 0.0.4)."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # bounds of the histogram


class Metrics:
    """Counts requests by route and status, and how long they took."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.seconds: defaultdict[str, list[int]] = defaultdict(lambda: [0] * (len(SECONDS) + 1))
        self.total: defaultdict[str, float] = defaultdict(float)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self.requests[route, status] += 1
        self.seconds[route][bisect_left(SECONDS, seconds)] += 1
        self.total[route] += seconds

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Return all of it, and ``gauges``: name -> (what it is, its value); a name that ends in ``_total`` only grows."""
        lines = _family("useg_requests_total", "counter", "Requests answered, by route and status.")
        lines += [f'useg_requests_total{{route="{route}",status="{status}"}} {count}' for (route, status), count in sorted(self.requests.items())]
        lines += _family("useg_request_seconds", "histogram", "Seconds from a request's head to its answer's end.")
        for route, counts in sorted(self.seconds.items()):
            lines += _histogram("useg_request_seconds", f'route="{route}"', counts, self.total[route])
        for name, (text, value) in gauges.items():
            lines += [*_family(name, "counter" if name.endswith("_total") else "gauge", text), f"{name} {value:.10g}"]
        return "\n".join(lines) + "\n"


def _family(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _histogram(name: str, label: str, counts: Iterable[int], total: float) -> list[str]:
    lines, below = [], 0
    for bound, count in zip((*map(str, SECONDS), "+Inf"), counts, strict=True):
        below += count
        lines.append(f'{name}_bucket{{{label},le="{bound}"}} {below}')
    return [*lines, f"{name}_sum{{{label}}} {total:.6f}", f"{name}_count{{{label}}} {below}"]


def resident_bytes() -> int:
    """Return the memory that this process has in use; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
