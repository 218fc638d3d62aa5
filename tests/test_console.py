"""How fast it goes and how long it will take, on a terminal and in a log."""

from __future__ import annotations

import io
import sys

import pytest

from useg import console
from useg.console import Reporter, format_table


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    return now


def test_a_line_every_half_minute_off_a_terminal(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Reporter() as reporter:
        count = reporter.timed("labelling")
        for done in range(1, 131):
            clock[0] += 0.5
            count(done, 250)
    assert capsys.readouterr().err.splitlines() == [
        "labelling 60/250  2.0 images/s  1:35 left",
        "labelling 120/250  2.0 images/s  1:05 left",
    ]


def test_the_speed_is_that_of_the_last_hundred(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Reporter() as reporter:
        count = reporter.timed("labelling")
        for done in range(1, 1101):  # the first thousand were there before
            clock[0] += 1 if done > 1000 else 0
            count(done, 1200)
    assert capsys.readouterr().err.splitlines()[-1].startswith("labelling 1090/1200  1.1 images/s")


def test_nothing_when_quiet(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(quiet=True) as reporter:
        count = reporter.timed("labelling")
        clock[0] += 100
        count(1, 2)
    assert capsys.readouterr().err == ""


def test_a_validation_line_prints_the_score_in_percent(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"epoch": 0.7, "step": 28, "loss": 2.0957, "mean_iou": 0.0634, "seconds": 66.0}
    with Reporter() as reporter:
        reporter.validated(row)
    line = "epoch    0.7  step     28  loss 2.0957  mIoU  6.3 %  1:06"
    assert capsys.readouterr().err.splitlines() == [line]


def test_run_with_many_validations_prints_about_fifty_scores_and_the_last_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Reporter() as reporter:
        for step in range(1, 2951):
            row = {"epoch": step / 5, "step": step, "loss": 1.0, "mean_iou": 0.5, "seconds": 1.0}
            if step % 5 == 0:
                reporter.validated(row)
            reporter.step({**row, "images_per_second": 1.0}, 2950, 0.0)
    lines = capsys.readouterr().err.splitlines()
    assert 45 <= len(lines) <= 51
    assert "step   2950" in lines[-1]


def test_a_table_has_one_column_to_the_left_and_the_others_to_the_right() -> None:
    assert format_table(("class", "IoU"), [("road", "93.1 %"), ("a [b] c", "8.0 %")]) == [
        "class       IoU",
        "road     93.1 %",
        "a [b] c   8.0 %",
    ]


def test_a_long_row_of_a_table_is_not_wrapped() -> None:
    assert format_table(("a", "b"), [("x" * 500, "y")])[1] == "x" * 500 + "  y"


def test_what_would_command_the_terminal_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    console.show("a\x1b[2J\udce9.png")
    with Reporter() as reporter:
        reporter.say("b\x1b[2J.png")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("a\\x1b[2J\\xe9.png\n", "b\\x1b[2J.png\n")


@pytest.mark.parametrize("problem", [BrokenPipeError, OSError])
def test_a_reader_that_goes_away_does_not_stop_the_job(
    problem: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise problem

    monkeypatch.setattr(sys, "stderr", Gone())
    with Reporter() as reporter:
        reporter.say("first")
        reporter.say("second")
