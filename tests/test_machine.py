"""How threads wait, by what else the machine does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from useg import machine

TOLD = "import os; from useg import machine; machine.others_run = lambda: {busy}; machine.tune(); print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("running", "busy"),
    [
        (["1"] * 5, False),
        (["2"] * 5, True),
        (["1", "3", "1", "1", "2"], False),
        (["3", "2", "2", "1", "1"], True),
        (["?"], True),
    ],
)
def test_what_runs_for_a_moment_does_not_count(
    running: list[str], busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(running)
    monkeypatch.setattr(Path, "read_text", lambda path: f"0.1 0.2 0.3 {next(answers)}/345 678\n")
    assert machine.others_run() is busy


def test_a_system_that_does_not_say_counts_as_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert machine.others_run()


@pytest.mark.parametrize(
    ("busy", "own", "expected"), [(False, None, "None"), (True, None, "2000"), (True, "7", "7")]
)
def test_threads_sleep_where_others_run_unless_the_user_says_otherwise(
    busy: bool, own: str | None, expected: str
) -> None:
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    environment |= {"GOMP_SPINCOUNT": own} if own else {}
    told = subprocess.run(
        [sys.executable, "-c", TOLD.format(busy=busy)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == expected
