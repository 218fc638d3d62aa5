"""Evaluations, reports and surveys to write, and a parser that reads their pages."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from useg.classes import IGNORE, ClassTable
from useg.data.dataset import Dataset, Pair
from useg.images.image_files import Sample
from useg.reporting.evaluation_result import Cause, Evaluation, ImageScore
from useg.reporting.html import make_thumbnail
from useg.reporting.text import Command, GalleryImage, Report
from useg.scoring.boundaries import boundary_counts, score_boundaries
from useg.scoring.metrics import place_counts, region_counts, score, score_regions, tally
from useg.scoring.uncertainty import Bin, Calibration, score_intervals

# A name that would run as a script if a page did not escape it.
HOSTILE_NAME = "<script>alert('x')</script>"
TABLE = ClassTable(("Sky", "Buildings", "Poles", HOSTILE_NAME, "Trams"))
COUNTS = np.array(
    [[50, 0, 0, 0, 0], [2, 96, 2, 0, 0], [0, 18, 82, 0, 0], [0, 0, 0, 10, 0], [0, 0, 0, 0, 0]]
)
VOID_TAGS = {
    *("area", "base", "br", "col", "embed", "hr", "img"),
    *("input", "link", "meta", "source", "track", "wbr"),
}
ADDRESS_ATTRIBUTES = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")


class ParsedPage(HTMLParser):
    """The tags (balanced, or the test fails), the text and the addresses of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str | None] = []
        self.text = ""
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value for key, value in attributes if key in ADDRESS_ATTRIBUTES]
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID_TAGS:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> is out of order in line {self.getpos()[0]}"

    def handle_data(self, text: str) -> None:
        self.text += text if self.open and self.open[-1] not in ("script", "style") else ""


def assert_self_contained(page: ParsedPage) -> None:
    """Check that a page refers to nothing outside itself."""
    written = re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page.source)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", written)
    assert page.addresses
    assert all(str(address).startswith(("data:image/", "#")) for address in page.addresses)
    assert not {"link", "iframe", "object", "base"} & set(page.tags)


def make_evaluation(counts: np.ndarray = COUNTS, split: str = "val") -> Evaluation:
    """Ten images; the last has no labelled pixel."""
    folder = Path("data/street/i")
    images = [
        ImageScore(
            Pair(folder / f"{k}.png", Path(f"m/{k}.png")), k / 10, 0.9, tally(counts) * (k > 0)
        )
        for k in range(9)
    ]
    void = Pair(folder / "void.png", Path("m/void.png"))
    images.append(ImageScore(void, math.nan, math.nan, np.zeros((3, 5), np.int64)))
    maps = np.random.default_rng(2).integers(0, 3, (2, 24, 32), dtype=np.uint8)
    return Evaluation(
        scores=score(counts, TABLE.names, len(images)),
        images=tuple(images),
        counts=counts,
        model="runs/a/model.safetensors",
        dataset="data/street",
        split=split,
        blocks=tuple(range(10)),
        intervals=score_intervals(np.stack([image.tally for image in images]), range(10)),
        boundaries=score_boundaries(boundary_counts(maps[0], maps[1], 5)),
        calibration=Calibration(0.03, 0.9, 1.4, (Bin(0.5, 0.4, 0.2), Bin(0.95, 0.93, 0.8))),
        sizes=score_regions(region_counts(maps[0], maps[1], 5)),
        places=place_counts(*maps),
    )


def make_gallery_image(
    reason: str = "best", ious: tuple[float, ...] = (0.9, 0.2, 0.1, math.nan, math.nan)
) -> GalleryImage:
    """An image of seven bands, with ignored pixels and errors."""
    rng = np.random.default_rng(5)
    label = rng.choice(np.uint8([0, 1, 2, IGNORE]), (24, 32))
    prediction = rng.integers(0, 3, (24, 32), dtype=np.uint8)
    image = rng.integers(0, 65536, (24, 32, 7), dtype=np.uint16)
    return GalleryImage(reason, f"{reason or 'some'}.png", 0.5, ious, image, label, prediction)


def make_thumbnails() -> list[bytes]:
    """Ten thumbnails, all pixels of which are wrong."""
    rng = np.random.default_rng(6)
    label = np.zeros((60, 80), np.uint8)
    images = [rng.integers(0, 256, (60, 80, 3), dtype=np.uint8) for _ in range(10)]
    return [make_thumbnail(Sample(image, label), label + 1) for image in images]


def make_report() -> Report:
    """A report that has every part, and some hostile text."""
    ious = {4: 0.3, 9: 0.4}
    return Report(
        f"Streets & {HOSTILE_NAME}",
        make_evaluation(),
        TABLE,
        gallery=[
            make_gallery_image("best"),
            make_gallery_image("median; worst in Poles"),
            make_gallery_image(""),
            make_gallery_image("worst", (0.9, math.nan, 0.3, math.nan, math.nan)),
        ],
        thumbnails=make_thumbnails(),
        log=[
            {"step": k, "epoch": 1, "loss": 1 / (k + 1), "mean_iou": ious.get(k)} for k in range(10)
        ],
        facts={"Seed": "7", HOSTILE_NAME: HOSTILE_NAME},
        caveats=["Read with care.", HOSTILE_NAME],
        causes=[
            Cause(
                "Poles",
                "confused in regions",
                f"Poles are thin {HOSTILE_NAME}",
                "half of the pixels are in 2 regions",
                "train at a larger size",
            )
        ],
        commands=[Command("useg train data --set a='<b>' && echo \"done\"", "train again")],
        temperature_fitted_here=True,
    )


def make_split_dataset(
    splits: Sequence[str], splits_by: str = "blocks: the last 20 %", names: str = "f_{}"
) -> Dataset:
    """A data set whose images do not exist, with a split for each."""
    pairs = tuple(
        Pair(Path(f"street/{names.format(k)}.png"), Path(f"m/{k}.png"), split)
        for k, split in enumerate(splits)
    )
    return Dataset(Path("street"), "folders", pairs, TABLE, splits_by=splits_by)


def make_survey() -> dict[str, Any]:
    """A survey of a data set with two findings."""
    classes = [
        {"id": k, "name": name, "pixels": 10 * (4 - k), "share": 0.1 * (4 - k), "images": 4 - k}
        for k, name in enumerate(TABLE.names)
    ]
    findings = [
        {
            "kind": "unreadable",
            "severity": "error",
            "files": [f"{k}.png" for k in range(40)],
            "message": f"bad {HOSTILE_NAME}",
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
    return {
        "num_pairs": 4,
        "layout": "carla",
        "sizes": {"800x600": 3, "640x480": 1},
        "splits": {"train": 3, "": 1},
        "classes": classes,
        "findings": findings,
    }
