"""Settings: what is set, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from useg.config import (
    Settings,
    describe_settings,
    parse_assignments,
    parse_size,
    read_settings,
    write_settings,
)
from useg.errors import UsageError

pytestmark = pytest.mark.wheel


def changed(*assignments: str) -> Settings:
    return Settings().with_(parse_assignments(assignments))


def test_values_are_read_as_toml_or_text() -> None:
    settings = changed(
        "train.learning_rate=1e-4",
        "model.padding=valid",
        'data.size="256x192"',
        "data.crop=128X64",
        "train.augment=false",
    )
    assert settings.train.learning_rate == 1e-4
    assert settings.model.padding == "valid"
    assert (settings.data.size, settings.data.crop) == ((256, 192), (128, 64))
    assert settings.train.augment is False


def test_unknown_setting_suggests_the_nearest() -> None:
    with pytest.raises(
        UsageError, match=r"there is no setting 'train.epcohs'; did you mean 'train.epochs'"
    ):
        changed("train.epcohs=3")


def test_all_problems_in_one_message() -> None:
    with pytest.raises(UsageError) as caught:
        changed("train.epochs=0", "model.padding=reflect", "data.size=0x4")
    assert all(
        key in str(caught.value)
        for key in (
            "train.epochs = 0",
            "model.padding = 'reflect'",
            "data.size = 4",
            "WIDTHxHEIGHT",
        )
    )


def test_an_assignment_needs_an_equals_sign() -> None:
    with pytest.raises(UsageError, match="write --set key=value"):
        changed("train.epochs")


@pytest.mark.parametrize(
    "assignment",
    [
        *(f"train.minutes={value}" for value in ("inf", "nan", "-inf", "1e308")),
        *(f"train.learning_rate={value}" for value in ("inf", "nan", "1e300")),
        *(f"data.scale={value}" for value in ("inf", "nan")),
        *(f"data.holdout={value}" for value in ("inf", "nan")),
        *(f"train.weight_decay={value}" for value in ("inf", "nan")),
        *(
            f"train.{key}=1{'0' * 40}"
            for key in ("epochs", "steps", "accumulate", "validate_every")
        ),
        f"train.steps={'9' * 5000}",
        f"data.size={'9' * 5000}x1",
        "data.size=\u0663x\u0663",
        f"train.loss={'ce + ' * 5000}ce",
        'model.weights="a\\u0000b"',
        f"model.width={'[' * 5000}",
        f"train.recounts=[{'[1, 1], ' * 10_001}]",
    ],
    ids=lambda text: text[:30],
)
def test_an_impossible_value_is_one_short_sentence(assignment: str) -> None:
    with pytest.raises(UsageError, match=r"^setting [a-z._]+ = ") as caught:
        changed(assignment)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_run_toml_comes_back(tmp_path: Path) -> None:
    settings = changed(
        "train.epochs=3",
        "data.size=256x192",
        "train.weight_decay=0.0",
        "train.seed=9223372036854775807",
    )
    write_settings(tmp_path / "run.toml", settings, {"dataset": "x", "torch": "2"})
    assert read_settings(tmp_path / "run.toml") == settings


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (("train.photometric=0.25",), False),
        (("train.photometric=0.25", "data.standardize=true"), True),
        # A file that is no plan of a run yet.
        ((), None),
    ],
)
def test_runs_of_versions_that_did_not_standardise_images_continue_without(
    assignments: tuple[str, ...], expected: bool | None, tmp_path: Path
) -> None:
    path = tmp_path / "run.toml"
    write_settings(path, changed("data.size=256x192", *assignments), {"dataset": "x"})
    assert read_settings(path).data.standardize is expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[train]\nepoch = 3", "did you mean 'train.epochs'"),
        ("[trian]\nepochs = 3", "setting trian"),
        ("train = [", "not a readable run.toml"),
        ("train = 3", "setting train"),
        ("train = " + "[" * 5000, "not a readable run.toml .it is nested too deeply"),
        ("train.steps = " + "9" * 5000, "not a readable run.toml"),
        ("[train]\nminutes = inf", "setting train.minutes = inf"),
    ],
)
def test_a_wrong_run_toml_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(content)
    with pytest.raises(UsageError, match=message):
        read_settings(tmp_path / "run.toml")


def test_missing_run_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not a readable run.toml"):
        read_settings(tmp_path / "run.toml")


def test_every_setting_is_described() -> None:
    assert [key for key, _, text in describe_settings() if not text] == []
    assert {("data.split", "auto"), ("data.size", "-")} <= {
        (key, default) for key, default, _ in describe_settings()
    }


@pytest.mark.parametrize("text", ["", "12", "12x", "-1x5", "axb", "3.5x2"])
def test_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size: a size is WIDTHxHEIGHT"):
        parse_size(text)
