"""`useg train` refuses settings that cannot be met, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import run

from useg.scenes.generate import write_scenes

pytestmark = pytest.mark.usefixtures("blank_charts")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, 4, (64, 48), 0)
    return folder


def test_an_unknown_setting_suggests_the_nearest(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "train", scenes, "--out", tmp_path / "run", "--set", "model.widht=8")
    assert code == 2
    assert "did you mean 'model.width'?" in err


def test_a_size_that_a_valid_unet_cannot_take(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(
        capsys,
        "train",
        scenes,
        "--out",
        tmp_path / "run",
        "--quiet",
        "--set",
        "model.padding=valid",
        "--set",
        "data.crop=100x101",
        "--epochs",
        "1",
    )
    assert code == 2
    assert "data.crop" in err
    assert "100x101" in err
    assert not (tmp_path / "run").exists()


def test_minutes_and_epochs_exclude_each_other(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(
        capsys, "train", scenes, "--out", tmp_path / "run", "--minutes", "1", "--epochs", "1"
    )
    assert (code, "set only one of them" in err) == (2, True)
