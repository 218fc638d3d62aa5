"""Folds: every image is scored by a model that has not seen it, and a killed job goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_training import CLASSES, Interrupter, make_shapes, read_log

import useg
from useg import api, cross_validation
from useg.classes import write_classes
from useg.cli import main
from useg.config import VALIDATE_AT_END, read_settings
from useg.errors import DataError, SettingsError, UsageError
from useg.models.segmenter import load_model
from useg.reporting.evaluate import evaluate_dataset
from useg.training.trainer import SilentProgress

pytestmark = pytest.mark.usefixtures("blank_charts")

SETTINGS = {
    "model.encoder": "plain",
    "model.width": 4,
    "model.depth": 2,
    "train.batch": 4,
    "train.steps": 3,
    "train.precision": "fp32",
}


class Listener(SilentProgress):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of five patients."""
    folder = make_shapes(tmp_path_factory.mktemp("folds") / "data", 0, count=20)
    for k in range(20):
        for part in ("images", "masks"):
            (folder / part / f"p{k:03d}.png").rename(folder / part / f"p{k % 5}_{k // 5}.png")
    write_classes(folder / "classes.toml", CLASSES)
    return folder


@pytest.fixture(scope="module")
def whole(groups: Path) -> cross_validation.CrossValidation:
    """Two folds and a final model."""
    out = groups.parent / "whole"
    return useg.train_folds(groups, out, 2, final=True, settings=SETTINGS)


def test_every_image_is_scored_by_a_model_that_has_not_seen_its_group(
    groups: Path, whole: cross_validation.CrossValidation
) -> None:
    content = json.loads((whole.out / "folds.json").read_text())
    assert content["num_folds"] == 2
    assert len(content["images"]) == content["num_images"] == 20
    folds = {name.split("_")[0]: number for name, number in content["images"].items()}
    assert {folds[name.split("_")[0]] == number for name, number in content["images"].items()} == {
        True
    }
    assert set(content["groups"]) == {f"images_p{k}" for k in range(5)}
    # The counts of a fold are those of its model's evaluation.
    tallied = 0
    for number in (1, 2):
        run = whole.out / f"fold_{number}"
        dataset = useg.open_dataset(groups)
        own = {name for name, fold in content["images"].items() if fold == number}
        pairs = [p for p in dataset.pairs if f"images/{p.image.name}" in own]
        pairs = tuple(cross_validation.replace(pair, split="val") for pair in pairs)
        held = cross_validation.replace(dataset, pairs=pairs)
        scores = evaluate_dataset(useg.load(run), held).scores
        tallied += sum(entry.pixels for entry in scores.classes)
        assert load_model(run).provenance["num_train"] == 19 - len(own)
        # Otherwise they would decide whether an initial model is kept, or mixed in.
        settings = read_settings(run / "run.toml")
        assert settings.model.start_share == 0
        assert settings.train.validate_every == VALIDATE_AT_END
    assert tallied == sum(entry.pixels for entry in whole.scores.classes)


def test_scores_of_like_images_and_of_new_groups_are_told_apart(
    whole: cross_validation.CrossValidation,
) -> None:
    assert whole.near
    assert whole.near.num_images == 2
    first, second = whole.lines()
    assert first.startswith(f"expect an mIoU of {100 * whole.near.mean_iou:.1f} % on images ")
    assert f"of {100 * whole.scores.mean_iou:.1f} %" in first
    assert "each of the 20 images is scored by a model that has not seen its group" in second
    assert whole.intervals
    assert whole.intervals.num_blocks == 5


def test_final_model_learns_all_images_and_carries_the_score_of_the_folds(
    whole: cross_validation.CrossValidation,
) -> None:
    provenance = load_model(whole.out).provenance
    assert provenance["num_train"] == 20
    assert provenance["validation"]["mean_iou"] == whole.scores.mean_iou
    assert provenance["scored_by"] == whole.by
    steps = {
        len((folder / "log.jsonl").read_text().splitlines())
        for folder in (whole.out, whole.out / "fold_1", whole.out / "fold_2")
    }
    assert steps == {3}


def test_interrupted_folds_go_on_with_the_same_result(
    groups: Path, whole: cross_validation.CrossValidation, tmp_path: Path
) -> None:
    class InterruptSecond(Interrupter):
        def say(self, text: str) -> None:
            self.at = 2 if text.startswith("fold 2") else self.at

    cut = useg.train_folds(
        groups, tmp_path / "cut", 2, final=True, settings=SETTINGS, progress=InterruptSecond(0)
    )
    assert cut.interrupted
    before = (tmp_path / "cut" / "fold_1" / "scores.json").stat().st_mtime_ns
    with pytest.raises(UsageError, match="already contains folds; continue with --resume"):
        useg.train_folds(groups, tmp_path / "cut", 2, final=True, settings=SETTINGS)
    progress = Listener()
    done = useg.train_folds(
        groups, tmp_path / "cut", 2, final=True, settings=SETTINGS, resume=True, progress=progress
    )
    assert done.as_dict() == whole.as_dict()
    assert (tmp_path / "cut" / "fold_1" / "scores.json").stat().st_mtime_ns == before
    models = [folder / "model.safetensors" for folder in (tmp_path / "cut", whole.out)]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_other_images_or_folds_are_not_gone_on_with(
    groups: Path, whole: cross_validation.CrossValidation, tmp_path: Path
) -> None:
    shutil.copytree(whole.out, tmp_path / "folds")
    with pytest.raises(DataError, match="the images or the number of folds have changed since"):
        useg.train_folds(groups, tmp_path / "folds", 3, settings=SETTINGS, resume=True)
    (tmp_path / "other" / "fold_1").mkdir(parents=True)
    with pytest.raises(UsageError, match="already contains fold_1; choose another folder"):
        useg.train_folds(groups, tmp_path / "other", 2, settings=SETTINGS)


def test_without_groups_the_score_says_what_it_is_not(tmp_path: Path) -> None:
    folder = make_shapes(tmp_path / "data", 1, count=6)
    write_classes(folder / "classes.toml", CLASSES)
    result = useg.train_folds(folder, tmp_path / "out", 2, settings=SETTINGS)
    assert result.near is None
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert "scores on other places or recordings are unknown" in result.lines()[1]


def test_time_is_for_all_models_together(
    groups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    def note(*arguments: Any, **named: Any) -> None:
        given.append(named)
        raise InterruptedError

    monkeypatch.setattr(api, "train", note)
    for length in ({"minutes": 30}, {"epochs": 2}, {}):
        with pytest.raises(InterruptedError):
            useg.train_folds(groups, tmp_path / "out", 4, final=True, resume=True, **length)
    assert [each.get("minutes") for each in given] == [6, None, 2]
    assert [each.get("epochs") for each in given] == [None, 2, None]


def test_first_fold_decides_about_images_without_masks(groups: Path, tmp_path: Path) -> None:
    """No later model compares colours again, nor the final one, for which no image is held out."""
    settings = {**SETTINGS, "data.unlabelled": str(groups / "images")}
    out = tmp_path / "folds"
    cross_validation.train_folds(groups, out, 2, final=True, settings=settings)
    compared = [
        sum("unlabelled" in row for row in read_log(place)) for place in (out / "fold_1", out)
    ]
    assert compared == [1, 0]
    assert read_settings(out / "run.toml").data.unlabelled is None


def test_command_trains_folds_and_refuses_mistakes(
    groups: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    settings = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    command = ["train", str(groups), "--out", out, "--quiet", "--set=train.steps=1"]
    for more, message in (
        (["--final"], "--final only works with --folds K; add it"),
        (["--folds", "1"], "1 folds are not possible; choose 2 or more"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*command, *more])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as ended:
        main([*command, *settings, "--set=train.steps=1", "--folds", "2"])
    assert ended.value.code == 0
    assert "on images like these" in capsys.readouterr().out
    with pytest.raises(SettingsError, match="one process"):
        refuse_a_group(groups, tmp_path)


def refuse_a_group(groups: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_validation.distributed, "is_distributed", lambda: True)
        useg.train_folds(groups, tmp_path / "group", 2)
