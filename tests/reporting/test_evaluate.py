"""Scores are those of the native pixels, in any order, tiling or grouping."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_inference import make_model, make_predictor
from PIL import Image

from useg.classes import IGNORE, ClassTable
from useg.data.dataset import Dataset, Pair, read_sample
from useg.errors import UsageError
from useg.images.image_files import Sample
from useg.models.geometry import WorkingSize
from useg.reporting import evaluate
from useg.reporting.evaluate import (
    MAX_BOOTSTRAP_BLOCK_IMAGES,
    CountSettings,
    Extras,
    count_image,
    evaluate_dataset,
    find_blocks,
)
from useg.reporting.evaluation_result import Evaluation, compare_evaluations
from useg.reporting.text import comparison_lines, evaluation_lines
from useg.scoring.boundaries import boundary_counts
from useg.scoring.metrics import plain, score
from useg.scoring.uncertainty import score_intervals

CLASSES = ClassTable(("a", "b", "c", "d"))


def write_pairs(folder: Path, splits: list[str], sizes: list[tuple[int, int]]) -> tuple[Pair, ...]:
    """Write random images with masks of four classes, (height, width) each; names are letters."""
    rng = np.random.default_rng(0)
    pairs = []
    for name, split, size in zip("abcdefghijkl", splits, sizes, strict=False):
        pairs.append(Pair(folder / f"{name}.png", folder / f"{name}_mask.png", split))
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(pairs[-1].image)
        Image.fromarray(rng.integers(0, 4, size, np.uint8)).save(pairs[-1].mask)
    return tuple(pairs)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Three held-out and two training images of different sizes, without the class d."""
    splits = ["val"] * 3 + ["train"] * 2
    pairs = write_pairs(tmp_path, splits, [(20 + k, 30) for k in range(5)])
    for pair in pairs:
        write_mask(pair.mask, np.minimum(np.asarray(Image.open(pair.mask)), 2))
    return Dataset(tmp_path, "folders", pairs, CLASSES)


@pytest.fixture
def shuffled(tmp_path: Path) -> Dataset:
    """Twelve independent images of one size, all held out."""
    folder = tmp_path / "many"
    folder.mkdir()
    pairs = write_pairs(folder, ["val"] * 12, [(24, 32)] * 12)
    return Dataset(folder, "folders", pairs, CLASSES)


def write_mask(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


def test_scores_equal_those_of_pixels_counted_by_hand(dataset: Dataset) -> None:
    predictor = make_predictor(make_model(working=WorkingSize(scale=0.5)))
    calls = []
    evaluation = evaluate_dataset(
        predictor, dataset, "val", progress=lambda done, total: calls.append((done, total))
    )
    samples = [read_sample(pair, dataset) for pair in dataset.of("val")]
    truth = np.concatenate([sample.label.ravel() for sample in samples])
    predicted = np.concatenate([predictor(sample.image).ravel() for sample in samples])
    ious = [
        ((truth == k) & (predicted == k)).sum() / ((truth == k) | (predicted == k)).sum()
        for k in range(3)
    ]
    assert evaluation.scores.mean_iou == pytest.approx(np.mean(ious))
    assert evaluation.scores.pixel_accuracy == pytest.approx((truth == predicted).mean())
    assert evaluation.scores.absent == ("d",)
    # These are native pixels, although the model works at half the size.
    assert evaluation.counts.sum() == truth.size
    assert (evaluation.scores.num_images, len(evaluation.images), calls[-1]) == (3, 3, (3, 3))
    edges = sum(boundary_counts(predictor(sample.image), sample.label, 4) for sample in samples)
    assert evaluation.boundaries
    assert evaluation.boundaries.mean_boundary_iou == pytest.approx(
        np.nanmean([edges[0, k] / (edges[1, k] + edges[2, k] - edges[0, k]) for k in range(3)])
    )
    confidence = np.concatenate(
        [predictor.probabilities(sample.image).max(0).ravel() for sample in samples]
    )
    assert evaluation.calibration
    assert evaluation.calibration.confidence == pytest.approx(float(confidence.mean()), rel=1e-5)


def test_scores_of_an_image_equal_those_of_the_image_alone(dataset: Dataset) -> None:
    evaluation = evaluate_dataset(make_predictor(make_model()), dataset, "val")
    assert (evaluation.tallies.sum(0)[1] == evaluation.counts.sum(1)).all()
    alone = evaluate_dataset(
        make_predictor(make_model()), replace(dataset, pairs=dataset.pairs[1:2]), "val"
    )
    assert (alone.images[0].tally == evaluation.images[1].tally).all()
    assert alone.scores.mean_iou == evaluation.images[1].mean_iou
    assert alone.scores.pixel_accuracy == evaluation.images[1].pixel_accuracy
    assert alone.intervals
    assert alone.intervals.note.startswith("no interval: 1 image")


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_tiles_threads_order_and_grouping_change_no_score(dataset: Dataset, padding: str) -> None:
    predictor = make_predictor(make_model(padding, working=WorkingSize(scale=3.0)))
    whole = evaluate_dataset(predictor, dataset, "all", extras=Extras(tile=0))
    tiled = evaluate_dataset(predictor, dataset, "all", extras=Extras(tile=48))
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        threads = evaluate_dataset(predictor, dataset, "all")
    finally:
        torch.set_num_threads(before)
    backwards = evaluate_dataset(predictor, replace(dataset, pairs=dataset.pairs[::-1]), "all")
    for other in (tiled, threads, backwards):
        assert (other.counts == whole.counts).all()
        assert other.scores.as_dict() == whole.scores.as_dict()
        assert plain(asdict(other.boundaries)) == plain(asdict(whole.boundaries))
        assert other.calibration
        assert whole.calibration
        assert other.calibration.error == pytest.approx(whole.calibration.error, abs=1e-5)
    parts = [
        evaluate_dataset(predictor, replace(dataset, pairs=part), "all")
        for part in (dataset.pairs[:2], dataset.pairs[2:])
    ]
    assert (
        score(parts[0].counts + parts[1].counts, predictor.classes.names, 5).as_dict()
        == whole.scores.as_dict()
    )


def test_labels_of_the_working_size_are_refused() -> None:
    model = make_model(working=WorkingSize((16, 12)))
    image = np.zeros((24, 32, 3), np.uint8)
    reduced = Sample(image, np.zeros((12, 16), np.uint8))
    with pytest.raises(UsageError, match="enlarge the logits to the label's size"):
        count_image(
            make_predictor(model), reduced, CountSettings.from_extras(Extras(), model.classes)
        )


def test_split_all_contains_every_pair(dataset: Dataset) -> None:
    assert evaluate_dataset(make_predictor(make_model()), dataset, "all").scores.num_images == 5


def test_empty_split_and_other_classes_are_refused(dataset: Dataset) -> None:
    predictor = make_predictor(make_model())
    with pytest.raises(
        UsageError,
        match=r"no pair in the split 'test'; it has train: 2, val: 3; choose one of these",
    ):
        evaluate_dataset(predictor, dataset, "test")
    other = Dataset(dataset.root, dataset.layout, dataset.pairs, ClassTable(("x", "y", "z")))
    with pytest.raises(
        UsageError, match=r"the model has 4 classes \(a, b, c, d\), but .* has 3 \(x, y, z\)"
    ):
        evaluate_dataset(predictor, other)


@pytest.mark.parametrize("size", [(24, 32), (48, 64), (12, 16), (241, 320)])
def test_pixels_under_the_ignore_mask_do_not_count(
    shuffled: Dataset, tmp_path: Path, size: tuple[int, int]
) -> None:
    predictor = make_predictor(make_model())
    region = np.zeros(size)
    region[: size[0] // 2] = 7
    half = evaluate_dataset(
        predictor, shuffled, extras=Extras(ignore_mask=write_mask(tmp_path / "hood.png", region))
    )
    samples = [read_sample(pair, shuffled) for pair in shuffled.pairs]
    right = sum((predictor(sample.image)[12:] == sample.label[12:]).sum() for sample in samples)
    assert half.counts.sum() == 12 * 12 * 32
    assert half.scores.pixel_accuracy == right / (12 * 12 * 32)
    assert half.boundaries
    assert half.boundaries != evaluate_dataset(predictor, shuffled).boundaries


def test_ignore_mask_may_have_colours(shuffled: Dataset, tmp_path: Path) -> None:
    region = np.zeros((24, 32, 3))
    region[:6, :, 2] = 200
    found = evaluate_dataset(
        make_predictor(make_model()),
        shuffled,
        extras=Extras(ignore_mask=write_mask(tmp_path / "hood.png", region)),
    )
    assert found.counts.sum() == 12 * 18 * 32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            np.zeros((32, 24)),
            r"the ignore mask has 24x32 pixels, but '.*a_mask.png' has 32x24; give an ignore mask "
            r"of the same size or the same aspect ratio",
        ),
        (np.zeros((48, 66)), r"the ignore mask has 66x48 pixels"),
        (
            np.ones((24, 32)),
            r"the ignore mask '.*hood.png' ignores every pixel, because all its values differ "
            r"from 0; set the pixels that count to 0",
        ),
    ],
)
def test_ignore_mask_that_does_not_fit_is_refused(
    shuffled: Dataset, tmp_path: Path, values: np.ndarray, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate_dataset(
            make_predictor(make_model()),
            shuffled,
            extras=Extras(ignore_mask=write_mask(tmp_path / "hood.png", values)),
        )


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        (Extras(objects="cells"), "the class 'cells' is not known; choose one of a, b, c, d"),
        (Extras(membranes="e"), "the class 'e' is not known"),
        (
            Extras(tolerance=-1),
            "the boundary tolerance is -1 pixels, but it cannot be negative; 0 requires",
        ),
    ],
)
def test_impossible_extras_are_refused(dataset: Dataset, extras: Extras, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate_dataset(make_predictor(make_model()), dataset, extras=extras)


def test_image_without_a_labelled_pixel_changes_no_score(shuffled: Dataset) -> None:
    predictor = make_predictor(make_model())
    ignoring = replace(shuffled, classes=replace(shuffled.classes, ignore=(9,)))
    write_mask(shuffled.pairs[3].mask, np.full((24, 32), 9))
    all_but_one = evaluate_dataset(
        predictor,
        replace(ignoring, pairs=tuple(pair for k, pair in enumerate(shuffled.pairs) if k != 3)),
    )
    found = evaluate_dataset(predictor, ignoring)
    assert (found.counts == all_but_one.counts).all()
    assert math.isnan(found.images[3].mean_iou)
    assert found.intervals
    assert all_but_one.intervals
    assert found.intervals.mean_iou == all_but_one.intervals.mean_iou
    only = evaluate_dataset(predictor, replace(ignoring, pairs=shuffled.pairs[3:4]))
    assert json.dumps(only.as_dict(), allow_nan=False)
    assert "mean IoU -, mean Dice -, over 0 classes" in "\n".join(evaluation_lines(only))


def test_objects_and_membranes_are_counted_on_request(shuffled: Dataset) -> None:
    predictor = make_predictor(make_model())
    bare = evaluate_dataset(predictor, shuffled)
    assert (bare.objects, bare.membranes) == (None, None)
    found = evaluate_dataset(predictor, shuffled, extras=Extras(objects="b", membranes="a"))
    assert found.objects
    assert found.membranes
    assert found.objects.num_true > 100
    assert all(
        0 < error < 1
        for error in (
            found.membranes.warping_error,
            found.membranes.rand_error,
            found.membranes.pixel_error,
        )
    )
    content = found.as_dict()
    assert content["objects"]["num_true"] == found.objects.num_true
    assert content["membranes"]["thresholds"] == list(found.membranes.thresholds)
    assert "objects" not in bare.as_dict()
    lines = "\n".join(evaluation_lines(found))
    assert f"of {found.objects.num_true} true objects matched" in lines
    assert f"warping error {found.membranes.warping_error:.6f}" in lines


def test_json_keeps_its_keys_and_has_no_nan(dataset: Dataset) -> None:
    content = evaluate_dataset(make_predictor(make_model()), dataset, "val").as_dict()
    json.dumps(content, allow_nan=False)
    assert {
        "mean_iou",
        "pixel_accuracy",
        "mean_dice",
        "num_images",
        "classes",
        "absent",
    } <= content.keys()
    assert {"id", "name", "iou", "dice", "precision", "recall", "pixels"} <= content["classes"][
        0
    ].keys()
    assert {
        "frequency_weighted_iou",
        "micro_iou",
        "intervals",
        "calibration",
        "mean_boundary_iou",
        "mean_boundary_f",
    } <= content.keys()
    assert content["classes"][3]["boundary_iou"] is None
    assert content["intervals"]["num_blocks"] == 3


def test_independent_images_are_blocks_of_their_own(shuffled: Dataset) -> None:
    predictor = make_predictor(make_model())
    found = evaluate_dataset(predictor, shuffled)
    assert found.blocks == tuple(range(12))
    assert found.intervals == score_intervals(found.tallies, range(12))
    assert found.intervals
    assert found.intervals.mean_iou
    assert found.intervals.mean_iou.low < found.scores.mean_iou < found.intervals.mean_iou.high


def video_pairs(*names: str) -> tuple[Pair, ...]:
    return tuple(Pair(Path(f"{name}.png"), Path(f"m/{name}.png"), "val") for name in names)


def test_blocks_follow_sequences_and_have_at_most_ten_images() -> None:
    names = [f"A_{k}" for k in range(25)] + [f"B_{k}" for k in range(4)]
    table = ClassTable(("a", "b"))
    pairs = video_pairs(*names[::-1])
    blocks = dict(
        zip(
            (pair.image.stem for pair in pairs),
            find_blocks(pairs, Dataset(Path(), "folders", pairs, table)),
            strict=True,
        )
    )
    sizes = [
        sum(value == number for value in blocks.values()) for number in sorted(set(blocks.values()))
    ]
    assert sizes == [9, 8, 8, 4]
    assert max(sizes) <= MAX_BOOTSTRAP_BLOCK_IMAGES
    assert blocks["A_0"] == blocks["A_8"] != blocks["A_9"]
    assert len({blocks[f"B_{k}"] for k in range(4)}) == 1
    split_at_random = Dataset(
        Path(), "folders", pairs, table, splits_by="random, by a hash of the name"
    )
    assert find_blocks(pairs, split_at_random) == list(range(29))
    loose = video_pairs("cat", "dog", "cow")
    assert find_blocks(loose, Dataset(Path(), "folders", loose, table)) == [0, 1, 2]


def test_two_models_are_compared_on_the_same_images(shuffled: Dataset) -> None:
    def scored(seed: int) -> Evaluation:
        model = make_model()
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        return evaluate_dataset(make_predictor(model), shuffled)

    first, second = scored(1), scored(2)
    comparison = compare_evaluations(first, second)
    assert comparison.difference.mean_iou == pytest.approx(
        first.scores.mean_iou - second.scores.mean_iou
    )
    content = comparison.as_dict()
    json.dumps(content, allow_nan=False)
    assert content["mean_iou"] == first.scores.mean_iou
    assert content["comparison"]["scores_against"]["mean_iou"] == second.scores.mean_iou
    assert content["comparison"]["probability_better"] == comparison.difference.probability_better
    lines = comparison_lines(comparison)
    assert lines[0].split("  ")[0] == "class"
    assert any(
        line.startswith("mean IoU")
        and f"{100 * comparison.difference.mean_iou:+.1f} points" in line
        for line in lines
    )
    fewer = evaluate_dataset(
        make_predictor(make_model()), replace(shuffled, pairs=shuffled.pairs[:4])
    )
    with pytest.raises(
        UsageError,
        match="were scored on different images; evaluate both on the same data set and split",
    ):
        compare_evaluations(first, fewer)


def test_table_omits_absent_classes_and_a_line_names_them(dataset: Dataset) -> None:
    lines = evaluation_lines(evaluate_dataset(make_predictor(make_model()), dataset, "val"))
    assert [line.split()[0] for line in lines[:4]] == ["class", "a", "b", "c"]
    assert "not in the ground truth, so not scored and not part of any mean: d" in lines
    assert lines[-1].startswith("no interval: 3 images")


def test_ignored_pixels_are_in_no_object(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = {}
    monkeypatch.setattr(
        evaluate,
        "count_components",
        lambda prediction, truth: (
            masks.update(prediction=prediction, truth=truth) or np.zeros(5, np.int64)
        ),
    )
    model, image = make_model(), np.zeros((8, 8, 3), np.uint8)
    called = int(make_predictor(model)(image)[0, 0])
    label = np.full((8, 8), called, np.uint8)
    label[:4] = IGNORE
    count_image(
        make_predictor(model),
        Sample(image, label),
        CountSettings.from_extras(Extras(objects=model.classes.names[called]), model.classes),
    )
    assert not masks["prediction"][:4].any()
    assert not masks["truth"][:4].any()
    assert masks["truth"][4:].all()


def test_tile_size_reaches_the_predictor(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, asked = make_predictor(make_model()), []
    logits = predictor.logits
    monkeypatch.setattr(
        predictor, "logits", lambda image, tile: asked.append(tile) or logits(image, tile)
    )
    evaluate_dataset(predictor, dataset, extras=Extras(tile=48))
    evaluate_dataset(predictor, dataset)
    assert asked == [48, 48, 48, None, None, None]
