"""How the page of benchmarks shows results: tables, verdicts, sources and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Results = Mapping[str, Mapping[str, Any]]


def names_with(found: Results, prefix: str) -> list[str]:
    return [name for name in found if name.startswith(prefix)]


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def judge(sentence: str, met: bool, goal: str) -> str:
    """Say whether a goal is met."""
    return f"{'Met' if met else '**Missed**'}: {sentence} (goal: {goal})."


def cite(name: str, content: Mapping[str, Any]) -> str:
    parts = [f"`{name}.json`", content["date"], f"commit {content['commit']}"]
    if machine := content.get("machine"):
        cores = count_of(int(machine["cores"]), "core")
        parts += [machine["processor"], cores, f"torch {machine['torch']}"]
    return f"<sub>{', '.join(parts)}</sub>"


def three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def count_of(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
