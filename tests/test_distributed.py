"""Two processes train as one with the same batch; a process that dies is started again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from useg import distributed
from useg.scenes.scene import write_scenes

QUICK = {
    "train.precision": "fp32",
    "train.batch": 4,
    "model.width": 4,
    "model.depth": 2,
    "data.size": "64x48",
    "data.split": "random",
}
NUMBER = re.compile(r"\d+(?:\.\d+)?")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "USEG_CACHE": "off",
    "PYTHONWARNINGS": "ignore",
    # The machine may have one GPU, and the processes are two.
    "USEG_DEVICE": "cpu",
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks") / "scenes"
    write_scenes(folder, 14, (96, 72), seed=1)
    return folder


def command(count, scenes, out, steps, *more):
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        *more,
        "-m",
        "useg",
    ]
    settings = [
        word
        for key, value in {**QUICK, "train.steps": steps}.items()
        for word in ("--set", f"{key}={value}")
    ]
    return [*start, "train", str(scenes), "--out", str(out), "--quiet", *settings]


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_two_processes_take_the_same_steps_as_one(scenes, tmp_path):
    done = [
        subprocess.run(
            command(count, scenes, tmp_path / str(count), 8),
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        for count in (1, 2)
    ]
    assert [each.returncode for each in done] == [0, 0], done[1].stderr
    # Printed once, with the same scores. Rounding may move the last digit of a score.
    texts = [each.stdout.replace("/1/", "/2/") for each in done]
    assert NUMBER.sub("", texts[0]) == NUMBER.sub("", texts[1])
    shown = [[float(number) for number in NUMBER.findall(text)] for text in texts]
    assert shown[0] == pytest.approx(shown[1], abs=0.11)
    assert np.allclose(losses(tmp_path / "1"), losses(tmp_path / "2"), rtol=1e-4)
    scores = [
        json.loads((tmp_path / name / "scores.json").read_text())["mean_iou"] for name in "12"
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def kill_one(agent, out, number):
    """Kill one of the processes that torchrun has started, as soon as there is a log."""
    deadline = time.monotonic() + 300
    while not (out / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = [
        int(word)
        for task in Path(f"/proc/{agent.pid}/task").iterdir()
        for word in (task / "children").read_text().split()
    ]
    workers = [pid for pid in children if b"useg" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    begun = (out / "log.jsonl").stat().st_ino
    os.kill(workers[number], signal.SIGKILL)
    return begun


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(),
    reason="the processes that torchrun has started are looked up in Linux's /proc",
)
def test_death_of_a_process_ends_or_restarts_the_others_within_a_minute(scenes, tmp_path):
    out, errors = tmp_path / "run", tmp_path / "errors.txt"
    with (
        errors.open("w") as file,
        subprocess.Popen(
            command(2, scenes, out, 20), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=file
        ) as agent,
    ):
        kill_one(agent, out, 0)
        assert agent.wait(timeout=120) != 0
    assert "[rank" not in errors.read_text(), "the other one ends with a sentence"
    again = [*command(2, scenes, out, 20, "--max-restarts", "1"), "--resume"]
    (out / "log.jsonl").unlink()
    with subprocess.Popen(
        again, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as agent:
        begun, killed = kill_one(agent, out, 1), time.monotonic()
        while (out / "log.jsonl").stat().st_ino == begun:
            assert time.monotonic() < killed + 120
            time.sleep(0.05)
        assert agent.wait(timeout=300) == 0
    assert [
        json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()
    ] == list(range(1, 21))
    assert (out / "report.html").exists()


def test_batch_that_cannot_be_divided_among_the_processes_is_refused(scenes, tmp_path):
    done = subprocess.run(
        [*command(2, scenes, tmp_path / "run", 4), "--set", "train.batch=5"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert (
        "train.batch = 5 cannot be divided among 2 processes; set it to a multiple of 2"
        in done.stderr
    )


def test_single_process_changes_nothing():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    assert distributed.all_reduce_with_gradient(values) is values
    assert distributed.all_reduce_sum(values) is values
    assert (
        distributed.process_rank(),
        distributed.world_size(),
        distributed.broadcast_from_main("x"),
        distributed.any_process(True),
        distributed.is_main_process(),
        distributed.is_restarted(),
    ) == (0, 1, "x", True, True, False)
    model = nn.Conv2d(1, 1, 1)
    assert distributed.wrap_parallel(model) is model


def test_synced_batch_norm_of_one_process_equals_torchs():
    x = torch.randn(4, 3, 5, 5)
    norms = [nn.BatchNorm2d(3), distributed.SyncedBatchNorm(3)]
    answers = [norm(x) for norm in norms]
    assert torch.equal(*answers)
    assert torch.equal(norms[0].running_var, norms[1].running_var)
