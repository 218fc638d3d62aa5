"""Disks that fail in the middle of a run leave the last good checkpoint."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_training import (
    make_disc_dataset,
    quick_settings,
    run_results,
)

import useg
from useg.cli import main
from useg.config import Settings, read_settings
from useg.data.dataset import Dataset
from useg.errors import MachineError, UsageError
from useg.training import loop, trainer

pytestmark = pytest.mark.usefixtures("save_after_every_step")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Settings, Path]:
    """A data set, settings, and the run that they make when nothing goes wrong."""
    folder = tmp_path_factory.mktemp("whole")
    dataset = make_disc_dataset(folder / "data")
    settings = quick_settings(train__epochs=5, model__dropout=0.2)
    loop.fit(dataset, folder / "run", settings)
    return dataset, settings, folder / "run"


class AfterStep(trainer.SilentProgress):
    """Calls a function after a step."""

    def __init__(self, step: int, function: Callable[[], object]) -> None:
        self.at, self.function = step, function

    def step(self, row: dict[str, Any], steps: int, seconds_left: float) -> None:
        if row["step"] == self.at:
            self.function()


def fails(number: int, only: str = "") -> Callable[..., None]:
    """A system call that fails for files whose name ends with ``only``."""

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
    """Redirect the open log to a device that is always full."""
    opened = next(
        int(link.name)
        for link in Path("/proc/self/fd").iterdir()
        if os.path.realpath(link) == str(run / "log.jsonl")
    )
    os.dup2(os.open("/dev/full", os.O_WRONLY), opened)


def remount(patch: pytest.MonkeyPatch, run: Path) -> None:
    patch.setattr(os, "fsync", fails(errno.EROFS))
    patch.setattr(Path, "unlink", fails(errno.EROFS))


NO_SPACE = os.strerror(errno.ENOSPC)
# What happens -> how it is planted into a run, and the reason that the error gives. Permissions
# are taken away by a patch, because the superuser has them all.
FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch, Path], object], str]] = {
    "disk full while writing": (
        lambda patch, run: patch.setattr(Path, "write_bytes", write_half),
        NO_SPACE,
    ),
    "disk full while flushing": (
        lambda patch, run: patch.setattr(os, "fsync", fails(errno.ENOSPC)),
        NO_SPACE,
    ),
    "disk full while renaming": (
        lambda patch, run: patch.setattr(os, "replace", fails(errno.ENOSPC)),
        NO_SPACE,
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
    ),
    "too many open files": (
        lambda patch, run: patch.setattr(os, "open", fails(errno.EMFILE)),
        "Too many open files",
    ),
    "folder vanished": (move_away, "No such file or directory"),
    "a file in its place": (put_a_file_there, "Not a directory"),
    "model written, checkpoint not": (
        lambda patch, run: patch.setattr(os, "replace", fails(errno.ENOSPC, "state.pt")),
        NO_SPACE,
    ),
    "log full": (fill_the_log, NO_SPACE),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_failing_disk_leaves_the_last_good_checkpoint(
    fault: str, whole: tuple[Dataset, Settings, Path], tmp_path: Path
) -> None:
    dataset, settings, unbroken = whole
    run, away, (plant, words) = tmp_path / "run", tmp_path / "away", FAULTS[fault]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UsageError) as caught:
        loop.fit(dataset, run, settings, AfterStep(5, lambda: plant(patch, run)))
    assert re.fullmatch(rf"\S+ cannot be written \({words}\); .+", str(caught.value))
    if away.exists():
        run.unlink(missing_ok=True)
        away.rename(run)
    assert torch.load(run / "state.pt", weights_only=True)["step"] == 5
    loop.fit(dataset, run, read_settings(run / "run.toml"), resume=True)
    assert run_results(run) == run_results(unbroken)
    assert sorted(path.name for path in run.iterdir()) == sorted(
        path.name for path in unbroken.iterdir()
    )


@pytest.mark.parametrize("at", range(1, 20, 3))
def test_disk_full_at_any_file_leaves_the_last_good_checkpoint(
    at: int, whole: tuple[Dataset, Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, settings, unbroken = whole
    real, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 3 + at:
            raise OSError(errno.ENOSPC, NO_SPACE)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\); "):
        loop.fit(dataset, tmp_path / "run", settings)
    monkeypatch.setattr(os, "fsync", real)
    loop.fit(dataset, tmp_path / "run", read_settings(tmp_path / "run" / "run.toml"), resume=True)
    assert run_results(tmp_path / "run") == run_results(unbroken)


def test_unreadable_checkpoint_is_an_error_of_the_machine(
    whole: tuple[Dataset, Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole[2], tmp_path / "run")
    monkeypatch.setattr(torch, "load", fails(errno.EIO))
    settings = read_settings(tmp_path / "run" / "run.toml")
    message = r"state.pt cannot be read \(Input/output error\); make it readable and resume"
    with pytest.raises(MachineError, match=message):
        loop.fit(whole[0], tmp_path / "run", settings, resume=True)


def test_report_that_failed_is_written_by_resume(
    disc_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model.width": 2, "model.depth": 1, "train.steps": 2, "data.size": "48x32"}
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", fails(errno.EDQUOT))
        patch.setattr(os, "replace", fails(errno.EDQUOT, "report.html"))
        message = r"report.html cannot be written \(Disk quota exceeded\); "
        with pytest.raises(UsageError, match=message):
            useg.train(disc_folder, tmp_path / "run", settings=settings)
    before = run_results(tmp_path / "run")
    useg.train(disc_folder, tmp_path / "run", resume=True)
    assert run_results(tmp_path / "run") == before
    assert (tmp_path / "run" / "report.html").exists()


def test_folder_name_that_is_too_long_is_refused(
    disc_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", str(disc_folder), "--out", str(tmp_path / ("x" * 300)), "--quiet"])
    assert end.value.code == 2
    message = r"useg: the folder \S+ cannot be written \(File name too long\); choose another .+\n"
    assert re.fullmatch(message, capsys.readouterr().err)
