"""A run goes on to the bit after an interruption, a kill, or a full disk."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import log_of, make_set, numbers_of, quick

import useg
from useg.cli import main
from useg.config import Settings, read_settings
from useg.data.dataset import Dataset
from useg.errors import UsageError
from useg.models import segmenter
from useg.training import checkpoint, loop, trainer
from useg.training.checkpoint import SaveClock, StopRequest

SOAK = os.environ.get("USEG_SOAK") == "1"


@pytest.fixture(autouse=True)
def save_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SAVE_SHARE", 1e9)


class Stopper(trainer.SilentProgress):
    """Asks the run to stop, as a signal would: while the held-out pictures of a step are scored, else after the step."""

    def __init__(self, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at, self.stop = at, StopRequest()
        monkeypatch.setattr(loop, "interruptible", lambda: nullcontext(self.stop))

    def step(self, row: dict[str, Any], steps: int, seconds_left: float) -> None:
        self.stop.wanted = self.stop.wanted or row["step"] == self.at

    def validated(self, row: dict[str, Any]) -> None:
        self.step(row, 0, 0.0)


def result(run: Path) -> tuple[bytes, list[tuple[float, float]], bytes]:
    return (
        (run / "model.safetensors").read_bytes(),
        numbers_of(run),
        (run / "run.toml").read_bytes(),
    )


KINDS = (
    {}, {"model__padding": "valid"}, {"train__precision": "bf16"}, {"train__accumulate": 3},
    {"model__encoder": "lite0", "model__pretrained": False, "model__depth": None, "train__accumulate": 2},
)  # fmt: skip


@pytest.mark.parametrize("seed", range(50 if SOAK else 5))
def test_an_interrupted_run_that_goes_on_equals_an_unbroken_one_to_the_bit(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_set(tmp_path / "data")
    settings = quick(model__dropout=0.3, train__epochs=5, **KINDS[seed % len(KINDS)])
    loop.fit(dataset, tmp_path / "whole", settings)
    at = sorted(random.Random(seed).sample(range(1, 9), 2))
    ends = [
        step + step % 2 for step in (at[0], at[1] + 1)
    ]  # pictures are scored at even steps; after an odd one, the next is done, too
    run = loop.fit(dataset, tmp_path / "run", settings, Stopper(at[0], monkeypatch))
    assert (run.interrupted, len(log_of(tmp_path / "run"))) == (True, ends[0])
    resolved = read_settings(tmp_path / "run" / "run.toml")
    run = loop.fit(
        dataset, tmp_path / "run", resolved, Stopper(at[1] + 1, monkeypatch), resume=True
    )
    assert (run.interrupted, len(log_of(tmp_path / "run"))) == (ends[1] < 10, ends[1])
    monkeypatch.undo()
    run = loop.fit(dataset, tmp_path / "run", resolved, resume=True)
    assert not run.interrupted
    assert result(tmp_path / "run") == result(tmp_path / "whole")
    assert [row["step"] for row in run.log] == list(range(1, 11))


class Forks:
    """Runs of ``useg train`` as processes of their own, one at a time; ``words`` are those of ``forked.py``."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.errors, self.cache = folder / "errors.txt", folder / "cache"
        environment = {**os.environ, "USEG_CACHE": str(self.cache), "OMP_NUM_THREADS": "1"}
        with self.errors.open("wb") as errors:
            program = [sys.executable, str(Path(__file__).with_name("forked.py")), *words]
            self.server = subprocess.Popen(
                program,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *problem: object) -> None:
        self.server.kill()
        self.server.communicate()

    def start(self, data: Path, out: Path) -> int:
        """Begin a run or go on with it; returns the process's id."""
        settings = (
            "model.width=4",
            "model.depth=2",
            "model.dropout=0.2",
            "train.batch=3",
            "train.precision=fp32",
            "data.size=48x32",
        )
        words = ["--quiet", "train", str(data), "--out", str(out), "--epochs", "8", "--resume"]
        self.server.stdin.write(
            json.dumps([*words, *(word for setting in settings for word in ("--set", setting))])
            + "\n"
        )
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def ended(self, seconds: float) -> bool:
        """Wait for the end of the process, but no longer than that."""
        return bool(select.select([self.server.stdout], [], [], seconds)[0])

    def status(self) -> int:
        """Wait for the end of the process; returns its exit status, or the signal that killed it as a negative number."""
        return int(self.server.stdout.readline())


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("forks")) as started:
        yield started


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "data"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for k, pair in enumerate(make_set(folder / "made", 8, 0).pairs):
        pair.image.rename(folder / "images" / f"a{k}.png")
        pair.mask.rename(folder / "masks" / f"a{k}.png")
    return folder


def everything(run: Path) -> dict[str, Any]:
    """What a run leaves, but for what tells the time."""
    exact = {
        path.name: path.read_bytes()
        for path in [
            *run.glob("*.toml"),
            *run.glob("*.csv"),
            *run.glob("*.safetensors"),
            *run.glob("pictures/*"),
        ]
    }
    scores = json.loads((run / "scores.json").read_text())
    left = sorted(path.name for path in run.iterdir())
    return {
        **exact,
        "scores": (scores["mean_iou"], scores["classes"]),
        "log": numbers_of(run),
        "files": left,
    }


READERS = {"state.pt": partial(torch.load, weights_only=True), "model.safetensors": segmenter.load_model, "run.toml": read_settings,
           "scores.json": lambda path: json.loads(path.read_text())}  # fmt: skip


def damaged(run: Path) -> list[str]:
    """Names of the files that nobody can read."""
    found = []
    for name in READERS:
        try:
            if (run / name).exists():
                READERS[name](run / name)
        except (
            UsageError,
            RuntimeError,
            ValueError,
            EOFError,
            OSError,
            pickle.UnpicklingError,
        ):  # an empty file: OSError
            found.append(name)
    return found


def kills(
    forks: Forks, data: Path, run: Path, life: float, seed: int
) -> Iterator[tuple[str, list[str]]]:
    """Kill a run five times, and go on with it each time: first while it starts, then at random moments of what may be left of its life.

    Yields:
        What the run was at (``"start"``, ``"training"``, ``"report"``), and which of its files are damaged.
    """
    draw, left, killed = random.Random(seed), 0.15 * life, 0
    while killed < 5:
        moment, pid = draw.uniform(0, left), forks.start(data, run)
        if not forks.ended(moment):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        status = forks.status()
        assert status in (0, -signal.SIGKILL), forks.errors.read_text()
        left = (
            max(left - moment + 0.15 * life, 0.3 * life) if killed else life
        )  # it starts again before it goes on
        if status:
            killed += 1
            steps = len((run / "log.jsonl").read_bytes()) if (run / "log.jsonl").exists() else 0
            yield (
                "report" if (run / "curves.png").exists() else "training" if steps else "start",
                damaged(run),
            )


def lived(forks: Forks, data: Path, run: Path) -> float:
    """Let a run go on to its end; returns how many seconds that took."""
    began = time.perf_counter()
    forks.start(data, run)
    assert forks.status() == 0, forks.errors.read_text()
    return time.perf_counter() - began


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(
    forks: Forks, scenes: Path, tmp_path: Path
) -> None:
    lived(forks, scenes, tmp_path / "whole")
    life, phases = lived(forks, scenes, tmp_path / "again"), set()
    for seed in range(100 if SOAK else 5):
        run = tmp_path / f"run {seed}"
        shutil.rmtree(forks.cache)  # to be killed while it decodes, too
        for phase, names in kills(forks, scenes, run, life, seed):
            phases.add(phase)
            assert names == []
        lived(forks, scenes, run)
        assert everything(run) == everything(tmp_path / "whole")
    assert {"training", "report"} <= phases


def test_saving_in_the_plain_way_is_caught_by_the_same_kills(scenes: Path, tmp_path: Path) -> None:
    with Forks(tmp_path, "plain") as forks:
        life = lived(forks, scenes, tmp_path / "whole")
        found = (
            names
            for seed in range(5)
            for _, names in kills(forks, scenes, tmp_path / f"run {seed}", life, seed)
        )
        assert any("state.pt" in names for names in found)


def test_a_run_that_has_ended_says_so_and_keeps_a_small_state(scenes: Path, tmp_path: Path) -> None:
    settings = {
        "model.width": 2,
        "model.depth": 1,
        "train.batch": 3,
        "train.steps": 4,
        "data.size": "48x32",
    }
    run = useg.train(scenes, tmp_path / "run", settings=settings)
    before = result(tmp_path / "run")
    assert (tmp_path / "run" / "state.pt").stat().st_size < 4096
    (tmp_path / "run" / "report.html").unlink()
    again = useg.train(scenes, tmp_path / "run", resume=True)
    assert result(tmp_path / "run") == before
    assert (again.scores.mean_iou, len(again.log)) == (run.scores.mean_iou, 4)
    assert (tmp_path / "run" / "report.html").exists()


def test_resume_begins_a_run_that_has_not_begun(scenes: Path, tmp_path: Path) -> None:
    settings = {
        "model.width": 2,
        "model.depth": 1,
        "train.batch": 3,
        "train.steps": 2,
        "data.size": "48x32",
    }
    assert len(useg.train(scenes, tmp_path / "run", settings=settings, resume=True).log) == 2


def test_other_data_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_set(tmp_path / "data")
    first = loop.fit(dataset, tmp_path / "run", quick(), Stopper(3, monkeypatch))
    dataset.pairs[0].mask.write_bytes(dataset.pairs[1].mask.read_bytes())
    with pytest.raises(
        UsageError,
        match=r"was saved with other data or settings \('6 training pictures, .*; give the data as it was",
    ):
        loop.fit(dataset, tmp_path / "run", first.settings, resume=True)
    other = first.settings.with_({"train.learning_rate": 0.5})
    with pytest.raises(
        UsageError, match=r"'train.learning_rate = 0.01' there, 'train.learning_rate = 0.5' here"
    ):
        loop.fit(make_set(tmp_path / "data"), tmp_path / "run", other, resume=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-30],
        lambda content: b"",
        lambda content: b"x" * 100,
        lambda content: content[: len(content) // 2],
    ],
)
def test_a_damaged_state_is_one_clear_sentence(
    damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_set(tmp_path / "data")
    first = loop.fit(dataset, tmp_path / "run", quick(), Stopper(3, monkeypatch))
    path = tmp_path / "run" / "state.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        UsageError,
        match=r"state.pt is damaged, or no state of a run; remove it to start this run from its beginning",
    ):
        loop.fit(dataset, tmp_path / "run", first.settings, resume=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Settings, Path]:
    """A data set, settings, and the run that they make when nothing goes wrong."""
    folder = tmp_path_factory.mktemp("whole")
    dataset, settings = make_set(folder / "data"), quick(train__epochs=5, model__dropout=0.2)
    loop.fit(dataset, folder / "run", settings)
    return dataset, settings, folder / "run"


class At(trainer.SilentProgress):
    """Does something after a step."""

    def __init__(self, at: int, what: Callable[[], None]) -> None:
        self.at, self.what = at, what

    def step(self, row: dict[str, Any], steps: int, seconds_left: float) -> None:
        if row["step"] == self.at:
            self.what()


def fails(number: int, only: str = "") -> Callable[..., None]:
    """A call to the system that fails, of files whose name ends so."""

    def fail(*arguments: Any, **more: Any) -> None:
        if str(arguments[-1]).endswith(only):
            raise OSError(number, os.strerror(number))
        os.rename(*arguments)

    return fail


def write_half(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content[: len(content) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def move_away(patch: pytest.MonkeyPatch, run: Path) -> None:
    run.rename(run.with_name("away"))


def put_a_file_there(patch: pytest.MonkeyPatch, run: Path) -> None:
    move_away(patch, run)
    run.touch()


def fill_the_log(patch: pytest.MonkeyPatch, run: Path) -> None:
    """Let what is written to the open log land on a device that is always full."""
    opened = next(
        int(link.name)
        for link in Path("/proc/self/fd").iterdir()
        if os.path.realpath(link) == str(run / "log.jsonl")
    )
    os.dup2(os.open("/dev/full", os.O_WRONLY), opened)


def remount(patch: pytest.MonkeyPatch, run: Path) -> None:
    patch.setattr(os, "fsync", fails(errno.EROFS))
    patch.setattr(Path, "unlink", fails(errno.EROFS))


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch, Path], object], str]] = {
    "disk full while writing": (
        lambda patch, run: patch.setattr(Path, "write_bytes", write_half),
        "No space left on device",
    ),
    "disk full while flushing": (
        lambda patch, run: patch.setattr(os, "fsync", fails(errno.ENOSPC)),
        "No space left on device",
    ),
    "disk full while renaming": (
        lambda patch, run: patch.setattr(os, "replace", fails(errno.ENOSPC)),
        "No space left on device",
    ),
    "quota exceeded": (
        lambda patch, run: patch.setattr(os, "fsync", fails(errno.EDQUOT)),
        "Disk quota exceeded",
    ),
    "I/O error": (
        lambda patch, run: patch.setattr(os, "fsync", fails(errno.EIO)),
        "Input/output error",
    ),
    "read-only": (
        lambda patch, run: patch.setattr(os, "open", fails(errno.EROFS)),
        "Read-only file system",
    ),
    "read-only while writing": (remount, "Read-only file system"),
    "permission lost": (
        lambda patch, run: patch.setattr(os, "open", fails(errno.EACCES)),
        "Permission denied",
    ),  # root has them all
    "too many open files": (
        lambda patch, run: patch.setattr(os, "open", fails(errno.EMFILE)),
        "Too many open files",
    ),
    "folder vanished": (move_away, "No such file or directory"),
    "a file in its place": (put_a_file_there, "Not a directory"),
    "model written, state not": (
        lambda patch, run: patch.setattr(os, "replace", fails(errno.ENOSPC, "state.pt")),
        "No space left on device",
    ),
    "log full": (fill_the_log, "No space left on device"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_disk_that_fails_leaves_the_last_good_state(
    fault: str, whole: tuple[Dataset, Settings, Path], tmp_path: Path
) -> None:
    dataset, settings, unbroken = whole
    run, away, (plant, words) = tmp_path / "run", tmp_path / "away", FAULTS[fault]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UsageError) as caught:
        loop.fit(dataset, run, settings, At(5, lambda: plant(patch, run)))
    assert re.fullmatch(rf"\S+ cannot be written \({words}\); .+", str(caught.value))
    if away.exists():
        run.unlink(missing_ok=True)
        away.rename(run)
    assert torch.load(run / "state.pt", weights_only=True)["step"] == 5
    loop.fit(dataset, run, read_settings(run / "run.toml"), resume=True)
    assert result(run) == result(unbroken)
    assert sorted(path.name for path in run.iterdir()) == sorted(
        path.name for path in unbroken.iterdir()
    )


@pytest.mark.parametrize("at", range(1, 20, 3))
def test_a_disk_that_fills_up_at_any_file_leaves_the_last_good_state(
    at: int, whole: tuple[Dataset, Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, settings, unbroken = whole
    real, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 3 + at:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\); "):
        loop.fit(dataset, tmp_path / "run", settings)
    monkeypatch.setattr(os, "fsync", real)
    loop.fit(dataset, tmp_path / "run", read_settings(tmp_path / "run" / "run.toml"), resume=True)
    assert result(tmp_path / "run") == result(unbroken)


def test_a_state_that_the_disk_does_not_give_is_one_clear_sentence(
    whole: tuple[Dataset, Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole[2], tmp_path / "run")
    monkeypatch.setattr(torch, "load", fails(errno.EIO))
    with pytest.raises(
        UsageError,
        match=r"state.pt cannot be read \(Input/output error\); make it readable and go on with --resume",
    ):
        loop.fit(
            whole[0], tmp_path / "run", read_settings(tmp_path / "run" / "run.toml"), resume=True
        )


def test_a_report_that_cannot_be_written_is_written_later(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "model.width": 2,
        "model.depth": 1,
        "train.batch": 3,
        "train.steps": 2,
        "data.size": "48x32",
    }
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails(errno.EDQUOT, "report.html"))
        with pytest.raises(
            UsageError, match=r"report.html cannot be written \(Disk quota exceeded\); "
        ):
            useg.train(scenes, tmp_path / "run", settings=settings)
    before = result(tmp_path / "run")
    useg.train(scenes, tmp_path / "run", resume=True)
    assert result(tmp_path / "run") == before
    assert (tmp_path / "run" / "report.html").exists()


def test_a_name_that_is_too_long_ends_with_status_2(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", str(scenes), "--out", str(tmp_path / ("x" * 300)), "--quiet"])
    assert end.value.code == 2
    assert re.fullmatch(
        r"useg: the folder \S+ cannot be written \(File name too long\); choose another with --out\n",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_waits_for_the_step_and_saves(
    number: signal.Signals, forks: Forks, scenes: Path, tmp_path: Path
) -> None:
    log, pid = tmp_path / "run" / "log.jsonl", forks.start(scenes, tmp_path / "run")
    while not forks.ended(0.01) and (not log.exists() or log.read_bytes().count(b"\n") < 3):
        pass
    os.kill(pid, number)
    assert (forks.status(), forks.errors.read_text()) == (130, "")
    saved = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert 3 <= saved["step"] == len(log_of(tmp_path / "run")) < 16


TWICE = """
import os, signal
from useg.training.state import interruptible
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
before = signal.getsignal(signal.SIGINT)
with interruptible() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.wanted
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt:
        print("at once")
assert signal.getsignal(signal.SIGINT) is before
"""


def test_a_second_signal_acts_at_once_and_handlers_are_put_back() -> None:
    assert (
        subprocess.run(
            [sys.executable, "-c", TWICE], check=True, capture_output=True, text=True, timeout=60
        ).stdout
        == "at once\n"
    )


def test_saving_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SAVE_SHARE", 0.1)
    monkeypatch.setattr(checkpoint, "DISK_RATE", 4e4)
    model = torch.nn.Linear(
        9, 10
    )  # 100 parameters: 1200 bytes with their moments, so it is guessed to be saved in 0.03 s
    clock = SaveClock(checkpoint.likely_cost(model))
    assert not clock.due()  # 0.3 s must pass
    clock.saved -= 0.3
    assert clock.due()
    with clock.saving():
        time.sleep(0.02)
    assert not clock.due()  # 0.2 s must pass
    assert clock.cost >= 0.02


def test_states_hold_tensors_and_plain_values_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.fit(make_set(tmp_path / "data"), tmp_path / "run", quick(), Stopper(3, monkeypatch))
    content = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert {"step", "best", "seconds", "about", "model", "optimizer", "scheduler", "random"} <= set(
        content
    )
    assert json.dumps(content["about"])
