"""Arrays of many images, as people save them with NumPy, are read image by image."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from made_strangers import COLORS, HEIGHT, WIDTH, save, yard

from useg.data.dataset import Dataset, pair_name, read_label, read_sample
from useg.data.layouts import find_dataset
from useg.errors import DataError
from useg.images.image_files import read_image, read_size
from useg.images.stacks import count_pages
from useg.reporting.inspection import inspect_dataset

pytestmark = pytest.mark.wheel

Change = Callable[[np.ndarray], np.ndarray]


def stack(first: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*(yard(k) for k in range(first, first + number)), strict=True)
    return np.stack(images), np.stack(labels)


def save_array(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def assert_labels(dataset: Dataset, labels: np.ndarray) -> None:
    assert len(dataset.pairs) == len(labels)
    for pair, label in zip(dataset.pairs, labels, strict=True):
        assert np.array_equal(read_label(pair, dataset), label)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images.npy", "masks.npy"),
        ("X_train.npy", "y_train.npy"),
        ("images/data.npy", "masks/data.npy"),
        ("train_images.npy", "train_labels.npy"),
    ],
)
def test_two_arrays_are_paired_image_by_image(tmp_path: Path, image: str, mask: str) -> None:
    images, labels = stack(0, 6)
    save_array(tmp_path / image, images)
    save_array(tmp_path / mask, labels)
    dataset = find_dataset(tmp_path)
    assert_labels(dataset, labels)
    assert pair_name(dataset.pairs[3], tmp_path) == f"{image}#3"
    assert np.array_equal(read_sample(dataset.pairs[3], dataset).image, images[3])
    assert inspect_dataset(tmp_path).num_pairs == 6


SHAPES: dict[str, tuple[Change, Change]] = {
    "grey": (lambda images: images[..., 0], lambda labels: labels),
    "one band": (lambda images: images[..., :1], lambda labels: labels[..., None]),
    "bands first": (
        lambda images: np.moveaxis(images, 3, 1).copy(),
        lambda labels: labels[:, None],
    ),
    "three, one-hot": (
        lambda images: images,
        lambda labels: np.eye(3, dtype=np.float32)[np.minimum(labels, 2)],
    ),
    "three, one-hot, true and false": (
        lambda images: images,
        lambda labels: np.eye(3, dtype=bool)[np.minimum(labels, 2)],
    ),
    "one-hot": (lambda images: images / np.float32(255), lambda labels: np.eye(4)[labels]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_arrays_of_any_order_of_axes_are_read(tmp_path: Path, name: str) -> None:
    images, labels = stack(0, 6)
    for path, array, change in zip(("X.npy", "y.npy"), (images, labels), SHAPES[name], strict=True):
        save_array(tmp_path / path, change(array))
    assert_labels(find_dataset(tmp_path), np.minimum(labels, 2 if "three" in name else 3))


def test_arrays_of_splits_are_split(tmp_path: Path) -> None:
    labels = []
    for first, number, split in ((0, 6, "train"), (20, 3, "val"), (30, 2, "test")):
        images, own = stack(first, number)
        save_array(tmp_path / f"X_{split}.npy", images)
        if split != "test":
            save_array(tmp_path / f"y_{split}.npy", own)
            labels.append(own)
    dataset = find_dataset(tmp_path)
    assert_labels(dataset, np.concatenate(labels))
    assert [len(dataset.of(split)) for split in ("train", "val", "test")] == [6, 3, 0]
    assert "1 image of the split test without a mask: left for prediction" in dataset.notes


def test_different_numbers_of_images_and_masks_are_refused(tmp_path: Path) -> None:
    images, labels = stack(0, 6)
    save_array(tmp_path / "X_train.npy", images)
    save_array(tmp_path / "y_train.npy", labels[:4])
    for read in (find_dataset, inspect_dataset):
        with pytest.raises(DataError, match=r"has 6 pages, but its mask '.*y_train.npy' has 4"):
            read(tmp_path)


def test_bands_of_one_image_are_no_stack(tmp_path: Path) -> None:
    save_array(tmp_path / "bands.npy", np.zeros((7, HEIGHT, WIDTH), np.uint8))
    save_array(tmp_path / "one-hot.npy", np.zeros((HEIGHT, WIDTH, 7), np.uint8))
    save_array(tmp_path / "mask.npy", np.zeros((HEIGHT, WIDTH), np.uint8))
    for name in ("bands", "one-hot"):
        assert count_pages(tmp_path / f"{name}.npy", tmp_path / "mask.npy") == (1, 1)
        assert read_image(tmp_path / f"{name}.npy").shape == (HEIGHT, WIDTH, 7)
    for shape in ((HEIGHT, WIDTH, 20), (HEIGHT, HEIGHT, 24)):
        save_array(tmp_path / "volume.npy", np.zeros(shape, np.uint8))
        assert count_pages(tmp_path / "volume.npy", tmp_path / "volume.npy") == (1, 1)


def test_one_image_of_a_large_array_is_read_alone(tmp_path: Path) -> None:
    shape = (4000, 512, 512, 3)
    array = np.lib.format.open_memmap(tmp_path / "X.npy", "w+", np.uint8, shape)
    array[3999, 5, 6] = 7
    array.flush()
    tracemalloc.start()
    image = read_image(tmp_path / "X.npy", page=3999)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert image[5, 6].tolist() == [7, 7, 7]
    assert peak < 4_000_000
    with pytest.raises(DataError, match="pages count from 0 to 3999"):
        read_size(tmp_path / "X.npy", 4000)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((10**9, HEIGHT, WIDTH, 3), "but is shorter"),
        ((-6, HEIGHT, WIDTH, 3), "it declares the shape"),
        ((0, HEIGHT, WIDTH, 3), "it declares the shape"),
        ((6, 2, HEIGHT, WIDTH, 3), "neither an image"),
    ],
)
def test_the_declared_shape_of_an_array_is_checked(
    tmp_path: Path, shape: tuple[int, ...], message: str
) -> None:
    images, _ = stack(0, 12)
    with (tmp_path / "X.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(images.tobytes())
    for page in (None, 0):
        with pytest.raises(DataError, match=message):
            read_image(tmp_path / "X.npy", page=page)


@pytest.mark.parametrize("names", [("x", "y"), ("image", "label"), ("x_train", "y_train")])
def test_lines_of_python_turn_archives_of_arrays_into_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
) -> None:
    images, labels = stack(0, 6)
    (tmp_path / "data").mkdir()
    arrays = dict(zip(names, (images, labels), strict=True))
    if "train" in names[0]:
        arrays |= {"x_test": images[:2], "y_test": labels[:2]}
    np.savez_compressed(tmp_path / "data" / "data.npz", **arrays)
    with pytest.raises(DataError, match=f"has the arrays {names[0]}") as raised:
        find_dataset(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    exec("import" + str(raised.value).partition("\nimport")[2], {})
    dataset = find_dataset(tmp_path / "OUT")
    test = len(dataset.of("test"))
    assert_labels(dataset, np.concatenate([labels[:test], labels]))
    (tmp_path / "data" / "data.npz").write_bytes(b"PK\5\6" + b"\xff" * 18)
    with pytest.raises(DataError, match=r"does not read .npz files such as '.*data.npz'. It reads"):
        find_dataset(tmp_path / "data")


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as raised:
        read_sample((dataset := find_dataset(folder)).pairs[0], dataset)
    return str(raised.value)


def apply_advice(message: str, files: list[Path]) -> None:
    """Run what a message says that Python does, for each file."""
    (command,) = (part for part in message.split(": ") if part.startswith("numpy.save("))
    for file in files:
        exec(command, {"numpy": np, "file": file})


@pytest.mark.parametrize("kind", ["Fortran order", "last axis counts slices"])
def test_arrays_that_are_refused_become_readable_as_the_message_says(
    kind: str, tmp_path: Path
) -> None:
    images, labels = stack(0, 8)
    paths = [tmp_path / "images" / "a.npy", tmp_path / "masks" / "a.npy"]
    for path, array in zip(paths, (images[..., 0], labels), strict=True):
        moved = np.moveaxis(array, 0, -1) if kind != "Fortran order" else array
        save_array(path, np.asfortranarray(array) if kind == "Fortran order" else moved)
    if kind == "Fortran order":
        save_array(paths[0], np.asfortranarray(images))
    message = refusal(tmp_path)
    assert kind in message
    apply_advice(message, paths)
    assert_labels(find_dataset(tmp_path), labels)


@pytest.mark.parametrize("depth", [70, 72])
def test_a_volume_whose_slices_may_lie_along_its_last_axis_is_told(
    depth: int, tmp_path: Path
) -> None:
    size = 72
    label = np.zeros((size, size, depth), np.uint8)
    label[20:50, 10:60, 5:40] = 1
    noise = np.random.default_rng(0).integers(0, 40, label.shape)
    save_array(tmp_path / "images" / "a.npy", (label * 120 + noise).astype(np.uint8))
    save_array(tmp_path / "masks" / "a.npy", label)
    notes = [note for note in find_dataset(tmp_path).notes if "along its last axis" in note]
    assert len(notes) == (depth != size)
    if notes:
        assert f"read as {size} images of {depth}x{size} pixels" in notes[0]
        apply_advice(notes[0], [tmp_path / "images" / "a.npy", tmp_path / "masks" / "a.npy"])
        assert_labels(find_dataset(tmp_path), np.moveaxis(label, -1, 0))


@pytest.mark.parametrize("number", [2, 3, 4])
def test_few_grey_images_in_one_array_are_read_if_their_masks_have_ids(
    number: int, tmp_path: Path
) -> None:
    images, labels = stack(0, number)
    save_array(tmp_path / "images" / "a.npy", images[..., 0])
    save_array(tmp_path / "masks" / "a.npy", labels)
    assert_labels(find_dataset(tmp_path), labels)


CHANNELS: dict[str, Change] = {
    "one-hot": lambda labels: np.moveaxis(np.eye(4, dtype=np.uint8)[labels], -1, 0),
    "overlapping": lambda labels: np.stack([labels >= k for k in range(3)]).astype(np.uint8),
    "equal": lambda labels: np.stack([labels] * 3),
    "colours": lambda labels: np.moveaxis(COLORS[labels], -1, 0),
}


@pytest.mark.parametrize("kind", CHANNELS)
def test_bands_of_one_mask_are_not_few_masks(kind: str, tmp_path: Path) -> None:
    mask = CHANNELS[kind](yard(0)[1])
    noise = np.random.default_rng(0).integers(0, 256, mask.shape, np.uint8)
    save_array(tmp_path / "images" / "a.npy", noise)
    save_array(tmp_path / "masks" / "a.npy", mask)
    assert count_pages(tmp_path / "images" / "a.npy", tmp_path / "masks" / "a.npy") == (1, 1)


def test_a_tiff_of_rows_as_pages_is_told(tmp_path: Path) -> None:
    for k in range(3):
        image, label = yard(k)
        save(tmp_path / "images" / f"{k}.tif", np.dstack([image, image[..., :2]]))
        save(tmp_path / "masks" / f"{k}.tif", label)
    with pytest.raises(DataError, match="tifffile saved row by row") as raised:
        find_dataset(tmp_path, strict=False)
    command = str(raised.value).partition("in Python: ")[2]
    for path in (tmp_path / "images").iterdir():
        exec(command, {"tifffile": tifffile, "file": path})
    assert read_image(tmp_path / "images" / "0.tif").shape[2] == 5
    assert_labels(find_dataset(tmp_path), np.stack([yard(k)[1] for k in range(3)]))
