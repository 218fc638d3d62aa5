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
from useg.scenes.generate import write_scenes

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


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """Standard input and output of :mod:`forked_torchrun`."""
    program = [sys.executable, str(Path(__file__).parent / "forked_torchrun.py")]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as server:
        yield server
        server.stdin.close()


def start(torchrun, count, restarts, texts, arguments):
    """Start a job, whose output goes to ``out.txt`` and ``err.txt``; return the agent's id."""
    files = [str(texts / name) for name in ("out.txt", "err.txt")]
    torchrun.stdin.write(json.dumps([count, restarts, *files, arguments]) + "\n")
    torchrun.stdin.flush()
    return int(torchrun.stdout.readline())


def status(torchrun):
    """Wait for the job; return the agent's exit status."""
    return int(torchrun.stdout.readline())


def training(scenes, out, steps, *more):
    settings = [
        word
        for key, value in {**QUICK, "train.steps": steps}.items()
        for word in ("--set", f"{key}={value}")
    ]
    return ["train", str(scenes), "--out", str(out), "--quiet", *settings, *more]


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_two_processes_take_the_same_steps_as_one(torchrun, scenes, tmp_path):
    texts = []
    for count in (1, 2):
        start(torchrun, count, 0, tmp_path, training(scenes, tmp_path / str(count), 8))
        assert status(torchrun) == 0, (tmp_path / "err.txt").read_text()
        texts.append((tmp_path / "out.txt").read_text().replace("/1/", "/2/"))
    # Printed once, with the same scores. Rounding may move the last digit of a score.
    assert NUMBER.sub("", texts[0]) == NUMBER.sub("", texts[1])
    shown = [[float(number) for number in NUMBER.findall(text)] for text in texts]
    assert shown[0] == pytest.approx(shown[1], abs=0.11)
    assert np.allclose(losses(tmp_path / "1"), losses(tmp_path / "2"), rtol=1e-4)
    scores = [
        json.loads((tmp_path / name / "scores.json").read_text())["mean_iou"] for name in "12"
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def kill_one(agent, out, number):
    """Kill one of the agent's processes as soon as there is a log; return the log's inode."""
    deadline = time.monotonic() + 300
    while not (out / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [
        int(word)
        for task in Path(f"/proc/{agent}/task").iterdir()
        for word in (task / "children").read_text().split()
    ]
    assert len(workers) == 2
    begun = (out / "log.jsonl").stat().st_ino
    os.kill(workers[number], signal.SIGKILL)
    return begun


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(),
    reason="the processes that torchrun has started are looked up in Linux's /proc",
)
def test_death_of_a_process_ends_or_restarts_the_others_within_a_minute(torchrun, scenes, tmp_path):
    out, killed = tmp_path / "run", time.monotonic()
    kill_one(start(torchrun, 2, 0, tmp_path, training(scenes, out, 20)), out, 0)
    assert status(torchrun) != 0
    assert time.monotonic() < killed + 120
    assert "[rank" not in (tmp_path / "err.txt").read_text(), "the other one ends with a sentence"
    (out / "log.jsonl").unlink()
    agent = start(torchrun, 2, 1, tmp_path, training(scenes, out, 20, "--resume"))
    begun, killed = kill_one(agent, out, 1), time.monotonic()
    while (out / "log.jsonl").stat().st_ino == begun:
        assert time.monotonic() < killed + 120
        time.sleep(0.05)
    assert status(torchrun) == 0
    assert [
        json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()
    ] == list(range(1, 21))
    assert (out / "report.html").exists()


def test_batch_that_cannot_be_divided_among_the_processes_is_refused(scenes, tmp_path):
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "useg"]
    arguments = training(scenes, tmp_path / "run", 4, "--set", "train.batch=5")
    done = subprocess.run(
        [sys.executable, "-m", *words, *arguments],
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
