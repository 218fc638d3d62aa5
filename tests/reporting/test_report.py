"""A report is published as a page and as Markdown, with the caveats of its data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_inference import make_model, make_predictor
from PIL import Image

import useg
from useg.classes import IGNORE, ClassTable
from useg.data.dataset import Dataset, Pair
from useg.data.duplicates import (
    MIN_REPORTED_CORRELATION,
    NEAR_DUPLICATE_CORRELATION,
    compute_signatures,
    normalize_signatures,
)
from useg.inference.predictor import Predictor
from useg.reporting import report
from useg.reporting.evaluate import CountSettings, Extras, evaluate_dataset
from useg.reporting.html import choose_gallery, collect_thumbnails, read_gallery
from useg.reporting.report import command_lines, publish_report
from useg.reporting.text import Report


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Six images; the first held-out image is a copy of a training image, the second is similar."""
    rng = np.random.default_rng(0)
    pairs: list[Pair] = []
    for k, name in enumerate("abcdef"):
        split = "train" if k < 3 else "val"
        pair = Pair(tmp_path / f"{name}.png", tmp_path / f"{k}_mask.png", split)
        image = rng.integers(0, 256, (24, 32, 3), np.uint8)
        if k == 3:
            image = np.asarray(Image.open(pairs[0].image))
        if k == 4:
            image = (0.75 * np.asarray(Image.open(pairs[1].image)) + 0.25 * image).astype(np.uint8)
        Image.fromarray(image).save(pair.image)
        Image.fromarray(rng.integers(0, 3, (24, 32), np.uint8)).save(pair.mask)
        pairs.append(pair)
    classes = ClassTable(("a", "b", "c", "d"))
    return Dataset(tmp_path, "folders", tuple(pairs), classes, splits_by="official")


def make_trained_predictor(dataset: Dataset) -> Predictor:
    """A predictor whose model says that it was trained on the data set."""
    predictor = make_predictor(make_model())
    description = replace(
        predictor.runtime.description,
        provenance={"dataset": dataset.root.name, "num_train": 3},
    )
    return Predictor(replace(predictor.runtime, description=description))


def test_page_and_markdown_name_duplicates_commands_and_split(dataset: Dataset) -> None:
    predictor, thumbnails = make_trained_predictor(dataset), []
    evaluation = evaluate_dataset(predictor, dataset, on_prediction=collect_thumbnails(thumbnails))
    content = Report(
        "T",
        evaluation,
        predictor.classes,
        thumbnails=thumbnails,
        commands=command_lines("runs/a", "street", "val"),
    )
    publish_report(dataset.root / "report.html", content, predictor, dataset)
    for path in (dataset.root / "report.html", dataset.root / "report.md"):
        text = path.read_text("utf-8")
        assert "1 of these images is a near-duplicate of a training image" in text
        assert "useg evaluate runs/a street --split val" in text
        assert "official" in text
    assert len(thumbnails) == 3


def test_duplicates_are_counted_only_for_held_out_images_and_if_it_is_quick(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = evaluate_dataset(make_trained_predictor(dataset), dataset)
    vectors = normalize_signatures(compute_signatures(dataset, dataset.pairs))
    assert NEAR_DUPLICATE_CORRELATION < vectors[1] @ vectors[4] < MIN_REPORTED_CORRELATION
    assert report._count_duplicates(evaluation, dataset) == 1
    assert report._count_duplicates(replace(evaluation, split="all"), dataset) is None
    monkeypatch.setattr(report, "is_quick_to_compare", lambda pairs: False)
    assert report._count_duplicates(evaluation, dataset) is None


def test_duplicates_do_not_matter_to_a_model_trained_elsewhere(dataset: Dataset) -> None:
    predictor = make_predictor(make_model())
    content = Report("T", evaluate_dataset(predictor, dataset), predictor.classes)
    publish_report(dataset.root / "report.html", content, predictor, dataset)
    assert "near-duplicate" not in (dataset.root / "report.md").read_text()


def test_gallery_shows_masked_pixels_as_ignored(dataset: Dataset, tmp_path: Path) -> None:
    ignored = np.zeros((24, 32), np.uint8)
    ignored[:12] = 255
    Image.fromarray(ignored).save(tmp_path / "hood.png")
    extras = Extras(ignore_mask=tmp_path / "hood.png")
    predictor, labels = make_trained_predictor(dataset), []
    evaluation = evaluate_dataset(
        predictor,
        dataset,
        extras=extras,
        on_prediction=lambda sample, prediction: labels.append(sample.label),
    )
    settings = CountSettings.from_extras(extras, predictor.classes)
    gallery = read_gallery(choose_gallery(evaluation), evaluation, predictor, dataset, settings)
    assert len(gallery) == 3
    for label in (*labels, *(image.label for image in gallery)):
        assert (label[:12] == IGNORE).all()
        assert (label[12:] != IGNORE).all()


def test_missing_folder_of_the_page_is_found_before_the_evaluation(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **more: object) -> None:
        pytest.fail("the evaluation has started")

    monkeypatch.setattr(report, "evaluate_dataset", fail)
    monkeypatch.setattr(report, "open_evaluation_data", lambda *args, **options: dataset)
    path = dataset.root / "nowhere/report.html"
    with pytest.raises(useg.UsageError, match="does not exist"):
        useg.evaluate(make_trained_predictor(dataset), dataset.root, html=path)


def test_command_lines_quote_spaces() -> None:
    lines = [command.text for command in command_lines("my runs/a", "data", "val")]
    assert lines[0] == "useg evaluate 'my runs/a' data --split val --html report.html"
    assert lines[1].startswith("useg predict 'my runs/a' ")
