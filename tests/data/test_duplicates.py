"""Changed copies are near duplicates, other images are not, and every image is decoded once."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from made_data import blob_image, write_blob_dataset

from useg.data import duplicates
from useg.data.dataset import Dataset
from useg.data.duplicates import (
    NEAR_DUPLICATE_CORRELATION,
    compute_signature,
    compute_signatures,
    count_class_pixels,
    find_landmarks,
    find_near_duplicates,
    find_overlaps,
    find_turned_copies,
    group_near_duplicates,
    is_quick_to_compare,
    normalize_signatures,
)


def as_jpeg(image: np.ndarray) -> np.ndarray:
    target = io.BytesIO()
    PIL.Image.fromarray(image).save(target, "JPEG", quality=40)
    return np.asarray(PIL.Image.open(target))


def with_noise(image: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 20, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def with_nan(image: np.ndarray) -> np.ndarray:
    is_valid = np.arange(image.size).reshape(image.shape) % 997
    return np.where(is_valid, image / 255, np.nan).astype(np.float32)


CHANGES = {
    "JPEG": as_jpeg,
    "half the size": lambda image: np.asarray(PIL.Image.fromarray(image).resize((48, 32))),
    "darker": lambda image: (image * 0.6).astype(np.uint8),
    "noise": with_noise,
    "moved by a pixel": lambda image: np.roll(image, 1, 1),
    "grey": lambda image: np.rint(image.mean(2, keepdims=True)).astype(np.uint8),
    "16 bit": lambda image: image.astype(np.uint16) * 257,
    "float with NaN": with_nan,
}


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setenv("USEG_CACHE", str(tmp_path / "cache"))
    return write_blob_dataset(tmp_path)


def signatures_of(*images: np.ndarray) -> np.ndarray:
    return np.stack([compute_signature(image) for image in images])


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_a_near_duplicate_and_other_images_are_not(change):
    images = [blob_image(k) for k in range(40)]
    signatures = signatures_of(*images, CHANGES[change](images[7]))
    assert group_near_duplicates(signatures).tolist() == [*range(40), 7]
    ((index, earlier, correlations),) = find_near_duplicates(signatures, NEAR_DUPLICATE_CORRELATION)
    assert (index, earlier.tolist()) == (40, [7])
    assert correlations[0] >= NEAR_DUPLICATE_CORRELATION


def test_near_duplicates_of_near_duplicates_are_in_one_group():
    panorama = blob_image(0, 50)
    film = [panorama[:, k : k + 96] for k in range(6)]
    signatures = signatures_of(blob_image(2), *film, blob_image(1))
    assert group_near_duplicates(signatures).tolist() == [0, 1, 1, 1, 1, 1, 1, 7]
    backwards = group_near_duplicates(signatures[::-1])[::-1]
    assert len(set(backwards[1:7].tolist())) == 1
    assert len(set(backwards.tolist())) == 3
    ends = normalize_signatures(signatures[[1, 6]])
    assert ends[0] @ ends[1] < NEAR_DUPLICATE_CORRELATION


def test_blank_images_are_near_duplicates_of_nothing():
    blank = signatures_of(*(np.full((64, 96, 3), value, np.uint8) for value in (0, 0, 255)))
    assert (blank == 128).all()
    assert group_near_duplicates(blank).tolist() == [0, 1, 2]
    assert list(find_near_duplicates(blank, NEAR_DUPLICATE_CORRELATION)) == []


def test_near_duplicates_equal_those_of_a_loop_over_all_pairs(monkeypatch):
    monkeypatch.setattr(duplicates, "_CORRELATED_ROWS", 7)
    rng = np.random.default_rng(0)
    scenes = rng.normal(0, 32, (10, 256))[rng.integers(0, 10, 40)]
    noisy = 128 + scenes + rng.normal(0, 8, (40, 256))
    signatures = np.clip(noisy, 0, 255).astype(np.uint8)
    expected = {
        (i, j)
        for i in range(40)
        for j in range(i)
        if np.dot(*normalize_signatures(signatures[[i, j]])) >= NEAR_DUPLICATE_CORRELATION
    }
    near = find_near_duplicates(signatures, NEAR_DUPLICATE_CORRELATION)
    found = {(i, int(j)) for i, earlier, _ in near for j in earlier}
    assert found == expected
    assert len(found) > 20


def test_images_and_masks_are_decoded_once(dataset, monkeypatch):
    signatures = compute_signatures(dataset, dataset.pairs)
    pixels = count_class_pixels(dataset, dataset.pairs)
    assert pixels[:, 1].sum() == 3 * 25

    def fail(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(duplicates, "read_label", fail)
    monkeypatch.setattr(duplicates, "read_pair_image", fail)
    assert (compute_signatures(dataset, dataset.pairs) == signatures).all()
    assert (count_class_pixels(dataset, dataset.pairs) == pixels).all()
    with pytest.raises(AssertionError, match="decoded again"):
        compute_signatures(dataset, dataset.pairs[1:])


def test_unreadable_files_count_as_blank(dataset):
    dataset.pairs[3].image.write_bytes(b"no picture")
    dataset.pairs[4].mask.unlink()
    assert (compute_signatures(dataset, dataset.pairs)[3] == 128).all()
    assert (count_class_pixels(dataset, dataset.pairs)[4] == 0).all()


def test_many_or_large_images_are_not_quick_to_compare(dataset, monkeypatch):
    assert is_quick_to_compare(dataset.pairs)
    monkeypatch.setattr(duplicates, "MAX_COMPARED_PIXELS", 19 * 64 * 96)
    assert not is_quick_to_compare(dataset.pairs)
    assert is_quick_to_compare(dataset.pairs[1:])
    monkeypatch.undo()
    monkeypatch.setattr(duplicates, "MAX_COMPARED_PAIRS", 19)
    assert not is_quick_to_compare(dataset.pairs)
    assert is_quick_to_compare(replace(dataset, pairs=dataset.pairs[1:]).pairs)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_crops_and_overlapping_tiles_share_landmarks(dtype: type) -> None:
    rng = np.random.default_rng(0)
    images = [rng.normal(120, 20, (90, 110, 3)).clip(0, 255).astype(dtype) for _ in range(3)]
    parts = [images[1][7:60, 20:101], images[2][:, 50:], images[0]]
    found = find_overlaps(*([find_landmarks(each) for each in side] for side in (parts, images)))
    # The same image at the same place is a duplicate, and no crop.
    assert [(k, n) for k, n, _ in found] == [(0, 1), (1, 2)]
    assert min(share for *_, share in found) > 0.9


@pytest.mark.parametrize("shape", [(5, 60, 1), (8, 8, 3), (60, 60, 1)])
def test_plain_and_tiny_images_have_no_landmarks(shape: tuple[int, int, int]) -> None:
    for image in (np.full(shape, 77, np.uint8), np.full(shape, np.nan, np.float32)):
        landmarks = find_landmarks(image)
        assert landmarks.shape == (0, 3)
        assert find_overlaps([landmarks], [landmarks]) == []


def test_mirrored_and_rotated_copies_are_found() -> None:
    rng = np.random.default_rng(0)
    images = [rng.normal(120, 20, (48, 64, 3)).clip(0, 255).astype(np.uint8) for _ in range(3)]
    turned = [images[0], images[1][::-1], np.rot90(images[2]), np.rot90(images[2])[::-1]]
    one, other = (
        np.stack([compute_signature(image) for image in side]) for side in (turned, images)
    )
    found = find_turned_copies(one, other, 0.98)
    assert [(k, n) for k, n, _ in found] == [(1, 1), (2, 2), (3, 2)]
