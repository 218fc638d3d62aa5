"""From a data set to the two files on disk: twins across the split are found, the ignore mask is seen, the folder is checked first."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_inference import make_model, make_predictor
from PIL import Image

import useg
from useg.classes import IGNORE, ClassTable
from useg.data.dataset import Dataset, Pair
from useg.inference.predictor import Predictor
from useg.reporting import report
from useg.reporting.evaluate import CountSettings, Extras, evaluate_dataset
from useg.reporting.html import choose_gallery, collect_thumbnails, read_gallery
from useg.reporting.report import command_lines, publish_report
from useg.reporting.text import Report


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Six pictures; the first of the held-out ones is a copy of the first that is trained on."""
    rng = np.random.default_rng(0)
    pairs = []
    for k in range(6):
        pair = Pair(
            tmp_path / f"{'abcdef'[k]}.png", tmp_path / f"{k}_mask.png", "train" if k < 3 else "val"
        )
        picture = (
            rng.integers(0, 256, (24, 32, 3), np.uint8)
            if k != 3
            else np.asarray(Image.open(pairs[0].image))
        )
        Image.fromarray(picture).save(pair.image)
        Image.fromarray(rng.integers(0, 3, (24, 32), np.uint8)).save(pair.mask)
        pairs.append(pair)
    return Dataset(
        tmp_path, "folders", tuple(pairs), ClassTable(("a", "b", "c", "d")), splits_by="official"
    )


def trained_on(dataset: Dataset) -> Predictor:
    predictor = make_predictor(make_model())
    card = replace(
        predictor.runtime.description, provenance={"dataset": dataset.root.name, "num_train": 3}
    )
    return Predictor(replace(predictor.runtime, description=card))


def test_a_report_is_a_page_and_markdown_that_name_leaks(dataset: Dataset) -> None:
    predictor, thumbnails = trained_on(dataset), []
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


def test_twins_are_looked_for_only_where_the_model_was_trained_and_time_allows(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = evaluate_dataset(trained_on(dataset), dataset)
    assert report._count_duplicates(evaluation, dataset) == 1
    assert report._count_duplicates(replace(evaluation, split="all"), dataset) is None
    monkeypatch.setattr(report, "is_quick_to_compare", lambda pairs: False)
    assert report._count_duplicates(evaluation, dataset) is None
    other = make_predictor(make_model())
    content = Report("T", evaluation, other.classes)
    publish_report(dataset.root / "report.html", content, other, dataset)
    assert "near-duplicate" not in (dataset.root / "report.md").read_text()


def test_what_the_ignore_mask_leaves_out_is_shown_as_not_judged(
    dataset: Dataset, tmp_path: Path
) -> None:
    Image.fromarray(np.repeat(np.uint8([[255], [0]]), 12, 0) * np.ones((1, 32), np.uint8)).save(
        tmp_path / "hood.png"
    )
    predictor, extras, seen = trained_on(dataset), Extras(ignore_mask=tmp_path / "hood.png"), []
    evaluation = evaluate_dataset(
        predictor,
        dataset,
        extras=extras,
        on_prediction=lambda sample, prediction: seen.append(sample.label),
    )
    cases = read_gallery(
        choose_gallery(evaluation),
        evaluation,
        predictor,
        dataset,
        CountSettings.from_extras(extras, predictor.classes),
    )
    assert len(cases) == 3
    for label in (*seen, *(case.label for case in cases)):
        assert (label[:12] == IGNORE).all()
        assert (label[12:] != IGNORE).all()


def test_a_folder_that_is_not_there_is_told_before_the_work(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "useg.reporting.report.evaluate_dataset", lambda *args, **more: pytest.fail("it has begun")
    )
    monkeypatch.setattr("useg.reporting.report.open_evaluation_data", lambda *args, **more: dataset)
    with pytest.raises(useg.UsageError, match="does not exist"):
        useg.evaluate(trained_on(dataset), dataset.root, html=dataset.root / "nowhere/report.html")
