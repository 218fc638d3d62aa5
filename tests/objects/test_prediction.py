"""Objects of a model: in memory, in files, in ensembles, and without an output for them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from made_inference import make_model, make_predictor, random_image, textured_image
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from useg.classes import ClassTable
from useg.data.annotations.shapes import RunLengths, decode_rle, decompress_rle
from useg.images.image_files import read_mask, resize_image
from useg.inference.outputs import OutputOptions
from useg.inference.predict_files import NOT_KEPT_APART, predict
from useg.inference.predictor import AugmentedView, Predictor, load, resize_logits
from useg.inference.runtimes import runtime_of_model
from useg.models.geometry import WorkingSize
from useg.models.segmenter import Segmenter, load_model, save_model
from useg.objects import separation, table
from useg.objects.separation import separate, typical_side
from useg.objects.table import ObjectMeter, PixelOutputs, find_objects, write_object_map
from useg.ownership import OBJECTS_HEADER

CLASSES = ClassTable(("background", "cell", "=grain"), objects=(1, 2))


def object_model(seed: int = 0, width: int = 3) -> Segmenter:
    """An untrained model with an output for objects, whose label maps are not of one class."""
    torch.manual_seed(seed)
    settings = {"encoder": "plain", "channels": 3, "classes": 3, "width": width, "depth": 2}
    settings |= {"padding": "same", "normalize": False, "objects": True}
    model = Segmenter(settings, CLASSES, [100.0] * 3, [50.0] * 3).eval()
    with torch.no_grad():
        model.network.head.weight *= 30
    return model


def table_by_hand(numbers: NDArray, label: NDArray, confidence: NDArray) -> list[tuple]:
    """Measure each object with a mask of its own."""
    rows = []
    for number in range(1, int(numbers.max()) + 1):
        y, x = np.nonzero(numbers == number)
        height, width = numbers.shape
        at_edge = y.min() == 0 or x.min() == 0 or y.max() == height - 1 or x.max() == width - 1
        rows.append(
            (
                int(np.bincount(label[y, x]).argmax()),
                len(y),
                (x.mean(), y.mean()),
                (x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1),
                confidence[y, x].mean(),
                at_edge,
            )
        )
    return rows


def test_the_table_is_that_of_a_loop_over_the_objects() -> None:
    rng = np.random.default_rng(0)
    numbers = ndimage.label(ndimage.gaussian_filter(rng.random((40, 50)), 1.5) > 0.5)[0]
    numbers = numbers.astype(np.uint32)
    label = rng.integers(0, 4, numbers.shape).astype(np.uint8)
    confidence = rng.random(numbers.shape).astype(np.float32)
    meter = ObjectMeter(int(numbers.max()), 4, numbers.shape)
    for rows in (slice(0, 17), slice(17, 40)):
        for columns in (slice(0, 23), slice(23, 50)):
            place = rows, columns
            meter.add(numbers[place], label[place], confidence[place], place)
    table = meter.measure()
    expected = table_by_hand(numbers, label, confidence)
    assert len(table) == len(expected)
    measured = (table.class_ids, table.areas, table.centres, table.boxes, table.confidences)
    for found, wanted in zip((*measured, table.at_edge), zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(found, np.array(wanted), rtol=1e-6)


def count_uncertain_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all objects of an untrained model count, however uncertain they are."""
    monkeypatch.setattr(separation, "MIN_UNCERTAINTY", 1.0)


def test_label_maps_of_a_model_with_objects_are_those_of_its_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count_uncertain_objects(monkeypatch)
    model, image = object_model(), textured_image(48, 64)
    predictor = make_predictor(model)
    x = torch.from_numpy(image.transpose(2, 0, 1)[None].copy())
    with torch.inference_mode():
        expected = model(x)[0]
    assert len(expected) == 4
    assert predictor.logits(image).shape == (3, 48, 64)
    np.testing.assert_array_equal(predictor(image), expected[:3].argmax(0).numpy())
    outputs = predictor.pixel_outputs(image)
    np.testing.assert_allclose(outputs.depth, expected[3].numpy(), atol=1e-5)
    found = predictor.objects(image)
    assert found.kept_apart
    np.testing.assert_array_equal(found.numbers > 0, predictor(image) > 0)
    np.testing.assert_array_equal(found.numbers, find_objects(outputs, (1, 2)).numbers)


@pytest.mark.parametrize("tile", [48, 64])
def test_objects_by_tiles_are_those_of_one_pass(tile: int) -> None:
    predictor, image = make_predictor(object_model()), textured_image(150, 130)
    whole, tiled = predictor.objects(image, 0), predictor.objects(image, tile)
    np.testing.assert_array_equal(whole.numbers, tiled.numbers)
    assert len(whole) == len(tiled)


def test_ensembles_and_augmentation_have_objects() -> None:
    runtimes = [make_predictor(object_model(seed)).runtime for seed in (0, 1)]
    image = textured_image(48, 64)
    both = Predictor(*runtimes, augment="flips")
    depth = both.pixel_outputs(image).depth
    assert depth is not None
    flipped = both.pixel_outputs(image[:, ::-1]).depth
    np.testing.assert_allclose(depth, flipped[:, ::-1], atol=1e-4)
    assert both.objects(image).kept_apart
    mixed = Predictor(runtimes[0], runtime_of_model(plain_model(), Path("memory")))
    assert not mixed.objects(image).kept_apart


def test_ensembles_compute_classes_and_depth_in_one_pass() -> None:
    runtime, sizes = make_predictor(object_model()).runtime, []

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        sizes.append(len(x))
        return runtime.run(x)

    both = Predictor(replace(runtime, run=run), runtime)
    image = textured_image(48, 64)
    logits = both.pixel_outputs(image).logits
    assert sizes == [1]
    np.testing.assert_array_equal(logits, both.logits(image))


def plain_model() -> Segmenter:
    model = object_model()
    settings = {key: value for key, value in model.settings.items() if key != "objects"}
    torch.manual_seed(0)
    plain = Segmenter(settings, ClassTable(CLASSES.names), [100.0] * 3, [50.0] * 3).eval()
    with torch.no_grad():
        plain.network.head.weight *= 30
    return plain


def test_a_model_without_objects_gives_the_connected_regions_of_its_classes(tmp_path: Path) -> None:
    predictor, image = make_predictor(plain_model()), textured_image(48, 64)
    found, label = predictor.objects(image), predictor(image)
    assert not found.kept_apart
    expected = sum(ndimage.label(label == k)[1] for k in (1, 2))
    assert len(found) == expected
    Image.fromarray(image).save(tmp_path / "a.png")
    sources = [str(tmp_path / "a.png")]
    outcome = predict(predictor, sources, tmp_path / "out", wanted=OutputOptions(objects=True))
    assert outcome.notes == (NOT_KEPT_APART,)


def test_a_model_file_keeps_the_objects(tmp_path: Path) -> None:
    save_model(object_model(), tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    assert model.settings["objects"]
    assert model.classes.objects == (1, 2)
    image = textured_image(48, 64)
    again = load(tmp_path).objects(image)
    np.testing.assert_array_equal(
        again.numbers, make_predictor(object_model()).objects(image).numbers
    )


def test_files_of_models_without_objects_do_not_mention_them(tmp_path: Path) -> None:
    save_model(make_model(), tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    assert b"objects" not in content
    assert b'\\"format\\": 1' in content


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text("utf-8").splitlines()))


def predict_two(folder: Path, wanted: OutputOptions) -> Predictor:
    (folder / "images").mkdir()
    for name, size in (("a", (40, 56)), ("b", (64, 48))):
        Image.fromarray(textured_image(*size)).save(folder / "images" / f"{name}.png")
    predictor = make_predictor(object_model())
    predict(predictor, [str(folder / "images")], folder / "out", wanted=wanted)
    return predictor


def test_objects_are_written_as_maps_tables_polygons_and_counts(tmp_path: Path) -> None:
    wanted = OutputOptions(objects=True, polygons=True, coco=True, areas=True)
    predictor, out = predict_two(tmp_path, wanted), tmp_path / "out"
    rows = read_csv(out / "objects.csv")
    areas = read_csv(out / "areas.csv")
    coco = json.loads((out / "coco.json").read_text())
    for number, stem in enumerate(("a", "b"), 1):
        image = np.asarray(Image.open(tmp_path / "images" / f"{stem}.png"))
        found = predictor.objects(image)
        written = tifffile.imread(out / "objects" / f"{stem}.tif")
        assert written.dtype == np.uint16
        np.testing.assert_array_equal(written, found.numbers)
        own = [row for row in rows if row["image"] == f"{stem}.png"]
        assert [int(row["pixels"]) for row in own] == found.table.areas.tolist()
        assert [int(row["id"]) for row in own] == list(range(1, len(found) + 1))
        counted = {row["class"]: row["objects"] for row in areas if row["image"] == f"{stem}.png"}
        assert sum(map(int, counted.values())) == len(found)
        assert counted["background"] == "0"
        annotations = [each for each in coco["annotations"] if each["image_id"] == number]
        assert len(annotations) == len(found)
        for k, annotation in enumerate(annotations):
            lengths = np.array(decompress_rle(annotation["segmentation"]["counts"]), np.uint32)
            height, width = annotation["segmentation"]["size"]
            mask = decode_rle(RunLengths(lengths.tobytes(), width, height, by_columns=True))
            np.testing.assert_array_equal(mask, found.numbers == k + 1)
            assert annotation["category_id"] == found.table.class_ids[k]
            assert annotation["bbox"] == found.table.boxes[k].tolist()
        features = json.loads((out / "polygons" / f"{stem}.geojson").read_text())["features"]
        assert {each["properties"]["object"] for each in features} == set(range(1, len(found) + 1))
        pixels = sum(each["properties"]["pixels"] for each in features)
        assert pixels == found.table.areas.sum()
    # A name that a spreadsheet would compute is made harmless.
    assert {row["class"] for row in rows} <= {"cell", "'=grain"}
    assert tuple(rows[0]) == OBJECTS_HEADER


def test_a_job_that_is_repeated_keeps_objects_and_joins_all_tables(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    save_model(object_model(), tmp_path / "run" / "model.safetensors")
    (tmp_path / "images").mkdir()
    Image.fromarray(textured_image(40, 56)).save(tmp_path / "images" / "a.png")
    predictor, wanted = load(tmp_path / "run"), OutputOptions(objects=True)

    def run() -> tuple[int, str]:
        outcome = predict(predictor, [str(tmp_path / "images")], tmp_path / "out", wanted=wanted)
        return outcome.kept, (tmp_path / "out" / "objects.csv").read_text()

    kept, first = run()
    assert (kept, run()) == (0, (1, first))
    Image.fromarray(textured_image(48, 48)).save(tmp_path / "images" / "b.png")
    kept, both = run()
    assert kept == 1
    assert both.startswith(first)
    assert "\nb.png," in both


def test_small_regions_that_are_merged_are_no_objects(tmp_path: Path) -> None:
    predict_two(tmp_path, OutputOptions(objects=True, min_region=30))
    label = read_mask(tmp_path / "out" / "a.png")
    numbers = tifffile.imread(tmp_path / "out" / "objects" / "a.tif")
    np.testing.assert_array_equal(numbers > 0, label > 0)


def test_specks_are_no_objects_in_memory_in_files_and_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from useg.inference import large_images

    count_uncertain_objects(monkeypatch)
    model, image = object_model(), textured_image(96, 130)
    every = make_predictor(model).objects(image).table.areas
    least = int(np.percentile(every, 90))
    model.provenance["min_object_pixels"] = least
    save_model(model, tmp_path / "model.safetensors")
    predictor = load(tmp_path / "model.safetensors")
    found = predictor.objects(image)
    assert sorted(found.table.areas) == sorted(every[every >= least])
    assert len(found) < len(every)
    # The label map keeps them.
    np.testing.assert_array_equal(predictor(image), make_predictor(object_model())(image))
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(64, 64), photometric="rgb")
    wanted = OutputOptions(objects=True)
    for largest, out in ((10**9, tmp_path / "memory"), (1000, tmp_path / "scan")):
        monkeypatch.setattr(large_images, "MAX_IN_MEMORY_PIXELS", largest)
        predict(predictor, [str(tmp_path / "a.tif")], out, wanted=wanted)
        written = tifffile.imread(out / "objects" / "a.tif")
        np.testing.assert_array_equal(written, found.numbers)


def scaled_predictor(factor: float, folder: Path, least: int = 0) -> Predictor:
    """A model that was trained on objects so many times as large as those that it finds."""
    model = object_model()
    model.provenance |= {"min_object_pixels": least, "specks_grow": True}
    areas = make_predictor(model).objects(textured_image(96, 130)).table.areas
    model.provenance["object_side"] = factor * typical_side(areas)
    model.provenance["largest_object_side"] = 1.2 * model.provenance["object_side"]
    model.provenance["enlarged_biases"] = [0.0, *[-0.3] * (len(model.classes) - 1)]
    save_model(model, folder / "model.safetensors")
    return load(folder / "model.safetensors")


@pytest.mark.parametrize(("factor", "expected"), [(1.05, 1.0), (1.4, 2**0.5), (0.5, 0.5), (9, 2)])
def test_outputs_are_those_at_the_scale_at_which_objects_are_as_large_as_in_training(
    factor: float, expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "MAX_PASSES", 2)
    predictor, image = scaled_predictor(factor, tmp_path), textured_image(96, 130)
    plain = make_predictor(object_model())
    outputs = predictor.pixel_outputs(image)
    view = AugmentedView(expected)
    scaled = resize_image(image, view.size(130, 96))
    at_scale = plain.pixel_outputs(scaled)
    assert at_scale.depth is not None
    assert outputs.depth is not None
    both = np.concatenate([at_scale.logits, at_scale.depth[None]])
    wanted = resize_logits(torch.from_numpy(both)[None], 96, 130)[0].numpy()
    # Classes are those of both scales, unless the other one is far.
    is_near = 0.5 < expected < 2
    logits = (plain.logits(image) + wanted[:-1]) / 2 if is_near else wanted[:-1]
    # Rarer classes lose a part of their weight in enlarged images.
    logits[1:] -= 0.3 if expected > 1 else 0.0
    np.testing.assert_allclose(outputs.logits, logits, atol=1e-4)
    np.testing.assert_allclose(outputs.depth, wanted[-1], atol=1e-4)
    # Without objects, nothing depends on their size.
    np.testing.assert_array_equal(predictor(image), plain(image))


@pytest.mark.parametrize(
    ("chosen", "computed"),
    [
        ([1.0], []),
        ([0.5, 0.5], [0.5]),
        ([0.5, 0.7, 0.5], [0.5, 0.7]),
        ([0.5, 1.0], [0.5]),
        ([0.7, 0.5, 0.4], [0.7, 0.5, 0.4]),
    ],
)
def test_no_scale_is_computed_twice(chosen: list[float], computed: list[float]) -> None:
    answers = iter(chosen)
    assert list(table.better_scales(lambda: next(answers))) == computed


def test_objects_of_the_usual_size_are_numbered_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, image = scaled_predictor(1.0, tmp_path), textured_image(96, 130)
    counts = []

    def counted(*arguments: Any, **options: Any) -> int:
        counts.append(1)
        return separate(*arguments, **options)

    monkeypatch.setattr(table, "separate", counted)
    found = predictor.objects(image)
    assert len(counts) == 1
    outputs = predictor.pixel_outputs(image)
    anew = find_objects(replace(outputs, regions=None), predictor.object_classes)
    np.testing.assert_array_equal(found.numbers, anew.numbers)
    # Other classes, or a label map that was cleaned, have other objects.
    assert set(find_objects(outputs, (1,)).table.class_ids.tolist()) == {1}
    label = outputs.logits.argmax(0).astype(np.uint8)
    cleaned = np.where(label == 1, np.uint8(0), label)
    of_cleaned = find_objects(outputs, predictor.object_classes, label=cleaned)
    assert set(of_cleaned.table.class_ids.tolist()) == {2}


def test_models_of_whole_scenes_keep_their_scale(tmp_path: Path) -> None:
    model = object_model()
    model.provenance["object_side"] = 100.0
    model.working = WorkingSize((130, 96))
    save_model(model, tmp_path / "model.safetensors")
    image = textured_image(96, 130)
    depth = load(tmp_path / "model.safetensors").pixel_outputs(image).depth
    assert depth is not None
    np.testing.assert_array_equal(depth, make_predictor(object_model()).pixel_outputs(image).depth)


@pytest.mark.parametrize("factor", [1.4, 0.5])
def test_objects_at_another_scale_are_the_same_in_tiles_and_in_blocks(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from useg.inference import large_images

    # The objects of an untrained model are so small that their parts would all count.
    monkeypatch.setattr(separation, "MIN_PART_SHARE", 2.0)
    predictor, image = scaled_predictor(factor, tmp_path, 6), textured_image(96, 130)
    found = predictor.objects(image)
    assert found.table.areas.min() >= 6 * max(1, 1 / factor)
    assert not np.array_equal(found.numbers, make_predictor(object_model()).objects(image).numbers)
    np.testing.assert_array_equal(predictor.objects(image, 48).numbers, found.numbers)
    monkeypatch.setattr(large_images, "MAX_IN_MEMORY_PIXELS", 1000)
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(64, 64), photometric="rgb")
    predict(
        predictor, [str(tmp_path / "a.tif")], tmp_path / "out", wanted=OutputOptions(objects=True)
    )
    written = tifffile.imread(tmp_path / "out" / "objects" / "a.tif")
    np.testing.assert_array_equal(written, found.numbers)
    assert len((tmp_path / "out" / "objects" / "a.csv").read_text().splitlines()) == len(found) + 1
    # The label map shows the same outlines, but that of a job without objects is the usual one.
    label = predictor.pixel_outputs(image).logits.argmax(0)
    np.testing.assert_array_equal(read_mask(tmp_path / "out" / "a.tif"), label)
    predict(predictor, [str(tmp_path / "a.tif")], tmp_path / "labels", wanted=OutputOptions())
    usual = read_mask(tmp_path / "labels" / "a.tif")
    np.testing.assert_array_equal(usual, predictor(image))
    assert not np.array_equal(usual, label)


def test_maps_of_many_objects_have_32_bits(tmp_path: Path) -> None:
    numbers = np.arange(70_000, dtype=np.uint32).reshape(280, 250)
    write_object_map(tmp_path / "a.tif", numbers, (280, 250), 69_999, None)
    written = tifffile.imread(tmp_path / "a.tif")
    assert written.dtype == np.uint32
    np.testing.assert_array_equal(written, numbers)


def test_an_image_without_objects_has_an_empty_table() -> None:
    logits = np.zeros((2, 5, 6), np.float32)
    found = find_objects(PixelOutputs(logits), (1,))
    assert len(found) == 0
    assert found.table.rows(ClassTable(("background", "cell"))) == []


def test_batches_of_random_noise_have_as_many_rows_as_objects() -> None:
    found = make_predictor(object_model()).objects(random_image(64, 64))
    rows = found.table.rows(CLASSES)
    assert len(rows) == found.numbers.max() == len(found)
    assert {row["class"] for row in rows} <= {"cell", "=grain"}


def test_images_larger_than_memory_have_the_objects_of_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from useg.inference import large_image_objects, large_images

    monkeypatch.setattr(large_images, "MAX_IN_MEMORY_PIXELS", 10_000)
    monkeypatch.setattr(large_images, "MAX_ACTIVATION_BYTES", 1 << 22)
    monkeypatch.setattr(large_image_objects, "WORKING_TILE_SIDE", 96)
    image = textured_image(300, 560)
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(64, 64), photometric="rgb")
    predictor, wanted = make_predictor(object_model()), OutputOptions(objects=True)
    outcome = predict(predictor, [str(tmp_path / "a.tif")], tmp_path / "out", wanted=wanted)
    assert not outcome.failed
    found = predictor.objects(image)
    written = tifffile.imread(tmp_path / "out" / "objects" / "a.tif")
    np.testing.assert_array_equal(written, found.numbers)
    np.testing.assert_array_equal(read_mask(tmp_path / "out" / "a.tif"), predictor(image))
    rows = read_csv(tmp_path / "out" / "objects.csv")
    assert [int(row["pixels"]) for row in rows] == found.table.areas.tolist()
    confidences = [float(row["confidence"]) for row in rows]
    np.testing.assert_allclose(confidences, found.table.confidences, atol=1e-3)
    # The working files have no names.
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_file()) == [
        "a.tif",
        "objects.csv",
    ]
