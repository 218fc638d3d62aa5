"""The page of a survey shows the evidence of each finding; Markdown beside it has the text."""

from pathlib import Path

import pytest
from made_doctor import (
    add_specks,
    copy_to_validation,
    exchange_masks,
    shift_one_mask,
    write_streets,
    write_trees,
    write_unknown_ids,
)
from made_strangers import save, yard

from useg.cli import main
from useg.errors import UsageError
from useg.reporting.inspection import NUM_SAMPLES, draw_evidence, inspect_dataset


def test_page_and_markdown_show_every_finding(tmp_path: Path) -> None:
    root = write_streets(tmp_path / "<b>data")
    for plant in (
        shift_one_mask,
        add_specks,
        exchange_masks,
        copy_to_validation,
        write_unknown_ids,
    ):
        plant(root)
    survey = inspect_dataset(root, html=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Not ready to train" in page
    assert all(f"finding-{k + 1}" in page for k in range(len(survey.findings)))
    # One sample cannot be read, since its mask has an unknown value.
    assert page.count("<img ") == 2 * len(survey.findings) + 2 * NUM_SAMPLES - 1
    assert "<b>data" not in page
    assert "http:" not in page
    assert "https:" not in page
    markdown = (tmp_path / "page.md").read_text()
    assert markdown.startswith("# \\<b\\>data\n")
    assert all(f"- **{finding.kind.capitalize()}**: " in markdown for finding in survey.findings)
    assert "\n## Errors\n" in markdown
    assert "| sky | 0 | " in markdown
    assert "- Layout: " in markdown
    assert str(root) not in markdown


def test_near_duplicates_stand_side_by_side_with_differing_masks_marked(tmp_path: Path) -> None:
    for k in range(5):
        image, label = yard(k)
        save(tmp_path / "images" / f"{chr(97 + k)}.png", image.repeat(3, 0).repeat(3, 1))
        save(tmp_path / "masks" / f"{chr(97 + k)}.png", label.repeat(3, 0).repeat(3, 1))
    for name, rows in (("v", 0), ("x", 12)):
        brighter = yard(1)[0].repeat(3, 0).repeat(3, 1) // 2 + 60
        save(tmp_path / "images" / f"{name}.png", brighter)
        mask = yard(1)[1].repeat(3, 0).repeat(3, 1).copy()
        mask[:rows] = 3
        save(tmp_path / "masks" / f"{name}.png", mask)
    survey = inspect_dataset(tmp_path)
    kinds = ("exact duplicate", "near duplicate", "same image, different masks")
    found = [each for each in survey.findings if each.kind in kinds]
    shown = {
        tuple(caption for caption, _ in pictures[:2]): [picture for _, picture in pictures[:2]]
        for each in found
        if (pictures := draw_evidence(each, survey.dataset))
    }
    marked = [
        [(picture == (255, 0, 170)).all(2).mean() for picture in pictures]
        for captions, pictures in shown.items()
        if captions[1].startswith("images/x.png")
    ]
    assert len(marked) == 1
    assert all(share == pytest.approx(12 / 96, abs=0.02) for share in marked[0])
    equal = next(captions for captions in shown if captions[1].startswith("images/v.png"))
    assert "differ" not in "".join(equal)
    assert len(shown[equal]) == 2


def test_markdown_of_a_clean_set_has_no_findings(tmp_path: Path) -> None:
    inspect_dataset(write_trees(tmp_path / "data"), html=tmp_path / "page.html")
    markdown = (tmp_path / "page.md").read_text()
    assert "6 pairs of image and mask." in markdown
    assert "No findings." in markdown
    assert "| road | 1 | 33.33 % | 540 | 6 |" in markdown


def test_page_that_cannot_be_written_is_refused_before_the_survey(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("surveyed")

    monkeypatch.setattr("useg.reporting.inspection.survey_dataset", fail)
    root = write_trees(tmp_path / "data")
    with pytest.raises(UsageError, match="does not exist"):
        inspect_dataset(root, html=tmp_path / "nowhere" / "page.html")
    with pytest.raises(UsageError, match=r"a name that ends in .html"):
        inspect_dataset(root, html=tmp_path / "page.md")


def test_command_writes_page_and_markdown(tmp_path: Path) -> None:
    root = write_trees(tmp_path / "data")
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(root), "--html", str(tmp_path / "page.html")])
    assert stopped.value.code in (0, None)
    assert (tmp_path / "page.md").is_file()
