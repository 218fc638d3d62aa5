"""Reports: the pages are read back with the standard library's HTML parser."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError

from useg.classes import IGNORE, ClassTable
from useg.data.dataset import Pair
from useg.errors import UsageError
from useg.reporting import report
from useg.reporting.evaluate import Evaluation, ImageScore
from useg.reporting.report import Command, Showcase, percent, worst_confusions, write_report, write_survey
from useg.scoring.metrics import score

NASTY = "<script>alert('x')</script>"
TABLE = ClassTable(("Sky", "Buildings", "Poles", NASTY, "Trams"))
COUNTS = np.array([[50, 0, 0, 0, 0], [2, 96, 2, 0, 0], [0, 18, 82, 0, 0], [0, 0, 0, 10, 0], [0, 0, 0, 0, 0]])
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """A page as its tags (balanced, or the test fails), its texts and its addresses."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for key, value in attributes if key in ("src", "href", "xlink:href", "srcset", "action", "data", "poster")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> is out of order in line {self.getpos()[0]}"

    def handle_data(self, text):
        self.text += text if self.open and self.open[-1] not in ("script", "style") else ""


def evaluation(counts=COUNTS, split="val"):
    images = tuple(ImageScore(Pair(Path(f"images/{k}.png"), Path(f"masks/{k}.png")), k / 10, 0.9) for k in range(9))
    images += (ImageScore(Pair(Path("images/void.png"), Path("masks/void.png")), math.nan, math.nan),)
    return Evaluation(score(counts, TABLE.names, len(images)), images, counts, "runs/a/model.safetensors", "data/street", split)


def showcase(rank="best"):
    rng = np.random.default_rng(5)
    label = rng.choice(np.uint8([0, 1, 2, IGNORE]), (24, 32))
    return Showcase(
        rank, f"{rank}.png", 0.5, rng.integers(0, 65536, (24, 32, 7), dtype=np.uint16), label, rng.integers(0, 3, (24, 32), dtype=np.uint8)
    )


LOG = [{"step": k, "epoch": 1, "loss": 1 / (k + 1), "mean_iou": 0.4 if k == 9 else None} for k in range(10)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(
        path,
        title=f"Streets & {NASTY}",
        evaluation=evaluation(),
        table=TABLE,
        showcases=[showcase("best"), showcase("worst")],
        log=LOG,
        facts={"Seed": "7", NASTY: NASTY},
        warnings=["Read with care.", NASTY],
        commands=[Command("useg train data --set a='<b>' && echo \"done\"", "Train again.")],
    )
    return Page(path)


def survey():
    classes = [{"id": k, "name": name, "pixels": 10 * (4 - k), "share": 0.1 * (4 - k), "images": 4 - k} for k, name in enumerate(TABLE.names)]
    findings = [
        {"kind": "unreadable", "severity": "error", "files": [f"{k}.png" for k in range(40)], "message": f"bad {NASTY}", "remedy": "replace it"},
        {"kind": "rare_class", "severity": "note", "files": [], "message": "Poles are rare", "remedy": "add some"},
    ]
    sizes = {"800x600": 3, "640x480": 1}
    return {"num_pairs": 4, "layout": "carla", "sizes": sizes, "splits": {"train": 3, "": 1}, "classes": classes, "findings": findings}


def assert_self_contained(page):
    written = re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page.source)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", written), "something outside is named"
    assert page.addresses
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not {"link", "iframe", "object", "base"} & set(page.tags)


def test_the_report_is_self_contained(page):
    assert_self_contained(page)


def test_the_report_says_what_was_measured_on_what(page):
    for text in ("10 images in the split “val” of data/street, at native resolution", "Read with care.", "runs/a/model.safetensors", "Seed"):
        assert text in page.text.replace("\xa0", " ")


def test_the_head_line_is_the_evaluation_s(page):
    scores = evaluation().scores
    for value in (scores.mean_iou, scores.pixel_accuracy, scores.mean_dice):
        assert f"<dd>{100 * value:.1f}<small>" in page.source


def test_every_class_is_named_and_absent_ones_as_absent(page):
    for name in TABLE.names:
        assert name in page.text
    assert "Not in the truth, so without a score and outside every mean: Trams." in page.text
    rows = re.findall(r'class="name" data-value="([^"]*)"', page.source)
    assert len(rows) == 4, "an absent class has no row"


def test_texts_cannot_become_markup(page):
    assert "<script>alert" not in page.source
    assert page.source.count("<script>") == 1
    assert page.text.count(NASTY) >= 5


def test_commands_can_be_copied_exactly(page):
    assert "useg train data --set a='<b>' && echo \"done\"" in page.text
    assert page.source.count('class="copy"') == 1


def test_the_gallery_shows_four_pictures_each(page):
    assert page.tags.count("img") == 8
    for word in ("Best", "Worst", "worst.png", "image", "truth", "prediction", "difference"):
        assert word in page.text
    assert len([address for address in page.addresses if address.startswith("data:image/jpeg")]) == 2, "photographs as JPEG, label maps exact"


def test_training_curves_are_inline(page):
    assert page.tags.count("svg") == 2


def test_worst_confusions_in_words(page):
    assert worst_confusions(COUNTS, TABLE.names) == [
        "18 % of Poles pixels are called Buildings",
        "2.0 % of Buildings pixels are called Sky",
        "2.0 % of Buildings pixels are called Poles",
    ]
    assert "18 % of Poles pixels are called Buildings" in page.text


def test_confusions_are_ranked_by_share_then_by_pixels():
    counts = np.array([[900, 100, 0], [0, 5, 5], [10, 0, 10]])
    assert worst_confusions(counts, "abc", 2) == ["50 % of c pixels are called a", "50 % of b pixels are called c"]


def test_confusions_of_a_perfect_and_of_an_empty_result():
    assert worst_confusions(np.diag([3, 4]), ("a", "b")) == []
    assert worst_confusions(np.zeros((2, 2), np.int64), ("a", "b")) == []
    assert worst_confusions(np.array([[99_999, 1], [0, 5]]), ("a", "b")) == ["less than 0.1 % of a pixels are called b"]
    assert worst_confusions(np.array([[0, 9], [0, 5]]), ("a", "b")) == ["100 % of a pixels are called b"]


@pytest.mark.parametrize(("share", "text"), [(0, "0.0 %"), (1, "100.0 %"), (0.0004, "less than 0.1 %"), (0.123, "12.3 %"), (math.nan, "–")])  # noqa: RUF001
def test_percent(share, text):
    assert percent(share) == text


def test_the_matrix_and_the_spread_are_there(page):
    assert page.source.count('class="hit"') == 4
    assert "Half of the images lie between 20.0 % and 60.0 %; the median is 40.0 %." in page.text.replace("\xa0", " ")
    assert "images/0.png" in page.text


def test_the_least_that_can_be_reported(tmp_path):
    nothing = np.zeros((5, 5), np.int64)
    empty = Evaluation(score(nothing, TABLE.names, 1), (), nothing, "m", "d", "all")
    write_report(tmp_path / "report.html", title="Nothing", evaluation=empty, table=TABLE, showcases=[])
    page = Page(tmp_path / "report.html")
    assert "nan" not in page.text
    assert "1 image of d" in page.text
    assert "img" not in page.tags
    assert "svg" not in page.tags


@pytest.mark.parametrize("existing", [None, "the old page"])
def test_a_report_that_fails_leaves_no_file(tmp_path, monkeypatch, existing):
    path = tmp_path / "report.html"
    if existing:
        path.write_text(existing)
    monkeypatch.setattr(report, "_spread", lambda images: {"low": 0.1})
    with pytest.raises(UndefinedError, match="high"):
        write_report(path, title="T", evaluation=evaluation(), table=TABLE, showcases=[])
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ([existing] if existing else [])


def test_a_reader_of_the_old_page_keeps_the_whole_old_page(tmp_path):
    path = tmp_path / "survey.html"
    path.write_text("the old page")
    with path.open() as reader:
        write_survey(path, survey(), [])
        assert reader.read() == "the old page"
    assert Page(path).text


def test_a_folder_that_is_not_there_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot be written"):
        write_survey(tmp_path / "nowhere" / "survey.html", survey(), [])


def test_the_survey(tmp_path):
    picture = np.zeros((20, 30, 3), np.uint8)
    write_survey(tmp_path / "survey.html", survey(), [("a.png", picture), (NASTY, picture)])
    page = Page(tmp_path / "survey.html")
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
    ):
        assert text in page.text
    for name in TABLE.names:
        assert name in page.text
    assert "In no mask: Trams." in page.text
    assert "<script>alert" not in page.source
    assert page.tags.count("img") == 2
    assert "5.png" in page.text
    assert "6.png" not in page.text


def test_a_survey_without_findings(tmp_path):
    write_survey(tmp_path / "survey.html", {**survey(), "findings": [], "root": "/somewhere/streets"}, [])
    page = Page(tmp_path / "survey.html")
    assert "Nothing to correct" in page.text
    assert "<h1>streets</h1>" in page.source
