"""Numbers, sentences and caveats of a report."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_reporting import COUNTS, TABLE, make_evaluation

from useg.data.dataset import Pair
from useg.objects.scores import ComponentScores
from useg.reporting.evaluation_result import Cause, ImageScore
from useg.reporting.text import (
    Report,
    calibration_sentences,
    confusion_sentences,
    evaluation_lines,
    format_percent,
    format_score,
    format_score_difference,
    image_names,
    object_sentences,
    position_sentence,
)
from useg.scoring.uncertainty import Calibration, Interval


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0.0 %"),
        (1, "100.0 %"),
        (0.0004, "less than 0.1 %"),
        (0.123, "12.3 %"),
        (math.nan, "–"),  # noqa: RUF001
    ],
)
def test_shares_are_formatted_in_percent(share: float, text: str) -> None:
    assert format_percent(share) == text


def test_scores_are_formatted_in_percent_with_their_interval() -> None:
    assert format_score(0.5204, Interval(0.4781, 0.5532)) == "52.0 % [47.8, 55.3]"
    assert format_score(0.9012, Interval(0.8991, 0.9033)) == "90.1 % [89.9, 90.3]"
    assert format_score(math.nan) == "-"


def test_differences_are_formatted_in_percentage_points() -> None:
    difference = format_score_difference(-0.0001, Interval(-0.0402, 0.0004))
    assert difference == "+0.0 points [-4.0, +0.0]"
    assert format_score_difference(0.0123, None) == "+1.2 points"
    assert format_score_difference(math.nan, None) == "-"


def test_terminal_lines_end_with_cause_evidence_and_remedy() -> None:
    cause = Cause("Poles", "small things", "Poles are thin", "1 pixel wide", "train larger")
    lines = evaluation_lines(replace(make_evaluation(), causes=(cause,)))
    assert lines[-1] == "likely cause: Poles are thin (1 pixel wide); what to do: train larger"


def test_confusions_are_sentences() -> None:
    assert confusion_sentences(COUNTS, TABLE.names) == [
        "18 % of Poles pixels are predicted as Buildings",
        "2.0 % of Buildings pixels are predicted as Sky",
        "2.0 % of Buildings pixels are predicted as Poles",
    ]


def test_confusions_are_ranked_by_share_then_by_pixels() -> None:
    counts = np.array([[900, 100, 0], [0, 5, 5], [10, 0, 10]])
    assert confusion_sentences(counts, "abc", 2) == [
        "50 % of c pixels are predicted as a",
        "50 % of b pixels are predicted as c",
    ]


def test_extreme_confusions() -> None:
    names = ("a", "b")
    assert confusion_sentences(np.diag([3, 4]), names) == []
    assert confusion_sentences(np.zeros((2, 2), np.int64), names) == []
    (tiny,) = confusion_sentences(np.array([[99_999, 1], [0, 5]]), names)
    assert tiny == "less than 0.1 % of a pixels are predicted as b"
    (total,) = confusion_sentences(np.array([[0, 9], [0, 5]]), names)
    assert total == "100 % of a pixels are predicted as b"


def test_image_names_omit_the_common_folder() -> None:
    def names(*paths: str) -> list[str]:
        images = tuple(ImageScore(Pair(Path(path), Path("m")), 0.5, 0.5) for path in paths)
        return image_names(replace(make_evaluation(), images=images))

    assert names("/d/a/1.png", "/d/a/2.png") == ["1.png", "2.png"]
    assert names("/d/a/1.png", "/d/b/1.png") == ["a/1.png", "b/1.png"]
    assert names("1.png", "2.png") == ["1.png", "2.png"]
    assert names() == []


def test_position_of_most_errors_is_named() -> None:
    counts = np.stack([np.full((12, 16), 100), np.ones((12, 16), int)])
    counts[1, 0, 15] = 40
    assert position_sentence(replace(make_evaluation(), places=counts)) == (
        "Errors are most frequent at the top right: 40 % of the pixels in that cell are wrong, "
        "compared with 1.0 % in the best cell."
    )
    counts[1, 6, 8] = 50
    centre = position_sentence(replace(make_evaluation(), places=counts))
    assert centre.startswith("Errors are most frequent at the centre: 50 %")


@pytest.mark.parametrize(
    ("confidence", "temperature", "fitted", "expected"),
    [
        (
            0.99,
            1.5,
            True,
            ["is overconfident", "lowered its confidence", "divided by 1.50", "fitted on these"],
        ),
        (0.5, 0.8, False, ["is underconfident", "raised its confidence"]),
        (0.9134, 1.0, False, ["neither overconfident nor underconfident"]),
    ],
)
def test_calibration_is_described(
    confidence: float, temperature: float, fitted: bool, expected: list[str]
) -> None:
    calibration = Calibration(0.02, confidence, temperature, ())
    evaluation = replace(make_evaluation(), calibration=calibration)
    report = Report("T", evaluation, TABLE, temperature_fitted_here=fitted)
    text = " ".join(calibration_sentences(report))
    for part in expected:
        assert part in text
    assert ("fitted on these images" in text) == fitted
    assert ("Temperature scaling" in text) == (temperature != 1)


def test_one_merged_prediction_and_one_split_object_are_singular() -> None:
    objects = ComponentScores(0.8, 0.9, 0.7, 10, 9, 7, 1, 1)
    (sentence,) = object_sentences(replace(make_evaluation(), objects=objects))
    assert sentence.endswith(
        "1 prediction covers several true objects, and 1 true object is split into several "
        "predictions."
    )
