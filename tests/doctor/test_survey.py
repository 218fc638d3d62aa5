"""A survey counts what is there, merges similar findings, and finds nothing in clean sets."""

import json
import os
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import PIL.Image
import pytest
import tifffile
from made_doctor import (
    CLEAN_SETS,
    TREES,
    describe_findings,
    survey_folder,
    write_noise_video,
    write_trees,
)

from useg.data.layouts import find_dataset
from useg.doctor.survey import survey_dataset
from useg.reporting.inspection import inspect_dataset

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def spoil_images(root: Path, *names: str) -> None:
    for name in names:
        (root / "images" / f"{name}.png").write_text("x")


@pytest.mark.parametrize("name", CLEAN_SETS)
def test_nothing_is_found_in_a_clean_set(
    name: str, clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    root = clean_sets[name]
    if os.environ.get("USEG_SOAK") == "1":
        root = CLEAN_SETS[name](tmp_path / "data", 1000)
    assert describe_findings(inspect_dataset(root)) == []


def test_survey_counts_pairs_sizes_classes_and_splits(tmp_path: Path) -> None:
    survey = survey_folder(write_trees(tmp_path))
    assert survey.findings == ()
    assert (survey.num_pairs, survey.layout) == (6, "folders")
    assert (survey.sizes, survey.bands, survey.dtypes) == ({"20x15": 6}, {3: 6}, {"uint8": 6})
    assert survey.pixels == (540, 540, 540)
    assert survey.images == (6, 6, 6)
    assert survey.shares == pytest.approx((1 / 3,) * 3)
    assert survey.ignore_share == pytest.approx(0.1)
    assert sum(survey.splits.values()) == 6


def test_json_has_the_documented_keys_and_types(tmp_path: Path) -> None:
    write_trees(tmp_path)
    spoil_images(tmp_path, "elm")
    content = json.loads(json.dumps(survey_folder(tmp_path).as_dict()))
    assert {"num_pairs", "layout", "sizes", "splits", "classes", "findings"} <= content.keys()
    assert content["classes"][1] == {
        "id": 1,
        "name": "road",
        "pixels": 450,
        "share": pytest.approx(1 / 3),
        "images": 5,
        "color": ANY,
    }
    assert content["findings"][0].keys() == {"kind", "severity", "files", "message", "remedy"}
    assert content["findings"][0]["files"] == [str(tmp_path / "images" / "elm.png")]


def test_lines_summarize_the_survey(tmp_path: Path) -> None:
    write_trees(tmp_path)
    spoil_images(tmp_path, "elm")
    lines = survey_folder(tmp_path).lines()
    assert lines[0] == f"{tmp_path}: 6 pairs, layout folders"
    assert lines[1] == "images   20x15 (5); 3 bands, uint8"
    assert lines[3] == "classes  3; 10.0 % of the pixels are ignored"
    assert lines[4].split() == ["class", "id", "share", "of", "pixels", "images"]
    assert lines[6].split() == ["road", "1", "33.333", "%", "5"]
    assert lines[8] == "findings 1 error"
    assert lines[9].startswith("  error: 'images/elm.png' is a text file with the name of an image")


def test_more_than_two_findings_of_a_kind_take_one_line(tmp_path: Path) -> None:
    write_trees(tmp_path)
    spoil_images(tmp_path, "ash", "elm", "fir")
    survey = survey_folder(tmp_path)
    assert [finding.kind for finding in survey.findings] == ["unreadable file"] * 3
    lines = survey.lines()
    found = [line for line in lines if line.startswith("  error: ")]
    assert found == [
        "  error: 'images/ash.png' is a text file with the name of an image, as after a failed "
        "download (and 2 more: 'images/elm.png' and 'images/fir.png'); "
        "download it again, or remove it"
    ]
    assert "findings 3 errors" in lines


def test_more_than_five_findings_of_a_kind_become_one(tmp_path: Path) -> None:
    write_trees(tmp_path)
    spoil_images(tmp_path, *TREES)
    survey = survey_folder(tmp_path)
    assert [finding.kind for finding in survey.findings] == ["unreadable file"]
    assert len(survey.findings[0].files) == 6
    assert survey.findings[0].message.endswith(
        "(and 5 more: 'images/beech.png', 'images/cedar.png', 'images/daisy.png' and 2 others)"
    )
    assert len(survey.findings[0].repairs) == 6
    assert "images   none could be read" in survey.lines()


def test_errors_come_first(tmp_path: Path) -> None:
    write_noise_video(tmp_path)
    (tmp_path / "masks" / "f003.png").unlink()
    PIL.Image.fromarray(np.zeros((15, 20), np.uint8)).save(tmp_path / "images" / "f004.png")
    deep = np.zeros((15, 20, 3), np.uint16)
    tifffile.imwrite(tmp_path / "images" / "f005.png", deep, photometric="rgb")
    severities = [finding.severity for finding in survey_folder(tmp_path).findings]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert len(set(severities)) == 3


def test_survey_without_splits_counts_undecided_pairs(tmp_path: Path) -> None:
    survey = survey_dataset(find_dataset(write_trees(tmp_path)))
    assert survey.splits == {"": 6}
    assert "splits   6 not decided" in survey.lines()


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is missing")
def test_isbi_stack_is_a_film_of_two_grey_levels() -> None:
    survey = survey_folder(SHARED / "isbi2012")
    assert [finding.kind for finding in survey.findings] == ["looks like a film", "two grey levels"]
    assert survey.shares[0] == pytest.approx(0.22, abs=0.005)
