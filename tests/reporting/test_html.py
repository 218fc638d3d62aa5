"""The gallery is chosen, thumbnails mark errors, and charts show what was counted."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_reporting import make_evaluation
from PIL import Image

from useg.classes import IGNORE
from useg.data.dataset import Pair
from useg.errors import SettingsError
from useg.images.image_files import Sample
from useg.reporting.evaluation_result import ImageScore
from useg.reporting.html import (
    choose_gallery,
    error_map_svg,
    make_thumbnail,
    markdown_path,
    reliability_curve_svg,
)
from useg.scoring.uncertainty import Bin, Calibration


def test_gallery_has_best_median_worst_and_the_worst_of_each_class() -> None:
    tallies = [np.full((3, 5), 100) for _ in range(30)]
    # Image 7 misses more Poles than any other.
    tallies[7] = tallies[7] + np.array([[0], [50], [0]]) * (np.arange(5) == 2)
    images = tuple(
        ImageScore(Pair(Path(f"i/{k}.png"), Path("m")), (37 * k % 30) / 30, 0.9, part)
        for k, part in enumerate(tallies)
    )
    chosen = choose_gallery(replace(make_evaluation(), images=images), most=6)
    ious = [images[k].mean_iou for _, k in chosen]
    assert len(chosen) == 6
    assert ious == sorted(ious, reverse=True)
    assert (chosen[0][0], chosen[-1][0]) == ("best", "worst")
    assert ("worst in Poles", 7) in chosen
    assert "median" in [reason for reason, _ in chosen]
    three = replace(make_evaluation(), images=(images[7], *images[:2]))
    reasons = [reason for reason, _ in choose_gallery(three, most=3)]
    assert any("worst in Poles" in reason for reason in reasons)


def test_gallery_of_few_images_shows_each_once() -> None:
    evaluation = make_evaluation()
    assert sorted(k for _, k in choose_gallery(evaluation)) == list(range(9))
    void, first = evaluation.images[-1:], evaluation.images[:1]
    assert choose_gallery(replace(evaluation, images=void)) == []
    assert len(choose_gallery(replace(evaluation, images=first))) == 1


def test_thumbnail_marks_errors_but_not_ignored_pixels() -> None:
    label = np.zeros((300, 400), np.uint8)
    label[:, 300:] = IGNORE
    prediction = np.zeros_like(label)
    prediction[:, 200:] = 1
    grey = Sample(np.full((300, 400, 3), 40, np.uint8), label)
    small = np.asarray(Image.open(io.BytesIO(make_thumbnail(grey, prediction))), int)
    assert small.shape == (120, 160, 3)
    assert np.abs(small[:, :70] - 40).max() < 12
    assert small[:, 90:110, 0].min() > 150
    assert np.abs(small[:, 130:] - 40).max() < 12


def test_error_map_has_a_cell_for_each_rate_that_is_known() -> None:
    rates = np.full((12, 16), 0.01)
    rates[0, 15] = 0.4
    drawing = error_map_svg(rates)
    assert drawing.count("<rect") == 192
    assert drawing.count("--share:1.00") == 1
    rates[1] = np.nan
    assert error_map_svg(rates).count("<rect") == 176


def test_reliability_curve_leaves_out_bins_with_few_pixels() -> None:
    curve = (Bin(0.1, 0.9, 0.0001), Bin(0.5, 0.4, 0.1), Bin(0.9, 0.95, 0.8999))
    assert reliability_curve_svg(Calibration(0.1, 0.8, 1.0, curve)).count("<circle") == 2


def test_markdown_path_refuses_the_page_itself_and_a_missing_folder(tmp_path: Path) -> None:
    assert markdown_path(tmp_path / "a.html") == tmp_path / "a.md"
    with pytest.raises(
        SettingsError, match=r"its Markdown gets that name; give a name that ends in .html"
    ):
        markdown_path(tmp_path / "a.md")
    with pytest.raises(
        SettingsError, match=r"the folder '.*nowhere' does not exist; create it or choose another"
    ):
        markdown_path(tmp_path / "nowhere/a.html")
