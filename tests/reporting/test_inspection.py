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

from useg.cli import main
from useg.errors import UsageError
from useg.reporting.inspection import NUM_SAMPLES, inspect_dataset


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
