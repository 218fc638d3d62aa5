"""Reports: the pages are read back with the standard library's HTML parser."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError

from useg.classes import IGNORE, ClassTable
from useg.data.dataset import Dataset, Pair
from useg.errors import UsageError
from useg.images.files import Sample
from useg.reporting import page as report_page
from useg.reporting import text as wording
from useg.reporting.evaluate import Cause, Evaluation, ImageScore
from useg.reporting.html import (
    choose_gallery,
    error_map_svg,
    make_thumbnail,
    markdown_path,
    reliability_curve_svg,
)
from useg.reporting.inspection import write_survey_page
from useg.reporting.page import write_report
from useg.reporting.report import command_lines, write_markdown
from useg.reporting.text import (
    Command,
    GalleryImage,
    Report,
    confusion_sentences,
    find_caveats,
    format_percent,
    image_names,
)
from useg.scoring.boundaries import Membranes, boundary_counts, score_boundaries
from useg.scoring.metrics import score, tally
from useg.scoring.regions import Objects, place_counts, region_counts, score_regions
from useg.scoring.uncertainty import Bin, Calibration, score_intervals

pytestmark = pytest.mark.wheel

NASTY = "<script>alert('x')</script>"
TABLE = ClassTable(("Sky", "Buildings", "Poles", NASTY, "Trams"))
COUNTS = np.array(
    [[50, 0, 0, 0, 0], [2, 96, 2, 0, 0], [0, 18, 82, 0, 0], [0, 0, 0, 10, 0], [0, 0, 0, 0, 0]]
)
VOID = {
    "area",
    "base",
    "br",
    "col",
    "embed",
    "hr",
    "img",
    "input",
    "link",
    "meta",
    "source",
    "track",
    "wbr",
}


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
        self.addresses += [
            value
            for key, value in attributes
            if key in ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
        ]
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
    """Ten images; the last has no judged pixel."""
    images = tuple(
        ImageScore(
            Pair(Path(f"data/street/i/{k}.png"), Path(f"m/{k}.png")),
            k / 10,
            0.9,
            tally(counts) * (k > 0),
        )
        for k in range(9)
    )
    images += (
        ImageScore(
            Pair(Path("data/street/i/void.png"), Path("m/void.png")),
            math.nan,
            math.nan,
            np.zeros((3, 5), np.int64),
        ),
    )
    sample = np.random.default_rng(2).integers(0, 3, (2, 24, 32), dtype=np.uint8)
    return Evaluation(
        score(counts, TABLE.names, len(images)), images, counts, "runs/a/model.safetensors", "data/street", split, tuple(range(10)),
        score_intervals(np.stack([image.tally for image in images]), range(10)),
        score_boundaries(boundary_counts(*sample, 5)), Calibration(0.03, 0.9, 1.4, (Bin(0.5, 0.4, 0.2), Bin(0.95, 0.93, 0.8))),
        score_regions(region_counts(*sample, 5)), place_counts(*sample),
    )  # fmt: skip


def case(reason="best", ious=(0.9, 0.2, 0.1, math.nan, math.nan)):
    rng = np.random.default_rng(5)
    label = rng.choice(np.uint8([0, 1, 2, IGNORE]), (24, 32))
    prediction = rng.integers(0, 3, (24, 32), dtype=np.uint8)
    return GalleryImage(
        reason,
        f"{reason or 'some'}.png",
        0.5,
        ious,
        rng.integers(0, 65536, (24, 32, 7), dtype=np.uint16),
        label,
        prediction,
    )


def thumbnails():
    rng = np.random.default_rng(6)
    label = np.zeros((60, 80), np.uint8)
    return [
        make_thumbnail(Sample(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8), label), label + 1)
        for _ in range(10)
    ]


SCORES = {4: 0.3, 9: 0.4}
LOG = [{"step": k, "epoch": 1, "loss": 1 / (k + 1), "mean_iou": SCORES.get(k)} for k in range(10)]


def full_report():
    """A report with everything in it, some of it hostile."""
    return Report(
        f"Streets & {NASTY}",
        evaluation(),
        TABLE,
        gallery=[
            case("best"),
            case("median; worst in Poles"),
            case(""),
            case("worst", (0.9, math.nan, 0.3, math.nan, math.nan)),
        ],
        thumbnails=thumbnails(),
        log=LOG,
        facts={"Seed": "7", NASTY: NASTY},
        caveats=["Read with care.", NASTY],
        causes=[
            Cause(
                "Poles",
                "confused in regions",
                f"Poles are thin {NASTY}",
                "half of it lies in 2 pixels",
                "train larger",
            )
        ],
        commands=[Command("useg train data --set a='<b>' && echo \"done\"", "train again")],
        temperature_fitted_here=True,
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, full_report())
    return Page(path)


def survey():
    classes = [
        {"id": k, "name": name, "pixels": 10 * (4 - k), "share": 0.1 * (4 - k), "images": 4 - k}
        for k, name in enumerate(TABLE.names)
    ]
    findings = [
        {
            "kind": "unreadable",
            "severity": "error",
            "files": [f"{k}.png" for k in range(40)],
            "message": f"bad {NASTY}",
            "remedy": "replace it",
        },
        {
            "kind": "rare_class",
            "severity": "note",
            "files": [],
            "message": "Poles are rare",
            "remedy": "add some",
        },
    ]
    sizes = {"800x600": 3, "640x480": 1}
    return {
        "num_pairs": 4,
        "layout": "carla",
        "sizes": sizes,
        "splits": {"train": 3, "": 1},
        "classes": classes,
        "findings": findings,
    }


def assert_self_contained(page):
    written = re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page.source)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", written), (
        "something outside is named"
    )
    assert page.addresses
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not {"link", "iframe", "object", "base"} & set(page.tags)


def test_the_report_is_self_contained(page):
    assert_self_contained(page)


def test_the_report_says_what_was_measured_on_what(page):
    for text in (
        "10 images in the split “val” of data/street, at native resolution",
        "Read with care.",
        "runs/a/model.safetensors",
        "Seed",
    ):
        assert text in page.text.replace("\xa0", " ")


def test_the_head_line_is_the_evaluation_s(page):
    scores = evaluation().scores
    for value in (scores.mean_iou, scores.pixel_accuracy, scores.mean_dice):
        assert f"<dd>{100 * value:.1f}<small>" in page.source


def test_the_mean_iou_comes_with_its_interval(page):
    found = evaluation().intervals.mean_iou
    assert f"would lie between {100 * found.low:.1f} and {100 * found.high:.1f} %" in page.text
    assert f"--low:{100 * found.low:.2f}%;--high:{100 * found.high:.2f}%" in page.source


def test_every_class_is_named_and_absent_ones_as_absent(page):
    for name in TABLE.names:
        assert name in page.text
    assert "Not in the ground truth, so not scored and not part of any mean: Trams." in " ".join(
        page.text.split()
    )
    rows = re.findall(r'class="name" data-value="([^"]*)"', page.source)
    assert len(rows) == 4, "an absent class has no row"
    for head in ("Boundary", "Thin", "Pixels"):
        assert head in page.text


def test_texts_cannot_become_markup(page):
    assert "<script>alert" not in page.source
    assert page.source.count("<script>") == 1
    assert page.text.count(NASTY) >= 5
    assert NASTY not in page.source


def test_commands_can_be_copied_exactly(page):
    assert "useg train data --set a='<b>' && echo \"done\"" in page.text
    assert page.source.count('class="copy"') == 1


def test_the_gallery_shows_four_pictures_each(page):
    assert page.source.count('alt="errors of ') == 4
    assert page.tags.count("img") == 4 * 4 + 10 + 1  # each image small, and the one to wipe
    for word in ("Best", "Worst", "worst.png", "image", "truth", "prediction", "errors"):
        assert word in page.text
    assert (
        len([address for address in page.addresses if address.startswith("data:image/jpeg")])
        == 4 + 10
    ), "photographs as JPEG, label maps exact"


def test_pages_are_printed_with_best_median_and_worst_alone(page):
    assert re.findall(r'class="case( extra)?" data-name="[^"]*" data-reason="([^"]*)"', page.source) == [
        ("", "best"), ("", "median; worst in Poles"), (" extra", ""), ("", "worst"),
    ]  # fmt: skip


def test_every_image_is_listed_weakest_first(page):
    listed = re.findall(r'<li title="([^"]*)" data-iou="([^"]*)"', page.source)
    assert [name for name, _ in listed] == [*(f"{k}.png" for k in range(9)), "void.png"]
    assert listed[-1][1] == "nan"


def test_what_could_be_wrong_and_why_is_said(page):
    for text in (
        "Before you trust these numbers",
        "Likely causes of low scores",
        "Half of it lies in 2 pixels.",
        "What to do: Train larger.",
    ):
        assert text in page.text
    assert "The temperature was fitted on these images" in page.text


def test_objects_and_membranes_where_they_were_asked_for(page, tmp_path):
    assert "Membranes" not in page.text
    things = Objects(0.8, 0.9, 0.7, 10, 9, 7, 2, 1)
    found = replace(
        evaluation(), objects=things, membranes=Membranes(0.001, 0.02, 0.03, (0.5, 0.5, 0.5))
    )
    write_report(tmp_path / "report.html", Report("T", found, TABLE))
    text = Page(tmp_path / "report.html").text
    assert "F1 80.0 % at IoU 0.5: 7 of 10 true objects matched, 9 objects predicted." in text
    assert "warping error 0.001000" in text


def test_drawings_are_inline(page):
    assert page.tags.count("svg") == 4, (
        "two training curves, the reliability curve, the map of errors"
    )


def test_worst_confusions_in_words(page):
    assert confusion_sentences(COUNTS, TABLE.names) == [
        "18 % of Poles pixels are predicted as Buildings",
        "2.0 % of Buildings pixels are predicted as Sky",
        "2.0 % of Buildings pixels are predicted as Poles",
    ]
    assert "18 % of Poles pixels are predicted as Buildings" in page.text


def test_confusions_are_ranked_by_share_then_by_pixels():
    counts = np.array([[900, 100, 0], [0, 5, 5], [10, 0, 10]])
    assert confusion_sentences(counts, "abc", 2) == [
        "50 % of c pixels are predicted as a",
        "50 % of b pixels are predicted as c",
    ]


def test_confusions_of_a_perfect_and_of_an_empty_result():
    assert confusion_sentences(np.diag([3, 4]), ("a", "b")) == []
    assert confusion_sentences(np.zeros((2, 2), np.int64), ("a", "b")) == []
    assert confusion_sentences(np.array([[99_999, 1], [0, 5]]), ("a", "b")) == [
        "less than 0.1 % of a pixels are predicted as b"
    ]
    assert confusion_sentences(np.array([[0, 9], [0, 5]]), ("a", "b")) == [
        "100 % of a pixels are predicted as b"
    ]


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0.0 %"), (1, "100.0 %"), (0.0004, "less than 0.1 %"), (0.123, "12.3 %"), (math.nan, "–")],  # noqa: RUF001
)
def test_percent(share, text):
    assert format_percent(share) == text


def test_the_matrix_and_the_spread_are_there(page):
    assert page.source.count('class="hit"') == 4
    assert (
        "Half of the images score between 20.0 % and 60.0 %; the median is 40.0 %."
        in page.text.replace("\xa0", " ")
    )


def test_the_least_that_can_be_reported(tmp_path):
    nothing = np.zeros((5, 5), np.int64)
    empty = Evaluation(score(nothing, TABLE.names, 1), (), nothing, "m", "d", "all")
    write_report(tmp_path / "report.html", Report("Nothing", empty, TABLE))
    write_markdown(tmp_path / "report.md", Report("Nothing", empty, TABLE))
    assert "nan" not in (tmp_path / "report.md").read_text()
    page = Page(tmp_path / "report.html")
    assert "nan" not in page.text
    assert "1 image of d" in page.text
    assert "img" not in page.tags
    assert "svg" not in page.tags


def test_markdown_tells_the_same_story(tmp_path):
    write_markdown(tmp_path / "report.md", full_report())
    text = (tmp_path / "report.md").read_text()
    assert "<script" not in text.replace("\\<", "")
    scores, found = evaluation().scores, evaluation().intervals.mean_iou
    assert (
        f"| mean IoU | {100 * scores.mean_iou:.1f} | {100 * found.low:.1f} to {100 * found.high:.1f} |"
        in text
    )
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


def test_names_cannot_break_a_table_of_markdown(tmp_path):
    table = replace(TABLE, names=("a|b", "c\nd", "*e*", "`f`", "g"))
    write_markdown(
        tmp_path / "report.md",
        Report("T", replace(evaluation(), scores=score(COUNTS, table.names, 1)), table),
    )
    text = (tmp_path / "report.md").read_text()
    for name in (r"| a\|b |", "| c d |", r"| \*e\* |", r"| \`f\` |"):
        assert name in text


def test_best_median_worst_and_each_class_s_worst_are_chosen():
    tallies = [np.full((3, 5), 100) for _ in range(30)]
    tallies[7] = tallies[7] + np.array([[0], [50], [0]]) * (
        np.arange(5) == 2
    )  # misses more of Poles than any other
    images = tuple(
        ImageScore(Pair(Path(f"i/{k}.png"), Path("m")), (37 * k % 30) / 30, 0.9, part)
        for k, part in enumerate(tallies)
    )
    found = choose_gallery(replace(evaluation(), images=images), most=6)
    values = [images[k].mean_iou for _, k in found]
    assert len(found) == 6
    assert values == sorted(values, reverse=True)
    assert (found[0][0], found[-1][0]) == ("best", "worst")
    assert ("worst in Poles", 7) in found
    assert "median" in [reason for reason, _ in found]
    three = choose_gallery(replace(evaluation(), images=(images[7], *images[:2])), most=3)
    assert [reason for reason, _ in three if "worst in Poles" in reason], (
        "no further picture, but a further reason"
    )


def test_with_few_images_all_are_shown_and_none_twice():
    assert sorted(k for _, k in choose_gallery(evaluation())) == list(range(9))
    assert choose_gallery(replace(evaluation(), images=evaluation().images[-1:])) == []
    assert len(choose_gallery(replace(evaluation(), images=evaluation().images[:1]))) == 1


def test_names_lose_the_folder_that_they_share():
    def names(*paths):
        return image_names(
            replace(
                evaluation(),
                images=tuple(ImageScore(Pair(Path(path), Path("m")), 0.5, 0.5) for path in paths),
            )
        )

    assert names("/d/a/1.png", "/d/a/2.png") == ["1.png", "2.png"]
    assert names("/d/a/1.png", "/d/b/1.png") == ["a/1.png", "b/1.png"]
    assert names("1.png", "2.png") == ["1.png", "2.png"]


def test_a_thumbnail_shows_errors_where_they_are():
    from io import BytesIO

    from PIL import Image

    label = np.zeros((300, 400), np.uint8)
    label[:, 300:] = IGNORE
    prediction = np.zeros_like(label)
    prediction[:, 200:] = 1
    small = np.asarray(
        Image.open(
            BytesIO(make_thumbnail(Sample(np.full((300, 400, 3), 40, np.uint8), label), prediction))
        ),
        int,
    )
    assert small.shape == (120, 160, 3)
    assert np.abs(small[:, :70] - 40).max() < 12
    assert small[:, 90:110, 0].min() > 150
    assert np.abs(small[:, 130:] - 40).max() < 12, "what is ignored is no error"


def held(*splits, splits_by="blocks: the last 20 %", names="f_{}"):
    pairs = tuple(
        Pair(Path(f"street/{names.format(k)}.png"), Path(f"m/{k}.png"), split)
        for k, split in enumerate(splits)
    )
    return Dataset(Path("street"), "folders", pairs, TABLE, splits_by)


HERE = {"dataset": "street", "num_train": 8}
FILM = held(*["train"] * 8, *["val"] * 3)


@pytest.mark.parametrize(
    ("found", "dataset", "provenance", "twins", "said"),
    [
        (
            evaluation(),
            FILM,
            HERE,
            0,
            ["Training selected the checkpoint", "come from the same recordings"],
        ),
        (
            evaluation(),
            FILM,
            {**HERE, "num_train": 9},
            None,
            ["trained on 9 images of this data set, but this split has 8 training images"],
        ),
        (
            evaluation(),
            FILM,
            HERE,
            3,
            ["3 of these images are near-duplicates of training images"],
        ),
        (evaluation(split="all"), FILM, HERE, None, ["these images include its training images"]),
        (
            evaluation(),
            FILM,
            HERE,
            None,
            [
                "Not in the ground truth, so not scored",
                "too few images or pixels for a reliable score",
                "Poles (100 pixels in 8 images)",
            ],
        ),
        (evaluation(split="test"), FILM, {"dataset": "elsewhere"}, None, []),
    ],
)
def test_what_could_make_the_scores_wrong_is_said(found, dataset, provenance, twins, said):
    text = " ".join(find_caveats(found, dataset, provenance, twins))
    for part in said:
        assert part in text
    assert ("selected the checkpoint" in text) == (
        found.split == "val" and provenance.get("dataset") == "street"
    )


def test_recordings_on_both_sides_are_told_by_names_not_by_guesses():
    def said(dataset):
        return "same recordings" in " ".join(find_caveats(evaluation(), dataset, HERE))

    assert said(replace(FILM, splits_by="split.csv"))
    assert not said(replace(FILM, splits_by="random, by a hash of the name"))
    apart = replace(
        FILM,
        pairs=tuple(
            replace(pair, image=Path(f"street/{pair.split}_{k}.png"))
            for k, pair in enumerate(FILM.pairs)
        ),
    )
    assert not said(apart)


def test_where_errors_are_is_said_in_words():
    counts = np.stack([np.full((12, 16), 100), np.ones((12, 16), int)])
    counts[1, 0, 15] = 40
    words = wording.position_sentence(replace(evaluation(), places=counts))
    assert (
        words
        == "Errors are most frequent at the top right: 40 % of the pixels in that cell are wrong, "
        "compared with 1.0 % in the best cell."
    )
    drawn = error_map_svg(counts[1] / counts[0])
    assert drawn.count("<rect") == 192
    assert drawn.count("--share:1.00") == 1


def test_the_reliability_curve_leaves_out_what_says_nothing():
    curve = (Bin(0.1, 0.9, 0.0001), Bin(0.5, 0.4, 0.1), Bin(0.9, 0.95, 0.8999))
    assert reliability_curve_svg(Calibration(0.1, 0.8, 1.0, curve)).count("<circle") == 2


@pytest.mark.parametrize(
    ("confidence", "temperature", "fitted", "said"),
    [
        (
            0.99,
            1.5,
            True,
            [
                "overconfident",
                "lowered its confidence",
                "divided by 1.50",
                "fitted on these images",
            ],
        ),
        (0.5, 0.8, False, ["underconfident", "raised its confidence"]),
        (0.9134, 1.0, False, ["neither overconfident nor underconfident"]),
    ],
)
def test_calibration_in_words(confidence, temperature, fitted, said):
    found = replace(evaluation(), calibration=Calibration(0.02, confidence, temperature, ()))
    words = " ".join(
        wording.calibration_sentences(Report("T", found, TABLE, temperature_fitted_here=fitted))
    )
    for part in said:
        assert part in words
    assert ("fitted on these images" in words) == fitted
    assert ("Temperature scaling" in words) == (temperature != 1)


def test_command_lines_name_the_model_and_quote_what_a_shell_would_split():
    lines = [command.text for command in command_lines("my runs/a", "data", "val")]
    assert lines[0] == "useg evaluate 'my runs/a' data --split val --html report.html"
    assert lines[1].startswith("useg predict 'my runs/a' ")


def test_a_page_that_would_be_overwritten_or_has_no_folder_is_refused(tmp_path):
    assert markdown_path(tmp_path / "a.html") == tmp_path / "a.md"
    with pytest.raises(
        UsageError, match=r"because its Markdown gets that name; give a name that ends in .html"
    ):
        markdown_path(tmp_path / "a.md")
    with pytest.raises(
        UsageError, match=r"the folder '.*nowhere' does not exist; create it or choose another"
    ):
        markdown_path(tmp_path / "nowhere/a.html")


def test_class_scores_of_each_image_are_json(page):
    entries = re.findall(r'data-ious="([^"]*)"', page.source)
    assert len(entries) == 4 + 10
    assert json.loads(entries[0].replace("&#34;", '"')) == {"0": 0.9, "1": 0.2, "2": 0.1}


@pytest.mark.parametrize("existing", [None, "the old page"])
def test_a_report_that_fails_leaves_no_file(tmp_path, monkeypatch, existing):
    path = tmp_path / "report.html"
    if existing:
        path.write_text(existing)
    monkeypatch.setattr(report_page, "_iou_distribution", lambda found: {"low": 0.1})
    with pytest.raises(UndefinedError, match="high"):
        write_report(path, Report("T", evaluation(), TABLE))
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ([existing] if existing else [])


def test_a_reader_of_the_old_page_keeps_the_whole_old_page(tmp_path):
    path = tmp_path / "survey.html"
    path.write_text("the old page")
    with path.open() as reader:
        write_survey_page(path, survey(), [])
        assert reader.read() == "the old page"
    assert Page(path).text


def test_a_folder_that_is_not_there_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot be written"):
        write_survey_page(tmp_path / "nowhere" / "survey.html", survey(), [])


def test_the_survey(tmp_path):
    picture = np.zeros((20, 30, 3), np.uint8)
    write_survey_page(tmp_path / "survey.html", survey(), [("a.png", picture), (NASTY, picture)])
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
    assert "Not in any mask: Trams." in page.text
    assert "<script>alert" not in page.source
    assert page.tags.count("img") == 2
    assert "5.png" in page.text
    assert "6.png" not in page.text


def test_a_survey_without_findings(tmp_path):
    write_survey_page(
        tmp_path / "survey.html", {**survey(), "findings": [], "root": "/somewhere/streets"}, []
    )
    page = Page(tmp_path / "survey.html")
    assert "No findings" in page.text
    assert "<h1>streets</h1>" in page.source
