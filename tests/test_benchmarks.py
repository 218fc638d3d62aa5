"""The page of benchmarks says what the results say, and what is missed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from waiting import eventually

from useg.machine import in_parallel

ROOT = Path(__file__).parent.parent
ORIGIN = {
    "commit": "abc1234",
    "date": "2026-11-23",
    "machine": {"processor": "a processor", "cores": "2", "torch": "2.13.0"},
}


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delitem(sys.modules, "board", raising=False)
    import board

    return board


def test_the_page_is_fresh(board: ModuleType) -> None:
    assert (ROOT / "docs" / "benchmarks.md").read_text() == board.page(board.results())


def test_what_was_not_measured_says_how_it_would_be(board: ModuleType) -> None:
    page = board.page({})
    assert page.count("Not measured yet") == len(board.SECTIONS)
    assert all(command in page for _, command, _ in board.SECTIONS)


def row(name: str, speed: float) -> dict[str, Any]:
    return {
        "name": name,
        "precision": "bf16",
        "images_per_second": speed,
        "by_step": speed,
        "share_of_peak": 0.5,
    }


@pytest.mark.parametrize(
    ("speed", "said"),
    [(24.0, "Met: 3.00 times as fast as Peer"), (20.0, "**Missed**: 2.50 times as fast as Peer")],
)
def test_training(board: ModuleType, speed: float, said: str) -> None:
    ratios = [
        {"of": "Peer", "measured": key, "value": speed / 8, "bar": bar}
        for key, bar in (("images_per_second", None), ("by_step", 3.0))
    ]
    rows, left = [row("useg", speed), row("Peer", 8.0)], {"Other": "its Python was not given"}
    page = board.page(
        {
            "peers_M1": {
                **ORIGIN,
                "title": "A U-Net",
                "rows": rows,
                "ratios": ratios,
                "left_out": left,
                "rounds": [{}] * 3,
            }
        }
    )
    assert f"| **useg train** | bf16 | {speed:.1f} |" in page
    assert f"Medians of 3 rounds. {said}, by step (goal: at least 3)." in page
    assert "Left out: Other (its Python was not given)." in page
    assert (
        "<sub>`peers_M1.json`, 2026-11-23, commit abc1234, a processor, 2 cores, torch 2.13.0</sub>"
        in page
    )


@pytest.mark.parametrize(
    ("name", "score", "reached", "said"),
    [
        (
            "carla",
            0.5,
            {"seconds": 60.0, "share_of_course": 0.1},
            "Met: the course's score is reached in 0.10 of its time (goal: at most 0.2).",
        ),
        (
            "carla",
            0.5,
            {"seconds": 180.0, "share_of_course": 0.3},
            "**Missed**: the course's score is reached in 0.30 of its time",
        ),
        (
            "carla",
            0.3,
            None,
            "**Missed**: no run reaches the course's score (goal: in at most 0.2 of its time). "
            "**Missed**: 2 minutes do not exceed that score.",
        ),
        (
            "street",
            0.5,
            {"seconds": 180.0, "share_of_course": 0.3},
            "The course's score is reached in 0.30 of its time; `--minutes 2` is the shortest",
        ),
    ],
)
def test_time_to_accuracy(
    board: ModuleType, name: str, score: float, reached: dict[str, float] | None, said: str
) -> None:
    minutes = {
        "10": {"mean_iou": 0.6, "wall_seconds": 600.0},
        "2": {"mean_iou": score, "wall_seconds": 120.0},
    }
    course = {"mean_iou": 0.4, "wall_seconds": 600.0}
    runs = {
        "10": [{"mean_iou": 0.6}],
        "2": [{"mean_iou": score - 0.01}, {"mean_iou": score + 0.01}],
    }
    content = {
        "dataset": name,
        "epochs": 40,
        "course": course,
        "course_runs": [course],
        "minutes": minutes,
        "runs": runs,
    }
    page = board.page({"accuracy_street": {**ORIGIN, **content, "time_to_accuracy": reached}})
    assert said in page
    assert page.index("--minutes 2`") < page.index("--minutes 10`")
    seeds = f"{score - 0.01:.3f}, {score + 0.01:.3f}"
    assert f"| `useg train --minutes 2` | 120 | {score:.3f} | {seeds} | 2 | 0.20 |" in page


def test_trials(board: ModuleType) -> None:
    averages = {"ema_0.02": 0.5, "ema_0.1": 0.5, "new_statistics": 0.4}
    scores = [
        ("plain", 0, 0.4),
        ("lite0", 0, 0.5),
        ("lite0", 1, 0.6),
        ("half", 0, 0.55),
        ("half", 1, 0.8),
        ("half, elastic", 1, 0.7),
        ("half, elastic", 2, 0.9),
    ]
    runs = [
        {"variant": variant, "set": "street", "seed": seed, "mean_iou": score, **averages}
        for variant, seed, score in scores
    ]
    page = board.page({"trials": {**ORIGIN, "runs": runs}})
    assert "| plain |  | 0.400, 1 seed |" in page
    assert "| lite0 | plain | 0.550, +0.100, 2 seeds |" in page
    assert "| half | lite0 | 0.675, +0.125 (+0.050 .. +0.200), 2 seeds |" in page
    assert "| half, elastic | half | 0.800, -0.100, 2 seeds |" in page
    assert "weights averaged over 2 % of the steps: -0.1357" in page


def test_the_gpu_check_runs_on_a_simulated_device(tmp_path: Path) -> None:
    parts = ["start-native", "tests", "equality", "tiled", "inference", "runtimes"]
    done = subprocess.run(
        [ROOT / "scripts" / "gpu-check", "--simulate", "--out", "gpu.json", "--only", *parts],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every check passed" in done.stdout
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert {"commit", "machine", "seed", "date"} <= content.keys()
    assert list(content["parts"]) == ["data", *parts]
    assert content["parts"]["tests"]["tests"] == "not run: no GPU"


def test_a_part_of_the_gpu_check_that_hangs_or_dies_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    def hang(options: Any, content: dict[str, Any]) -> None:
        content["found"] = 1
        time.sleep(60)

    def die(options: Any, content: dict[str, Any]) -> None:
        os._exit(3)

    def fail(options: Any, content: dict[str, Any]) -> None:
        content["found"] = 2
        raise ValueError("no")

    options = gpu.Options(simulate=True, folder=tmp_path, minutes=0, seed=0)
    monkeypatch.setattr(gpu, "WRITE_SECONDS", 0.05)
    found = {}
    for part in (hang, die, fail):
        monkeypatch.setitem(gpu.PARTS, part.__name__, (part, 10.0))
        found[part.__name__] = gpu.run_part(part.__name__, options, 2.0 if part is hang else 60.0)
    assert (found["hang"]["found"], found["hang"]["failed"]) == (1, "stopped after 2 seconds")
    assert found["die"]["failed"] == "the process ended with status 3"
    assert (found["fail"]["found"], found["fail"]["failed"]) == (2, "ValueError: no")
    assert len(gpu.failed_checks(found)) == 3


def test_what_a_gpu_did_not_run_says_so(board: ModuleType) -> None:
    cases = {
        "M1": {
            "loop_images_per_second": 2848.1,
            "loop_busy_share": 0.46,
            "step_images_per_second": {"bf16": 6703.9},
        },
        "lite0": {"not_run": "no time"},
    }
    parts = {
        "machine": {"gpu": "a GPU"},
        "training": {"cases": cases},
        "inference": {"not_run": "no time"},
        "repeat": {"checks": [{"what": "a", "passed": True}, {"what": "b", "passed": False}]},
    }
    page = board.page({"gpu_a": {**ORIGIN, "parts": parts}})
    assert "| M1: training | not run | 2848 | 46 % |" in page
    assert "| lite0: training | not run | not run |  |" in page
    assert "**Missed**: 1 of 2 checks pass (goal: all). Not run: inference (no time)." in page


def test_the_start_of_a_gpu_is_on_the_page(board: ModuleType) -> None:
    start = {
        "256x192, batch 4": {"seconds_of_first_step": 14.2, "images_per_second": 750.1},
        "prediction": {
            "images_per_second": 900.0,
            "seconds_of_first_forward_in_another_thread": 3.14,
        },
    }
    plan = {"seconds": 57.9, "phases": {"_loop": 20.4, "x": 0.4}, "predict_gpu": {"seconds": 4.25}}
    parts = {
        "machine": {"gpu": "a GPU"},
        "start-cudnn": {"failed": "stopped"},
        "start-native": start,
        "plan": plan,
    }
    page = board.page({"gpu_a": {**ORIGIN, "parts": parts}})
    assert "| by PyTorch | 14.2 | 750 | 900 | 3.14 |" in page
    assert "| by cuDNN | not run | not run | not run | not run |" in page
    assert "A timed run took 58 s (in seconds: _loop 20). The first prediction took 4.2 s." in page


def test_the_phases_of_a_job_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from phases import StackSampler

    def prepare() -> None:
        eventually(lambda: "work > prepare" in sampler.seconds)

    def wait(_: object) -> None:
        eventually(lambda: any("in_parallel" in line for line in sampler.lines))

    def work() -> None:
        prepare()
        list(in_parallel(wait, [0], threads=1))

    with StackSampler(["prepare", "work"]) as sampler:
        work()
    found = sampler.found()
    assert {"work > prepare", "work"} <= found["phases"].keys()
    assert any(line.startswith("machine.py:") for line in found["lines"])


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        (0.53, "**Missed**: 88 % of the score of all labels, 0.600"),
        (0.55, "Met: 92 % of the score of all labels, 0.600"),
    ],
)
def test_labelling_counts_the_last_round_or_training_on_its_strokes(
    board: ModuleType, trained: float, said: str
) -> None:
    rounds = [
        {"pictures": 3, "strokes": 9, "painted": 0.1, "mean_iou": 0.4, "round_cpu_seconds": 30.0},
        {"pictures": 5, "strokes": 20, "painted": 0.2, "mean_iou": 0.5, "round_cpu_seconds": 40.0},
    ]
    again = {**rounds[1], "looks": 2, "strokes": 30, "round_cpu_seconds": 35.0}
    content = {
        **ORIGIN,
        "fold": "street",
        "pool": 20,
        "strokes": [*rounds, again],
        "whole_masks": rounds[:1],
        "trained_on_all_labels": {"minutes": 10, "mean_iou": 0.6},
        "trained_on_strokes": {"minutes": 10, "mean_iou": trained, "shown_mean_iou": 0.41},
    }
    page = board.page({"labelling_street": content, "labelling_frames": {}})
    assert "| 3 | 9 | 10 % | 0.400 | 0.400 |" in page
    assert "| 5 | 20 | 20 % | 0.500 | not run |" in page
    assert "| 5, again | 30 | 20 % | 0.500 | not run |" in page
    assert said in page
    assert "The page shows the score of an earlier model, 0.410." in page
    assert "Met: the median round takes 35 s of one core (goal: 60 s)." in page
