"""The page of a survey shows its findings and classes, and is written as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_reporting import HOSTILE_NAME, TABLE, ParsedPage, assert_self_contained, make_survey

from useg.errors import UsageError
from useg.reporting.inspection import write_survey_page


def test_page_shows_the_survey(tmp_path: Path) -> None:
    picture = np.zeros((20, 30, 3), np.uint8)
    pictures = [("a.png", picture), (HOSTILE_NAME, picture)]
    write_survey_page(tmp_path / "survey.html", make_survey(), pictures)
    page = ParsedPage(tmp_path / "survey.html")
    assert_self_contained(page)
    for text in (
        "4 pairs",
        "carla",
        "800x600 (3), 640x480 (1)",
        "train (3), not decided (1)",
        "2 findings",
        "Poles are rare",
        "and 34 more",
        "replace it",
        "Not in any mask: Trams.",
        *TABLE.names,
    ):
        assert text in page.text
    assert "<script>alert" not in page.source
    assert page.tags.count("img") == 2
    assert "5.png" in page.text
    assert "6.png" not in page.text


def test_page_without_findings_says_so(tmp_path: Path) -> None:
    survey = {**make_survey(), "findings": [], "root": "/somewhere/streets"}
    write_survey_page(tmp_path / "survey.html", survey, [])
    page = ParsedPage(tmp_path / "survey.html")
    assert "No findings" in page.text
    assert "<h1>streets</h1>" in page.source


def test_open_old_page_stays_whole_while_a_new_one_is_written(tmp_path: Path) -> None:
    path = tmp_path / "survey.html"
    write_survey_page(path, make_survey(), [])
    old = path.read_text()
    with path.open() as reader:
        write_survey_page(path, make_survey(), [])
        assert reader.read() == old
    assert ParsedPage(path).text


def test_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        write_survey_page(tmp_path / "nowhere" / "survey.html", make_survey(), [])
