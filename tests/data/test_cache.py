"""Samples equal the files at the working size; they are kept until a file or setting changes."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tifffile
from made_data import build_samples, list_cache_entries, write_random_dataset, write_tiff_dataset

from useg import machine
from useg.classes import ClassTable
from useg.data import cache, cache_folder
from useg.data.cache import Samples
from useg.data.dataset import Dataset, Instances, Pair
from useg.errors import SettingsError, UsageError
from useg.models.geometry import WorkingSize


def are_equal(a: Samples, b: Samples) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x.image, y.image)
        and np.array_equal(x.label, y.label)
        and np.array_equal(x.native, y.native)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("setting", ["cache", "off"])
def test_samples_are_the_files_content_in_order(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USEG_CACHE", setting if setting == "off" else str(tmp_path / setting))
    dataset = write_random_dataset(tmp_path / "data", 9)
    done: list[int] = []
    samples = build_samples(dataset, native=True, progress=done.append)
    assert done == list(range(1, 10))
    assert len(samples) == 9
    for pair, sample in zip(dataset.pairs, samples, strict=True):
        assert (sample.image == np.asarray(PIL.Image.open(pair.image))).all()
        assert (sample.label == np.asarray(PIL.Image.open(pair.mask))).all()
        assert sample.native is not None
        assert (sample.native == sample.label).all()
        assert not sample.image.flags.writeable
    assert (samples[-1].image == samples[8].image).all()
    assert [sample.label.sum() for sample in samples[2:4]] == [
        samples[2].label.sum(),
        samples[3].label.sum(),
    ]
    with pytest.raises(IndexError):
        samples[9]


def test_samples_have_the_working_size_and_keep_the_native_label(
    tmp_path: Path, cache_path: Path
) -> None:
    for sample in build_samples(
        write_random_dataset(tmp_path), working=WorkingSize((6, 4)), native=True
    ):
        assert sample.image.shape == (4, 6, 3)
        assert sample.label.shape == (4, 6)
        assert sample.native is not None
        assert sample.native.shape == (8, 12)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_samples_may_have_other_number_types_and_different_sizes(
    dtype: str, tmp_path: Path, cache_path: Path
) -> None:
    pictures = [
        np.random.default_rng(k).integers(0, 60000, (5 + k, 7, 2)).astype(dtype) for k in range(4)
    ]
    for _ in range(2):
        for picture, sample in zip(
            pictures, build_samples(write_tiff_dataset(tmp_path, pictures), 2, dtype), strict=True
        ):
            assert sample.image.dtype == dtype
            assert (sample.image == picture).all()
            assert sample.native is None


def test_a_second_epoch_and_a_second_run_decode_nothing(
    tmp_path: Path, cache_path: Path, decoded: list[str]
) -> None:
    dataset = write_random_dataset(tmp_path / "data")
    first = build_samples(dataset)
    for _ in range(2):
        assert len(list(first)) == 4
    done: list[int] = []
    assert are_equal(build_samples(dataset, progress=done.append), first)
    assert len(decoded) == 4
    assert done == []
    moved = shutil.copytree(tmp_path / "data", tmp_path / "elsewhere")
    pairs = tuple(Pair(moved / pair.image.name, moved / pair.mask.name) for pair in dataset.pairs)
    assert are_equal(build_samples(replace(dataset, root=moved, pairs=pairs)), first), (
        "content counts, not names"
    )
    assert len(decoded) == 4


@pytest.mark.parametrize(
    "what", ["image", "mask", "size", "native", "classes", "order", "fewer", "decoder"]
)
def test_samples_are_decoded_again_when_something_changes(
    what: str, tmp_path: Path, cache_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, options = write_random_dataset(tmp_path), {}
    build_samples(dataset)
    if what == "image":
        shutil.copy(dataset.pairs[0].image, dataset.pairs[1].image)
    elif what == "mask":
        PIL.Image.fromarray(np.full((8, 12), 2, np.uint8)).save(dataset.pairs[3].mask)
    elif what == "size":
        options["working"] = WorkingSize((6, 4))
    elif what == "native":
        options["native"] = True
    elif what == "classes":
        dataset = replace(dataset, classes=ClassTable(("a", "b", "c"), values=(0, 2, 1)))
    elif what == "order":
        dataset = replace(dataset, pairs=dataset.pairs[::-1])
    elif what == "fewer":
        dataset = replace(dataset, pairs=dataset.pairs[1:])
    else:
        monkeypatch.setattr(cache_folder, "compute_decoder_version", lambda: "another")
    again = build_samples(dataset, **options)
    assert len(decoded) == 4 + len(dataset.pairs)
    monkeypatch.setenv("USEG_CACHE", "off")
    assert are_equal(again, build_samples(dataset, **options))


def test_masks_of_single_objects_and_pages_are_part_of_the_key(
    tmp_path: Path, cache_path: Path, decoded: list[str]
) -> None:
    dataset = write_random_dataset(tmp_path / "data", 2)
    things = [tmp_path / f"thing{k}.png" for k in range(2)]
    for path in things:
        PIL.Image.fromarray(np.eye(8, 12, dtype=np.uint8)).save(path)
    pair = Pair(dataset.pairs[0].image, tmp_path, truth=Instances(tuple(things)))
    dataset = replace(dataset, pairs=(pair,), classes=ClassTable(("rest", "thing")))
    build_samples(dataset)
    build_samples(dataset)
    assert len(decoded) == 1
    PIL.Image.fromarray(np.ones((8, 12), np.uint8)).save(things[1])
    assert build_samples(dataset)[0].label.all()
    stack = tmp_path / "stack.tif"
    tifffile.imwrite(
        stack, np.arange(2 * 8 * 12, dtype=np.uint8).reshape(2, 8, 12), photometric="minisblack"
    )
    masks = tmp_path / "masks.tif"
    tifffile.imwrite(masks, np.zeros((2, 8, 12), np.uint8), photometric="minisblack")
    pages = replace(dataset, pairs=tuple(Pair(stack, masks, page=page) for page in range(2)))
    for _ in range(2):
        assert [sample.image[0, 0, 0] for sample in build_samples(pages, 1)] == [0, 96]
    for k in range(2):
        assert (
            build_samples(replace(pages, pairs=pages.pairs[k : k + 1]), 1)[0].image[0, 0, 0]
            == 96 * k
        )


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def make_empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[200] ^= 64
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["samples.bin", "ledger.npz"])
@pytest.mark.parametrize("damage", [truncate, make_empty, flip_bit, Path.unlink])
def test_damaged_entries_are_decoded_again(
    name: str, damage: Callable[[Path], None], tmp_path: Path, cache_path: Path, decoded: list[str]
) -> None:
    dataset = write_random_dataset(tmp_path / "data")
    right = [sample.image.copy() for sample in build_samples(dataset)]
    damage(list_cache_entries(cache_path)[0] / name)
    # The first run finds a flipped bit when it uses the sample, and decodes that one again; the
    # second run writes a new entry.
    for _ in range(2):
        samples = build_samples(dataset)
        assert all((a.image == b).all() for a, b in zip(samples, right, strict=True))
    before = len(decoded)
    assert before > 4
    samples = build_samples(dataset)
    assert all((a.image == b).all() for a, b in zip(samples, right, strict=True))
    assert len(decoded) == before


def test_samples_are_not_kept_if_a_file_changes_while_they_are_decoded(
    tmp_path: Path, cache_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, warnings = write_random_dataset(tmp_path / "data"), []
    read_sample = cache.read_sample

    def change_another_mask(pair: Pair, dataset: Dataset) -> Any:
        if pair == dataset.pairs[3]:
            # Replaced as a whole: another thread may be reading it.
            PIL.Image.fromarray(np.full((8, 12), 2, np.uint8)).save(tmp_path / "changed.png")
            (tmp_path / "changed.png").replace(dataset.pairs[0].mask)
        return read_sample(pair, dataset)

    monkeypatch.setattr(cache, "read_sample", change_another_mask)
    assert (build_samples(dataset, warn=warnings.append)[0].label == 2).all()
    assert list_cache_entries(cache_path) == []
    assert "an image or mask was changed while useg read the data" in warnings[0]


def test_an_unreadable_image_leaves_nothing_in_the_cache(tmp_path: Path, cache_path: Path) -> None:
    dataset = write_random_dataset(tmp_path / "data")
    dataset.pairs[2].image.write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"2.png' is not an image"):
        build_samples(dataset)
    dataset.pairs[2].image.unlink()
    with pytest.raises(UsageError, match=r"2.png' does not exist"):
        build_samples(dataset)
    assert [path.name for path in cache_path.iterdir()] == []


def test_a_data_set_above_the_limit_goes_to_a_temporary_file(
    tmp_path: Path, cache_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, warnings = write_random_dataset(tmp_path / "data"), []
    monkeypatch.setenv("USEG_CACHE_GB", "0.000001")
    assert len(build_samples(dataset, warn=warnings.append)) == 4
    assert list_cache_entries(cache_path) == []
    assert len(warnings) == 1
    assert (
        "needs more than the 9.99e-07 GB that the cache may have; USEG_CACHE_GB=50 allows 50"
        in warnings[0]
    )
    monkeypatch.setenv("USEG_CACHE_GB", "much")
    with pytest.raises(SettingsError, match=r"USEG_CACHE_GB is 'much'; set a number above 0"):
        build_samples(dataset)


def raise_disk_full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_without_disk_space_samples_stay_in_memory(
    tmp_path: Path, cache_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, warnings = write_random_dataset(tmp_path / "data"), []
    cache_path.write_text("a file is in the way")
    right = [sample.image.copy() for sample in build_samples(dataset, warn=warnings.append)]
    assert len(warnings) == 1
    assert str(cache_path) in warnings[0]
    assert "a temporary file, for this run only" in warnings[0]
    monkeypatch.setattr(tempfile, "TemporaryFile", raise_disk_full)
    for sample, image in zip(build_samples(dataset, warn=warnings.append), right, strict=True):
        assert (sample.image == image).all()
    assert warnings[2].endswith("(No space left on device); the decoded images stay in memory")


def test_a_full_disk_leaves_nothing_in_the_cache(
    tmp_path: Path, cache_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(cache_folder, "write_arrays", raise_disk_full)
    assert len(build_samples(write_random_dataset(tmp_path / "data"), warn=warnings.append)) == 4
    assert "(No space left on device)" in warnings[0]
    assert list(cache_path.glob("[.s]*")) == []


def test_a_cache_that_is_off_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USEG_CACHE", "off")
    monkeypatch.setattr(cache_folder, "create_cached", raise_disk_full)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert len(build_samples(write_random_dataset(tmp_path / "data"))) == 4
    assert not (tmp_path / "xdg").exists()


def test_many_samples_need_few_open_files(tmp_path: Path, cache_path: Path) -> None:
    dataset = write_random_dataset(tmp_path / "data", 2)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    samples = build_samples(replace(dataset, pairs=dataset.pairs * 300))
    assert len(list(samples)) == 600
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    begun: list[int] = []
    results = machine.in_parallel(begun.append, range(10_000))
    next(results)
    time.sleep(0.05)
    assert len(begun) < 1000
    results.close()  # type: ignore[attr-defined]
