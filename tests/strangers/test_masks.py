"""Masks as strangers store them: what becomes a class, what is mended, and what is said.

Training (``find_dataset``) and ``useg inspect`` decide alike.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tifffile
from made_data import build_samples
from made_doctor import describe_findings
from made_strangers import COLORS, HEIGHT, WIDTH, blobs, paint, save, yard

from useg import api
from useg.classes import IGNORE
from useg.data.dataset import Dataset, read_label, read_objects, read_sample
from useg.data.layouts import find_dataset
from useg.data.mask_encoding import classify_values
from useg.data.splits import open_dataset
from useg.doctor import survey
from useg.doctor.survey import refuse_faulty
from useg.errors import DataError, UsageError
from useg.reporting.inspection import inspect_dataset
from useg.training.batches import pixel_statistics

pytestmark = pytest.mark.wheel

Change = Callable[[np.ndarray, int], np.ndarray]


def write_yards(root: Path, change: Change, count: int = 8, suffix: str = ".png") -> Path:
    """Yards whose label maps are changed: (label, number) -> what the mask file stores."""
    for k in range(count):
        image, label = yard(k)
        save(root / "images" / f"photo{chr(97 + k)}.png", image)
        save(root / "masks" / f"photo{chr(97 + k)}{suffix}", change(label, k))
    return root


def write_cells(
    root: Path, numbers: Callable[[np.ndarray, int], np.ndarray], **counts: int
) -> Path:
    """Blobs whose numbers are changed: (numbers, k) -> what the mask file stores."""
    for k in range(10):
        image, ids = blobs(k, counts.get("count", 3 + k % 5))
        save(root / "images" / f"cell{chr(97 + k)}.png", image)
        save(root / "masks" / f"cell{chr(97 + k)}.png", numbers(ids, k))
    return root


def decide(root: Path) -> Dataset:
    """Open a data set as training does, and check that ``inspect`` decides the same."""
    dataset = find_dataset(root)
    inspected = inspect_dataset(root).dataset
    assert inspected.classes == dataset.classes
    assert inspected.encoding == dataset.encoding
    assert inspected.notes == dataset.notes
    return dataset


def error_kinds(root: Path) -> set[str]:
    return {each.kind for each in inspect_dataset(root).findings if each.severity == "error"}


def as_counted(numbers: np.ndarray, _: int) -> np.ndarray:
    return numbers


def as_unique(numbers: np.ndarray, k: int) -> np.ndarray:
    return np.where(numbers > 0, numbers + 100 * k, 0).astype(np.uint16)


def as_colored(numbers: np.ndarray, k: int) -> np.ndarray:
    colors = np.random.default_rng(k).integers(40, 256, (20, 3), np.uint8)
    colors[0] = 0
    return colors[numbers]


@pytest.mark.parametrize("numbering", [as_counted, as_unique, as_colored])
def test_numbered_objects_become_foreground_and_stay_objects(
    tmp_path: Path, numbering: Change
) -> None:
    dataset = decide(write_cells(tmp_path, numbering))
    assert dataset.encoding.objects
    assert dataset.classes.names == ("background", "foreground")
    assert "number their objects" in dataset.notes[0]
    numbers = blobs(4, 7)[1]
    assert np.array_equal(read_label(dataset.pairs[4], dataset), numbers > 0)
    objects = read_objects(dataset.pairs[4], dataset)
    assert len(np.unique(objects)) == len(np.unique(numbers))
    assert all(len(np.unique(objects[numbers == k])) == 1 for k in np.unique(numbers))
    (tmp_path / "dataset.toml").write_text("objects = false\n")
    if numbering is as_counted:
        assert len(find_dataset(tmp_path).classes) == 8


def test_many_objects_in_every_mask_are_numbered_objects(tmp_path: Path) -> None:
    assert decide(write_cells(tmp_path, as_counted, count=9)).encoding.objects


def body(k: int) -> np.ndarray:
    """Twelve parts, each one region, always at about the same place."""
    rows, columns = np.divmod(np.arange(12), 4)
    label = np.zeros((HEIGHT, WIDTH), np.uint8)
    down, right = k % 3, k % 2
    for part, (row, column) in enumerate(zip(10 * rows, 12 * columns, strict=True), 1):
        label[row + down : row + down + 6, column + right : column + right + 8] = part
    return label


def test_parts_of_a_body_are_classes() -> None:
    assert classify_values([body(k) for k in range(8)]) != "objects"


def test_streets_and_few_parts_are_classes() -> None:
    assert classify_values([yard(k)[1] for k in range(8)]) != "objects"
    # Two lungs and a heart.
    assert classify_values([np.minimum(blobs(k, 3)[1], 3) for k in range(8)]) != "objects"


def test_classes_and_numbers_in_one_value_are_asked_about(tmp_path: Path) -> None:
    """Cityscapes' instanceIds: 1000 times the class, plus the number of the object."""

    def number(label: np.ndarray, k: int) -> np.ndarray:
        objects = blobs(k, 6)[1]
        return np.where(objects, 1000 * (1 + objects % 2) + objects // 2, 0).astype(np.uint16)

    root = write_yards(tmp_path, number)
    with pytest.raises(UsageError, match="1000 times a class plus the number of an object"):
        find_dataset(root)
    (root / "dataset.toml").write_text("objects = true\n")
    assert len(find_dataset(root).classes) == 2
    (root / "dataset.toml").write_text("objects = false\n")
    assert len(find_dataset(root).classes) > 4


@pytest.mark.parametrize("how", ["red", "256"])
def test_classes_with_numbers_in_other_bytes_are_asked_about(tmp_path: Path, how: str) -> None:
    """KITTI-STEP: the class in red, the number in blue. Mapillary: 256 times the class."""

    def number(label: np.ndarray, k: int) -> np.ndarray:
        # Upright stripes: things of one class are not one region.
        numbers = np.where(label > 1, np.arange(WIDTH) // 8 + 1, 0)
        if how == "256":
            return (256 * label.astype(np.uint16) + numbers).astype(np.uint16)
        return np.dstack([label, np.zeros_like(label), numbers]).astype(np.uint8)

    root = write_yards(tmp_path, number)
    expected = {"red": "a class in the red channel and the number", "256": "256 times a class plus"}
    with pytest.raises(UsageError, match=expected[how]):
        find_dataset(root)
    (root / "dataset.toml").write_text("objects = false\n")
    assert len(find_dataset(root).classes) > 8


def test_classes_in_red_beside_numbered_objects_are_asked_about(tmp_path: Path) -> None:
    """NuCLS: the class of each nucleus in red, and its number in the others."""

    def number(label: np.ndarray, k: int) -> np.ndarray:
        objects = blobs(k, 8)[1].astype(np.uint8)
        kinds = np.random.default_rng(k).permutation(9) % 3 + 1
        classes = np.where(objects, kinds[objects], 0).astype(np.uint8)
        return np.dstack([classes, objects > 0, objects]).astype(np.uint8)

    with pytest.raises(UsageError, match="a class in the red channel and the number"):
        find_dataset(write_yards(tmp_path, number))


def test_colours_and_ids_of_two_bytes_are_no_numbers(tmp_path: Path) -> None:
    dark = np.array([(0, 0, 0), (30, 0, 200), (5, 120, 0), (20, 90, 90)], np.uint8)
    assert len(decide(write_yards(tmp_path / "a", lambda label, _: dark[label])).classes) == 4
    ids = np.array([0, 11001, 22002, 33003], np.uint16)
    assert len(decide(write_yards(tmp_path / "b", lambda label, _: ids[label])).classes) == 4


def test_truth_in_the_transparency_is_taken_from_there(tmp_path: Path) -> None:
    def white(label: np.ndarray, _: int) -> np.ndarray:
        alpha = np.where(label == 3, 255, 0)
        return np.dstack([np.full((*label.shape, 3), 255), alpha]).astype(np.uint8)

    dataset = decide(write_yards(tmp_path, white))
    assert dataset.encoding.alpha
    assert "transparency" in dataset.notes[0]
    assert np.array_equal(read_label(dataset.pairs[2], dataset), yard(2)[1] == 3)
    (tmp_path / "dataset.toml").write_text("alpha = false\n")
    assert error_kinds(tmp_path) == {"one class everywhere"}


def test_masks_that_are_ignored_everywhere_are_an_error(tmp_path: Path) -> None:
    """A table of another data set has other values, and ignores these."""
    write_yards(tmp_path, lambda label, _: label.astype(np.uint8))
    (tmp_path / "dataset.toml").write_text(
        'images = "images/*.png"\nmasks = "masks/*.png"\nclasses = "cityscapes"\n'
    )
    assert error_kinds(tmp_path) == {"all ignored"}


def test_cut_out_photographs_hold_the_truth_in_their_transparency(tmp_path: Path) -> None:
    def cut_out(label: np.ndarray, k: int) -> np.ndarray:
        return np.dstack([yard(k)[0], np.where(label == 1, 255, 0).astype(np.uint8)])

    dataset = decide(write_yards(tmp_path, cut_out))
    assert np.array_equal(read_label(dataset.pairs[1], dataset), yard(1)[1] == 1)


@pytest.mark.parametrize("folder", ["nobg", "matting"])
def test_cut_outs_that_keep_the_colours_below_are_masks(tmp_path: Path, folder: str) -> None:
    for k in range(4):
        pixels, label = yard(k)
        save(tmp_path / "originals" / f"{k}.jpg", pixels)
        save(tmp_path / folder / f"{k}.png", np.dstack([pixels, np.uint8(255) * (label == 3)]))
    dataset = find_dataset(tmp_path)
    assert [pair.mask.parent.name for pair in dataset.pairs] == [folder] * 4
    assert (read_label(dataset.pairs[0], dataset) == (yard(0)[1] == 3)).all()


def test_colours_of_a_published_data_set_name_the_classes(tmp_path: Path) -> None:
    colors = np.uint8([[0, 0, 0], [128, 64, 128], [107, 142, 35], [0, 0, 142]])
    dataset = find_dataset(write_yards(tmp_path, lambda label, _: colors[label]))
    assert dataset.classes.names == ("None", "Vehicles", "Vegetation", "Roads")
    assert "the colours, which are those of CARLA 0.9" in dataset.notes[-1]
    assert np.array_equal(
        np.array(dataset.classes.colors)[read_label(dataset.pairs[0], dataset)],
        colors[yard(0)[1]],
    )


def test_opaque_colour_masks_keep_their_colours(tmp_path: Path) -> None:
    def opaque(label: np.ndarray, _: int) -> np.ndarray:
        return np.dstack([label * 60, label * 20, 255 - label, np.full_like(label, 255)])

    dataset = decide(write_yards(tmp_path, opaque))
    assert (dataset.encoding.alpha, len(dataset.classes)) == (False, 4)


def test_a_few_visible_colours_are_not_taken_for_transparency(tmp_path: Path) -> None:
    def visible(label: np.ndarray, k: int) -> np.ndarray:
        """Noise that nobody sees where the alpha is 0, as programs leave it."""
        noise = np.random.default_rng(k).integers(0, 255, (*label.shape, 3))
        colors = np.where((label > 0)[..., None], COLORS[label], noise)
        return np.dstack([colors, 255 * (label > 0)]).astype(np.uint8)

    with pytest.raises(DataError, match="look like photographs"):
        find_dataset(write_yards(tmp_path, visible))


def smooth(label: np.ndarray, turn: float, filter_: PIL.Image.Resampling) -> np.ndarray:
    picture = PIL.Image.fromarray(((label == 1) * 255).astype(np.uint8))
    large = picture.resize((4 * WIDTH, 4 * HEIGHT), PIL.Image.Resampling.NEAREST)
    return np.asarray(large.rotate(turn).resize((2 * WIDTH, 2 * HEIGHT), filter_))


@pytest.mark.parametrize(
    "change",
    [
        lambda label, k: smooth(label, 7 * k, PIL.Image.Resampling.BILINEAR),
        lambda label, k: smooth(label, 7 * k, PIL.Image.Resampling.BOX),
        lambda label, k: smooth(label, 7 * k, PIL.Image.Resampling.BICUBIC) // 3,
        lambda label, k: np.dstack([smooth(label, 7 * k, PIL.Image.Resampling.BOX)] * 3),
    ],
    ids=["many levels", "few levels", "up to 85", "three equal bands"],
)
def test_smoothed_masks_are_refused_by_both_with_a_way_out(tmp_path: Path, change: Change) -> None:
    write_yards(tmp_path / "data", change)
    for path in (tmp_path / "data" / "images").iterdir():
        save(path, np.asarray(PIL.Image.open(path).resize((2 * WIDTH, 2 * HEIGHT))))
    with pytest.raises(UsageError, match=r"smoothing.*Run useg inspect DATA --fix OUT"):
        find_dataset(tmp_path / "data")
    survey = inspect_dataset(tmp_path / "data", fix=tmp_path / "out")
    assert {each.kind for each in survey.findings if each.severity == "error"} == {"smeared mask"}
    assert len(survey.classes) == 2
    assert find_dataset(tmp_path / "out").classes.names == survey.classes


def test_a_patch_of_an_odd_value_in_one_mask_is_no_class(tmp_path: Path) -> None:
    def slip(label: np.ndarray, k: int) -> np.ndarray:
        label = np.minimum(label, 2)
        label[4:6, 6:9] = 77 if k == 5 else 0
        return label

    write_yards(tmp_path, slip)
    with pytest.raises(UsageError, match=r"photof.png' has 1 value that no class has \(77; 6 pix"):
        find_dataset(tmp_path)
    survey = inspect_dataset(tmp_path)
    assert (len(survey.classes), error_kinds(tmp_path)) == (3, {"unknown value"})


def test_seventy_sparse_ids_are_classes_and_255_is_ignored(tmp_path: Path) -> None:
    ids = np.sort(np.random.default_rng(1).choice(182, 76, replace=False))

    def sparse(label: np.ndarray, k: int) -> np.ndarray:
        stored = ids[(np.arange(4) + 4 * k) % 76][label].astype(np.uint8)
        stored[:2] = 255
        return stored

    dataset = decide(write_yards(tmp_path, sparse, 19))
    assert set(dataset.classes.values) <= set(ids.tolist())
    assert len(dataset.classes) > 70
    assert dataset.classes.ignore == (IGNORE,)
    assert error_kinds(tmp_path) == set()


@pytest.mark.parametrize(
    ("dtype", "nodata"), [(np.int16, -9999), (np.float32, np.nan), (np.uint8, 0), (np.uint16, 9)]
)
def test_no_data_is_ignored(tmp_path: Path, dtype: type, nodata: float) -> None:
    for k in range(6):
        image, label = yard(k)
        save(tmp_path / "images" / f"tile{chr(97 + k)}.tif", image)
        mask = (label + 1).astype(dtype)
        mask[:4] = nodata
        tag = (42113, "s", 0, str(nodata), True)
        (tmp_path / "labels").mkdir(exist_ok=True)
        path = tmp_path / "labels" / f"tile{chr(97 + k)}.tif"
        tifffile.imwrite(path, mask, extratags=[tag])
    dataset = decide(tmp_path)
    assert dataset.classes.values == (1, 2, 3, 4)
    label = read_label(dataset.pairs[0], dataset)
    assert (label[:4] == IGNORE).all()
    assert np.array_equal(label[4:], yard(0)[1][4:])
    assert any("as nodata" in note for note in dataset.notes) == (nodata in (0, 9))


def test_ids_that_are_too_large_are_refused_with_what_to_do(tmp_path: Path) -> None:
    for k in range(3):
        pixels, label = yard(k)
        save(tmp_path / "images" / f"{k}.png", pixels)
        save(tmp_path / "masks" / f"{k}.tif", np.uint32(100_003) * label)
    with pytest.raises(DataError, match=r"value 300009, but class ids must be at most 65535; if"):
        find_dataset(tmp_path)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ((-1, 0, 1, 2), "have negative values or NaN and are ignored"),
        ((255, 1, 2, 3), "have the value 255 and are ignored"),
        # Beside 0, everybody knows 255.
        ((255, 0, 1, 2), ""),
    ],
)
def test_ignored_values_that_may_be_the_background_are_mentioned(
    tmp_path: Path, ids: tuple[int, ...], said: str
) -> None:
    for k in range(4):
        pixels, label = yard(k)
        save(tmp_path / "images" / f"{k}.png", pixels)
        save(tmp_path / "masks" / f"{k}.tif", np.int16(ids)[label])
    dataset = find_dataset(tmp_path)
    assert len(dataset.classes) == 3
    found = [note for note in dataset.notes if "are ignored" in note]
    assert len(found) == bool(said)
    assert all(said in note for note in found)


def test_masks_of_half_the_size_are_enlarged_aloud(tmp_path: Path) -> None:
    dataset = decide(write_yards(tmp_path, lambda label, _: label[::2, ::2]))
    assert "2 times as wide and high" in dataset.notes[0]
    assert error_kinds(tmp_path) == set()
    sample = read_sample(dataset.pairs[0], dataset)
    assert sample.label.shape == sample.image.shape[:2]
    assert np.array_equal(sample.label[::2, ::2], yard(0)[1][::2, ::2])


def test_one_mask_of_another_size_is_an_error(tmp_path: Path) -> None:
    write_yards(tmp_path, lambda label, k: label[::2, ::2] if k == 3 else label)
    assert error_kinds(tmp_path) == {"size mismatch"}


def test_one_class_everywhere_is_an_error(tmp_path: Path) -> None:
    write_yards(tmp_path, lambda label, _: np.full_like(label, 1))
    assert error_kinds(tmp_path) == {"one class everywhere"}, describe_findings(
        inspect_dataset(tmp_path)
    )


def test_ids_in_the_blue_band_are_ids(tmp_path: Path) -> None:
    def blue(label: np.ndarray, _: int) -> np.ndarray:
        return np.dstack([label * 0, label * 0, label])

    dataset = decide(write_yards(tmp_path, blue))
    assert (dataset.classes.by_color, dataset.classes.values) == (False, (0, 1, 2, 3))
    assert np.array_equal(read_label(dataset.pairs[0], dataset), yard(0)[1])


def test_training_refuses_what_inspect_calls_an_error_unless_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_yards(tmp_path / "data", lambda label, _: np.full_like(label, 2))
    with pytest.raises(UsageError, match=r"1 error .*every pixel of every mask.*--force"):
        api.train(tmp_path / "data", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(api, "_train_and_report", lambda *args: "trained")
    assert api.train(tmp_path / "data", tmp_path / "run", force=True) == "trained"


def test_data_without_errors_are_surveyed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USEG_CACHE", str(tmp_path / "cache"))
    write_yards(tmp_path / "data", lambda label, _: label, 12)
    save(tmp_path / "data" / "images" / "photoc.png", 255 - yard(2)[0])
    dataset = open_dataset(tmp_path / "data")
    doubts: list[str] = []
    refuse_faulty(dataset, doubts.append)
    assert [doubt[:60] for doubt in doubts] == [
        "useg inspect warns: 1 of 12 images looks like a negative of "
    ]
    monkeypatch.setattr(survey, "survey_dataset", lambda _: pytest.fail("it was surveyed again"))
    again: list[str] = []
    refuse_faulty(dataset, again.append)
    assert again == doubts


def test_masks_without_annotations_are_reported_and_can_be_ignored(tmp_path: Path) -> None:
    write_yards(tmp_path, lambda label, k: label if k % 3 else label * 0)
    dataset = decide(tmp_path)
    assert "3 of 8 masks are 0 everywhere, such as 'photoa.png'" in dataset.notes[-1]
    assert not read_label(dataset.pairs[0], dataset).any()
    (tmp_path / "dataset.toml").write_text('empty = "ignore"\n')
    dataset = decide(tmp_path)
    assert (read_label(dataset.pairs[0], dataset) == IGNORE).all()
    assert np.array_equal(read_label(dataset.pairs[1], dataset), yard(1)[1])
    assert inspect_dataset(tmp_path).ignore_share == pytest.approx(3 / 8)


def test_images_without_shapes_are_reported_and_can_be_ignored(tmp_path: Path) -> None:
    entries, shapes = [], []
    for k in range(6):
        save(tmp_path / "images" / f"photo{chr(97 + k)}.png", yard(k)[0])
        entries.append({"id": k, "file_name": f"photo{chr(97 + k)}.png", "width": 48, "height": 32})
        box = {"id": k, "image_id": k, "category_id": 1, "iscrowd": 0, "area": 48, "bbox": []}
        shapes += [{**box, "segmentation": [[4, 4, 12, 4, 12, 10]]}] if k else []
    categories = [{"id": 1, "name": "hut"}]
    content = {"images": entries, "annotations": shapes, "categories": categories}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    dataset = decide(tmp_path)
    assert any("1 of 6 images has no shapes, such as 'photoa.png'" in n for n in dataset.notes)
    (tmp_path / "dataset.toml").write_text('empty = "ignore"\n')
    dataset = decide(tmp_path)
    assert (read_label(dataset.pairs[0], dataset) == IGNORE).all()
    assert not any("no shapes" in note for note in dataset.notes)
    (tmp_path / "dataset.toml").write_text('empty = "unknown"\n')
    with pytest.raises(UsageError, match=r'empty = .*choose "background", or "ignore"'):
        find_dataset(tmp_path)


def write_tile(path: Path, image: np.ndarray, way: str) -> None:
    """Write an image whose first five rows have no data, as one of the ways of GIS programs."""
    path.parent.mkdir(exist_ok=True)
    if way == "alpha":
        alpha = np.full(image.shape[:2], 255, np.uint8)
        alpha[:5] = 0
        tifffile.imwrite(path, np.dstack([image, alpha]), photometric="rgb", extrasamples=[2])
    else:
        value = "0" if way == "tag" else way
        tag = (42113, "s", 0, value, True)
        pixels = image if way == "tag" else image.astype(np.float32)
        pixels[:5] = float(value)
        tifffile.imwrite(path, pixels, photometric="rgb", extratags=[tag] * (way != "nan"))


@pytest.mark.parametrize("way", ["tag", "alpha", "nan", "-9999"])
def test_pixels_without_image_data_do_not_count(tmp_path: Path, way: str) -> None:
    for k in range(3):
        image, label = yard(k)
        image[:5] = 0
        image[6, 7, 0] = 0
        write_tile(tmp_path / "images" / f"tile{chr(97 + k)}.tif", image, way)
        save(tmp_path / "masks" / f"tile{chr(97 + k)}.png", label)
    dataset = find_dataset(tmp_path)
    sample = read_sample(dataset.pairs[0], dataset)
    assert (sample.label[:5] == IGNORE).all()
    assert np.array_equal(sample.label[5:], yard(0)[1][5:])
    assert inspect_dataset(tmp_path).ignore_share == pytest.approx(5 / HEIGHT)
    counted = np.concatenate([yard(k)[0][5:].reshape(-1, 3) for k in range(3)]).astype(float)
    kind = "uint8" if way in ("tag", "alpha") else "float32"
    mean, std = pixel_statistics(build_samples(dataset, 3, kind))
    np.testing.assert_allclose(mean, counted.mean(0), rtol=0.02)
    np.testing.assert_allclose(std, counted.std(0), rtol=0.05)
    assert np.abs(sample.image[2, 3] - sample.image[5:].mean((0, 1))).max() <= 1


def scribble(label: np.ndarray, k: int, rest: int = 0) -> np.ndarray:
    """Strokes of the classes 1 to 4 in the middle of their areas; ``rest`` is elsewhere."""
    inside = np.zeros(label.shape, bool)
    # No pixel of another class is beside a stroke.
    for row in range(3 + k % 3, HEIGHT - 3, 6):
        for column in range(3, WIDTH - 3):
            near = label[row - 2 : row + 3, column - 2 : column + 3]
            inside[row, column] = (near == label[row, column]).all()
    return np.where(inside, label + 1, rest).astype(np.uint8)


@pytest.mark.parametrize("rest", [0, 9, 255])
def test_scribbles_are_asked_about_and_train(tmp_path: Path, rest: int) -> None:
    write_yards(tmp_path, lambda label, k: scribble(label, k, rest))
    if rest != 255:
        message = rf"look like scribbles: .* of the value {rest}, .*write ignore = \[{rest}\] into"
        for read in (find_dataset, inspect_dataset):
            with pytest.raises(UsageError, match=message):
                read(tmp_path)
        (tmp_path / "dataset.toml").write_text("ignore = []\n")
        assert rest in find_dataset(tmp_path).classes.values
        (tmp_path / "dataset.toml").write_text(f"ignore = [{rest}]\n")
    dataset = decide(tmp_path)
    assert dataset.classes.values == (1, 2, 3, 4)
    assert dataset.classes.ignore == (rest,)
    assert error_kinds(tmp_path) == set()
    if rest == 9:
        size = {"model.pretrained": False, "model.width": 4, "model.depth": 2}
        run = api.train(tmp_path, tmp_path / "run", settings={**size, "train.steps": 2})
        assert len(run.log) == 2


def test_thin_things_that_end_at_edges_are_classes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for k in range(8):
        label = np.zeros((HEIGHT, WIDTH), np.uint8)
        label[4 + k, 3:40], label[14:30, 10 + k], label[24, 24:44] = 1, 2, 1
        save(tmp_path / "images" / f"{k}.png", paint(COLORS[label], rng))
        save(tmp_path / "masks" / f"{k}.png", label)
    assert decide(tmp_path).classes.values == (0, 1, 2)


def test_strokes_of_one_class_are_reported(tmp_path: Path) -> None:
    write_yards(tmp_path, lambda label, k: (scribble(label, k) == 1).astype(np.uint8))
    assert "scribble on the background too" in decide(tmp_path).notes[0]


@pytest.mark.parametrize(("rest", "factor"), [(9, 1), (255, 1), (255, 85)])
def test_finished_masks_win_over_scribbles_of_the_background_too(
    tmp_path: Path, rest: int, factor: int
) -> None:
    write_yards(tmp_path, lambda label, _: label * factor)
    for k in range(8):
        save(tmp_path / "strokes" / f"photo{chr(97 + k)}.png", scribble(yard(k)[1], k, rest))
    dataset = find_dataset(tmp_path)
    assert dataset.pairs[0].mask.parent.name == "masks"
    assert "strokes/*.png labels only a part of what masks/*.png labels" in dataset.notes[0]
