"""The page of an evaluation, read back with an HTML parser, and its Markdown."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError
from made_reporting import (
    COUNTS,
    HOSTILE_NAME,
    TABLE,
    ParsedPage,
    assert_self_contained,
    make_evaluation,
    make_report,
)

from useg.objects.scores import ComponentScores
from useg.reporting import page as report_page
from useg.reporting.evaluation_result import Evaluation
from useg.reporting.page import write_markdown, write_report
from useg.reporting.text import Report
from useg.scoring.boundaries import Membranes
from useg.scoring.metrics import score


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> ParsedPage:
    """The page of a report that has every part."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, make_report())
    return ParsedPage(path)


def test_page_is_self_contained(page: ParsedPage) -> None:
    assert_self_contained(page)


def test_page_says_what_was_measured(page: ParsedPage) -> None:
    text = page.text.replace("\xa0", " ")
    assert "10 images in the split “val” of data/street, at native resolution" in text
    assert "runs/a/model.safetensors" in text
    assert "Seed" in text


def test_page_shows_the_scores_of_the_evaluation(page: ParsedPage) -> None:
    scores = make_evaluation().scores
    for value in (scores.mean_iou, scores.pixel_accuracy, scores.mean_dice):
        assert f"<dd>{100 * value:.1f}<small>" in page.source


def test_page_shows_the_interval_of_the_mean_iou(page: ParsedPage) -> None:
    interval = make_evaluation().intervals.mean_iou
    low, high = 100 * interval.low, 100 * interval.high
    assert f"would lie between {low:.1f} and {high:.1f} %" in page.text
    assert f"--low:{low:.2f}%;--high:{high:.2f}%" in page.source


def test_page_names_every_class_and_has_no_row_for_absent_ones(page: ParsedPage) -> None:
    for name in TABLE.names:
        assert name in page.text
    absent = "Not in the ground truth, so not scored and not part of any mean: Trams."
    assert absent in " ".join(page.text.split())
    assert len(re.findall(r'class="name" data-value="([^"]*)"', page.source)) == 4
    for heading in ("Boundary", "Thin", "Pixels"):
        assert heading in page.text


def test_hostile_text_does_not_become_markup(page: ParsedPage) -> None:
    assert "<script>alert" not in page.source
    assert page.source.count("<script>") == 1
    assert page.text.count(HOSTILE_NAME) >= 5
    assert HOSTILE_NAME not in page.source


def test_commands_can_be_copied_exactly(page: ParsedPage) -> None:
    assert "useg train data --set a='<b>' && echo \"done\"" in page.text
    assert page.source.count('class="copy"') == 1


def test_gallery_shows_four_pictures_of_each_image(page: ParsedPage) -> None:
    assert page.source.count('alt="errors of ') == 4
    # Four for each image of the gallery, ten thumbnails, and the one in the viewer.
    assert page.tags.count("img") == 4 * 4 + 10 + 1
    for word in ("Best", "Worst", "worst.png", "image", "truth", "prediction", "errors"):
        assert word in page.text
    # Photographs are JPEG; label maps are PNG.
    photos = [address for address in page.addresses if address.startswith("data:image/jpeg")]
    assert len(photos) == 4 + 10


def test_only_best_median_and_worst_image_are_printed(page: ParsedPage) -> None:
    pattern = r'class="case( extra)?" data-name="[^"]*" data-reason="([^"]*)"'
    assert re.findall(pattern, page.source) == [
        ("", "best"),
        ("", "median; worst in Poles"),
        (" extra", ""),
        ("", "worst"),
    ]


def test_images_are_listed_with_the_lowest_iou_first(page: ParsedPage) -> None:
    rows = re.findall(r'<li title="([^"]*)" data-iou="([^"]*)"', page.source)
    assert [name for name, _ in rows] == [*(f"{k}.png" for k in range(9)), "void.png"]
    assert rows[-1][1] == "nan"


def test_iou_of_each_class_in_an_image_is_json(page: ParsedPage) -> None:
    entries = re.findall(r'data-ious="([^"]*)"', page.source)
    assert len(entries) == 4 + 10
    assert json.loads(entries[0].replace("&#34;", '"')) == {"0": 0.9, "1": 0.2, "2": 0.1}


def test_page_shows_caveats_causes_and_remedies(page: ParsedPage) -> None:
    for text in (
        "Before you trust these numbers",
        "Read with care.",
        "Likely causes of low scores",
        "Half of the pixels are in 2 regions.",
        "What to do: Train at a larger size.",
        "The temperature was fitted on these images",
        "18 % of Poles pixels are predicted as Buildings",
    ):
        assert text in page.text


def test_page_shows_objects_and_membranes_only_on_request(page: ParsedPage, tmp_path: Path) -> None:
    assert "Membrane" not in page.text
    evaluation = replace(
        make_evaluation(),
        objects=ComponentScores(0.8, 0.9, 0.7, 10, 9, 7, 2, 1),
        membranes=Membranes(0.001, 0.02, 0.03, (0.5, 0.5, 0.5)),
    )
    write_report(tmp_path / "report.html", Report("T", evaluation, TABLE))
    text = ParsedPage(tmp_path / "report.html").text
    assert "F1 80.0 % at IoU 0.5: 7 of 10 true objects matched, 9 objects predicted." in text
    assert "warping error 0.001000" in text


def test_charts_are_inline(page: ParsedPage) -> None:
    # Two training curves, the reliability curve and the map of errors.
    assert page.tags.count("svg") == 4


def test_page_shows_the_matrix_and_the_quartiles(page: ParsedPage) -> None:
    assert page.source.count('class="hit"') == 4
    quartiles = "Half of the images score between 20.0 % and 60.0 %; the median is 40.0 %."
    assert quartiles in page.text.replace("\xa0", " ")


def test_evaluation_without_a_scored_pixel_has_a_page(tmp_path: Path) -> None:
    nothing = np.zeros((5, 5), np.int64)
    empty = Evaluation(score(nothing, TABLE.names, 1), (), nothing, "m", "d", "all")
    write_report(tmp_path / "report.html", Report("Nothing", empty, TABLE))
    page = ParsedPage(tmp_path / "report.html")
    assert "nan" not in page.text
    assert "1 image of d" in page.text
    assert "img" not in page.tags
    assert "svg" not in page.tags


@pytest.mark.parametrize("existing", [None, "the old page"])
def test_failed_report_leaves_no_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: str | None
) -> None:
    path = tmp_path / "report.html"
    if existing:
        path.write_text(existing)
    monkeypatch.setattr(report_page, "_iou_distribution", lambda evaluation: {"low": 0.1})
    with pytest.raises(UndefinedError, match="high"):
        write_report(path, Report("T", make_evaluation(), TABLE))
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ([existing] if existing else [])


def test_markdown_has_the_content_of_the_page(tmp_path: Path) -> None:
    write_markdown(tmp_path / "report.md", make_report())
    text = (tmp_path / "report.md").read_text()
    assert "<script" not in text.replace("\\<", "")
    scores, interval = make_evaluation().scores, make_evaluation().intervals.mean_iou
    low, high = 100 * interval.low, 100 * interval.high
    assert f"| mean IoU | {100 * scores.mean_iou:.1f} | {low:.1f} to {high:.1f} |" in text
    for part in (
        "## Before you trust these numbers",
        "- Read with care.",
        "## Errors by size",
        "18 % of Poles pixels are predicted as Buildings",
        "- 0.0 %: 0.png",
    ):
        assert part in text
    tables = [
        [line.count(" | ") for line in block.splitlines()]
        for block in text.split("\n\n")
        if block.startswith("|")
    ]
    assert len(tables) == 3
    assert all(len(set(widths)) == 1 for widths in tables)


def test_markdown_of_an_evaluation_without_a_scored_pixel_has_no_nan(tmp_path: Path) -> None:
    nothing = np.zeros((5, 5), np.int64)
    empty = Evaluation(score(nothing, TABLE.names, 1), (), nothing, "m", "d", "all")
    write_markdown(tmp_path / "report.md", Report("Nothing", empty, TABLE))
    assert "nan" not in (tmp_path / "report.md").read_text()


def test_class_names_cannot_break_a_markdown_table(tmp_path: Path) -> None:
    table = replace(TABLE, names=("a|b", "c\nd", "*e*", "`f`", "g"))
    evaluation = replace(make_evaluation(), scores=score(COUNTS, table.names, 1))
    write_markdown(tmp_path / "report.md", Report("T", evaluation, table))
    text = (tmp_path / "report.md").read_text()
    for name in (r"| a\|b |", "| c d |", r"| \*e\* |", r"| \`f\` |"):
        assert name in text
