"""The cache holds what the files hold, at the working size; once made it is found again, whole or not at all, until a file changes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from useg import machine
from useg.classes import ClassTable
from useg.data import cache, cache_folder
from useg.data.cache import Samples, build_cache
from useg.data.dataset import Dataset, Instances, Pair
from useg.errors import UsageError
from useg.models.geometry import WorkingSize, fit_bands
from useg.training.batches import class_shares, pixel_statistics


def make_set(folder: Path, count: int = 4, size: tuple[int, int] = (12, 8)) -> Dataset:
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True, parents=True)
    dataset = listed(folder, count)
    for pair in dataset.pairs:
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(pair.image)
        Image.fromarray(rng.integers(0, 3, (size[1], size[0]), np.uint8)).save(pair.mask)
    return dataset


def listed(folder: Path, count: int = 4) -> Dataset:
    """What :func:`make_set` made."""
    pairs = tuple(
        Pair(folder / f"{k}.png", folder / f"{k}_mask.png", "train") for k in range(count)
    )
    return Dataset(folder, "folders", pairs, ClassTable(("a", "b", "c")))


def make_tiffs(folder: Path, pictures: list[np.ndarray]) -> Dataset:
    """Pictures (H, W, C) of any number type, every label 0."""
    pairs = []
    for k, picture in enumerate(pictures):
        pairs.append(Pair(folder / f"{k}.tif", folder / f"{k}.png", "train"))
        tifffile.imwrite(
            pairs[-1].image,
            picture,
            photometric="minisblack",
            planarconfig="contig" if picture.shape[2] > 1 else None,
        )
        Image.fromarray(np.zeros(picture.shape[:2], np.uint8)).save(pairs[-1].mask)
    return Dataset(folder, "folders", tuple(pairs), ClassTable(("a",)))


def build(
    dataset: Dataset,
    channels: int = 3,
    pixels: str = "uint8",
    working: WorkingSize | None = None,
    **options: Any,
) -> Samples:
    return build_cache(
        dataset, dataset.pairs, working or WorkingSize(), channels, pixels, **options
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("USEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures decoded so far."""
    names: list[str] = []

    def counting(pair: Pair, dataset: Dataset) -> Any:
        names.append(pair.image.name)
        return read_sample(pair, dataset)

    read_sample = cache.read_sample
    monkeypatch.setattr(cache, "read_sample", counting)
    return names


def sets(folder: Path) -> list[Path]:
    return sorted(folder.glob("set-*"))


def same(a: Samples, b: Samples) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x.image, y.image)
        and np.array_equal(x.label, y.label)
        and np.array_equal(x.native, y.native)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("place", ["cache", "off"])
def test_holds_the_files_in_order(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USEG_CACHE", place if place == "off" else str(tmp_path / place))
    dataset = make_set(tmp_path / "data", 9)
    done: list[int] = []
    samples = build(dataset, native=True, progress=done.append)
    assert done == list(range(1, 10))
    assert len(samples) == 9
    for pair, sample in zip(dataset.pairs, samples, strict=True):
        assert (sample.image == np.asarray(Image.open(pair.image))).all()
        assert (sample.label == np.asarray(Image.open(pair.mask))).all()
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


def test_reduces_to_the_working_size_but_keeps_the_native_label(
    tmp_path: Path, folder: Path
) -> None:
    for sample in build(make_set(tmp_path), working=WorkingSize((6, 4)), native=True):
        assert sample.image.shape == (4, 6, 3)
        assert sample.label.shape == (4, 6)
        assert sample.native is not None
        assert sample.native.shape == (8, 12)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_other_number_types_and_sizes_that_differ(dtype: str, tmp_path: Path, folder: Path) -> None:
    pictures = [
        np.random.default_rng(k).integers(0, 60000, (5 + k, 7, 2)).astype(dtype) for k in range(4)
    ]
    for _ in range(2):
        for picture, sample in zip(
            pictures, build(make_tiffs(tmp_path, pictures), 2, dtype), strict=True
        ):
            assert sample.image.dtype == dtype
            assert (sample.image == picture).all()
            assert sample.native is None


def test_the_second_epoch_and_the_second_run_decode_nothing(
    tmp_path: Path, folder: Path, decoded: list[str]
) -> None:
    dataset = make_set(tmp_path / "data")
    first = build(dataset)
    for _ in range(2):
        assert len(list(first)) == 4
    done: list[int] = []
    assert same(build(dataset, progress=done.append), first)
    assert len(decoded) == 4
    assert done == []
    moved = shutil.copytree(tmp_path / "data", tmp_path / "elsewhere")
    pairs = tuple(Pair(moved / pair.image.name, moved / pair.mask.name) for pair in dataset.pairs)
    assert same(build(replace(dataset, root=moved, pairs=pairs)), first), (
        "content counts, not names"
    )
    assert len(decoded) == 4


@pytest.mark.parametrize(
    "what", ["image", "mask", "size", "native", "classes", "order", "fewer", "decoder"]
)
def test_whatever_decides_the_pixels_is_noticed(
    what: str, tmp_path: Path, folder: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, options = make_set(tmp_path), {}
    build(dataset)
    if what == "image":
        shutil.copy(dataset.pairs[0].image, dataset.pairs[1].image)
    elif what == "mask":
        Image.fromarray(np.full((8, 12), 2, np.uint8)).save(dataset.pairs[3].mask)
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
    again = build(dataset, **options)
    assert len(decoded) == 4 + len(dataset.pairs)
    monkeypatch.setenv("USEG_CACHE", "off")
    assert same(again, build(dataset, **options))


def test_single_masks_and_pages_count_too(tmp_path: Path, folder: Path, decoded: list[str]) -> None:
    dataset = make_set(tmp_path / "data", 2)
    things = [tmp_path / f"thing{k}.png" for k in range(2)]
    for path in things:
        Image.fromarray(np.eye(8, 12, dtype=np.uint8)).save(path)
    pair = Pair(dataset.pairs[0].image, tmp_path, truth=Instances(tuple(things)))
    dataset = replace(dataset, pairs=(pair,), classes=ClassTable(("rest", "thing")))
    build(dataset)
    build(dataset)
    assert len(decoded) == 1
    Image.fromarray(np.ones((8, 12), np.uint8)).save(things[1])
    assert build(dataset)[0].label.all()
    stack = tmp_path / "stack.tif"
    tifffile.imwrite(
        stack, np.arange(2 * 8 * 12, dtype=np.uint8).reshape(2, 8, 12), photometric="minisblack"
    )
    masks = tmp_path / "masks.tif"
    tifffile.imwrite(masks, np.zeros((2, 8, 12), np.uint8), photometric="minisblack")
    pages = replace(dataset, pairs=tuple(Pair(stack, masks, page=page) for page in range(2)))
    for _ in range(2):
        assert [sample.image[0, 0, 0] for sample in build(pages, 1)] == [0, 96]
    for k in range(2):
        assert build(replace(pages, pairs=pages.pairs[k : k + 1]), 1)[0].image[0, 0, 0] == 96 * k


def test_an_edit_within_one_tick_of_the_clock_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, memo = tmp_path / "file", tmp_path / "memo" / "files.json"
    path.write_bytes(b"one")
    at = path.stat().st_mtime_ns
    first = cache_folder.compute_digests([path], memo)
    assert not memo.exists(), "a file that was just written may be written again without a trace"
    monkeypatch.setattr(
        cache_folder, "MIN_FILE_AGE_NANOSECONDS", -(10**12)
    )  # as if it had lain there for long
    assert cache_folder.compute_digests([path], memo) == first
    assert memo.exists()
    read: list[str] = []
    digest = cache_folder.hashlib.file_digest
    monkeypatch.setattr(
        cache_folder.hashlib,
        "file_digest",
        lambda file, name: read.append(file.name) or digest(file, name),
    )
    assert cache_folder.compute_digests([path, path], memo) == first
    assert read == [], "a settled file is not read again"
    for content in (b"four", b"two"):
        path.write_bytes(content)
        os.utime(path, ns=(at, at))
        assert cache_folder.compute_digests([path], memo) != first
    assert len(read) == 2
    memo.write_text('{"a": 1')
    assert (
        cache_folder.compute_digests([path, tmp_path / "none"], memo)[tmp_path / "none"]
        == cache_folder.UNREADABLE_FILE_DIGEST
    )


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[200] ^= 64
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["samples.bin", "ledger.npz"])
@pytest.mark.parametrize("harm", [truncate, empty, flip, Path.unlink])
def test_damage_is_noticed_and_mended(
    name: str, harm: Callable[[Path], None], tmp_path: Path, folder: Path, decoded: list[str]
) -> None:
    dataset = make_set(tmp_path / "data")
    right = [sample.image.copy() for sample in build(dataset)]
    harm(sets(folder)[0] / name)
    for _ in range(
        2
    ):  # a flipped bit shows when its picture is looked at; what is looked at is right all the same, and the next run builds anew
        assert all(
            (sample.image == image).all()
            for sample, image in zip(build(dataset), right, strict=True)
        )
    before = len(decoded)
    assert before > 4
    assert all(
        (sample.image == image).all() for sample, image in zip(build(dataset), right, strict=True)
    )
    assert len(decoded) == before


def test_a_picture_changed_while_the_others_are_read_is_not_kept(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, said = make_set(tmp_path / "data"), []
    read_sample = cache.read_sample

    def meddling(pair: Pair, dataset: Dataset) -> Any:
        if pair == dataset.pairs[3]:
            Image.fromarray(np.full((8, 12), 2, np.uint8)).save(dataset.pairs[0].mask)
        return read_sample(pair, dataset)

    monkeypatch.setattr(cache, "read_sample", meddling)
    assert (build(dataset, say=said.append)[0].label == 2).all()
    assert sets(folder) == []
    assert "a picture was changed while the pictures were read" in said[0]


def test_a_damaged_picture_is_one_sentence_and_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    dataset = make_set(tmp_path / "data")
    dataset.pairs[2].image.write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"2.png' is not a picture"):
        build(dataset)
    dataset.pairs[2].image.unlink()
    with pytest.raises(UsageError, match=r"2.png' does not exist"):
        build(dataset)
    assert [path.name for path in folder.iterdir()] == []


BUILDER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_cache import build, listed, cache
dataset = listed(Path({data!r}))
if {hang}:
    read_sample = cache.read_sample
    def slow(pair, dataset):
        if pair == dataset.pairs[-1]:
            print("half", flush=True)
            sys.stdin.read()
        return read_sample(pair, dataset)
    cache.read_sample = slow
sys.stdin.readline()
print(int(sum(sample.image.sum() for sample in build(dataset))))
"""


def builder(tmp_path: Path, hang: bool = False) -> subprocess.Popen[str]:
    code = BUILDER.format(tests=str(Path(__file__).parent), data=str(tmp_path / "data"), hang=hang)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_two_may_build_at_once_and_what_a_killed_one_left_is_cleared(
    tmp_path: Path, folder: Path, decoded: list[str]
) -> None:
    dataset = make_set(tmp_path / "data")
    alive, dead = builder(tmp_path, hang=True), builder(tmp_path, hang=True)
    for process in (alive, dead):
        assert process.stdin
        assert process.stdout
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "half\n"
    dead.kill()
    dead.communicate()
    assert len(list(folder.glob(".making-*"))) == 2
    samples = build(dataset)
    assert len(decoded) == 4, "half of a set was not taken for a set"
    assert len(list(folder.glob(".making-*"))) == 1, "the living one's is left alone"
    total = int(sum(sample.image.sum() for sample in samples))
    assert alive.communicate()[0] == f"{total}\n"
    assert len(sets(folder)) == len(list(folder.glob("[.s]*"))) == 1


def test_the_longest_unused_goes_first(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = [make_set(tmp_path / f"data{k}", size=(12 + k, 8)) for k in range(3)]
    (folder / "somebody's").mkdir(parents=True)
    (folder / "somebody's" / "file").write_bytes(bytes(10**6))
    build(datasets[0])
    one = sum(file.stat().st_size for file in sets(folder)[0].iterdir())
    monkeypatch.setenv("USEG_CACHE_GB", str(2.5 * one / 2**30))
    build(datasets[1])
    oldest = {path: -k for k, path in enumerate(sets(folder))}
    for path, age in oldest.items():
        os.utime(path, (1000 + age, 1000 + age))
    kept = set(sets(folder))
    first = build(datasets[0])  # used: now the newest
    build(datasets[2])
    assert len(sets(folder)) == 2
    assert len(kept & set(sets(folder))) == 1
    assert (folder / "somebody's" / "file").exists()
    assert len([sample.image.sum() for sample in first]) == 4
    calls: list[int] = []
    build(datasets[0], progress=calls.append)
    assert calls == []


def test_a_set_larger_than_all_that_may_be_kept_goes_to_scratch(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, said = make_set(tmp_path / "data"), []
    monkeypatch.setenv("USEG_CACHE_GB", "0.000001")
    assert len(build(dataset, say=said.append)) == 4
    assert sets(folder) == []
    assert len(said) == 1
    assert "needs more than the 9.99e-07 GB that may be kept; USEG_CACHE_GB=50 allows 50" in said[0]
    monkeypatch.setenv("USEG_CACHE_GB", "much")
    with pytest.raises(UsageError, match=r"USEG_CACHE_GB is 'much'; set a number above 0"):
        build(dataset)


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_without_room_in_the_cache_and_then_anywhere(
    tmp_path: Path, folder: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, said = make_set(tmp_path / "data"), []
    folder.write_text("a file is in the way")
    right = [sample.image.copy() for sample in build(dataset, say=said.append)]
    assert len(said) == 1
    assert str(folder) in said[0]
    assert "scratch files, for this run alone" in said[0]
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    for sample, image in zip(build(dataset, say=said.append), right, strict=True):
        assert (sample.image == image).all()
    assert said[2].endswith("(No space left on device): the decoded pictures stay in memory")


def test_a_full_disk_is_noticed_while_writing(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(cache_folder, "write_arrays", full)
    assert len(build(make_set(tmp_path / "data"), say=said.append)) == 4
    assert "(No space left on device)" in said[0]
    assert list(folder.glob("[.s]*")) == []


def test_off_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USEG_CACHE", "off")
    monkeypatch.setattr(cache_folder, "create_cached", full)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert len(build(make_set(tmp_path / "data"))) == 4
    assert not (tmp_path / "xdg").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other places")
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"XDG_CACHE_HOME": "/x"}, "/x/useg"),
        ({"XDG_CACHE_HOME": "relative"}, "/me/.cache/useg"),
        ({"XDG_CACHE_HOME": ""}, "/me/.cache/useg"),
        ({}, "/me/.cache/useg"),
        ({"USEG_CACHE": "~/here", "XDG_CACHE_HOME": "/x"}, "/me/here"),
        ({"USEG_CACHE": "Off"}, None),
    ],
)
def test_the_cache_folder_is_where_the_environment_says(
    variables: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("USEG_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert cache_folder.find_cache_folder() == (None if expected is None else Path(expected))


def test_many_samples_need_few_files_and_results_do_not_pile_up(
    tmp_path: Path, folder: Path
) -> None:
    dataset = make_set(tmp_path / "data", 2)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    samples = build(replace(dataset, pairs=dataset.pairs * 300))
    assert len(list(samples)) == 600
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    begun: list[int] = []
    results = machine.in_parallel(begun.append, range(10_000))
    next(results)
    time.sleep(0.05)
    assert len(begun) < 1000
    results.close()


def test_statistics_and_shares_equal_numpy(tmp_path: Path) -> None:
    samples = build(make_set(tmp_path))
    pixels = np.concatenate([sample.image.reshape(-1, 3) for sample in samples]).astype(np.float64)
    mean, std = pixel_statistics(samples)
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-9)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-9)
    labels = np.concatenate([sample.label.ravel() for sample in samples])
    np.testing.assert_allclose(class_shares(samples), [(labels == k).mean() for k in range(3)])


def test_a_constant_band_has_deviation_one(tmp_path: Path) -> None:
    dataset = make_set(tmp_path, 1)
    Image.fromarray(np.full((8, 12, 3), 7, np.uint8)).save(dataset.pairs[0].image)
    assert pixel_statistics(build(dataset))[1] == [1, 1, 1]


@pytest.mark.parametrize(("dtype", "unit"), [("uint16", 1.0), ("float32", 1.0), ("float32", 1e-9)])
def test_hot_pixels_do_not_ruin_the_statistics(dtype: str, unit: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clean = [(rng.normal(1000, 100, (40, 50, 2)) * unit).astype(dtype) for _ in range(3)]
    hot = [picture.copy() for picture in clean]
    for picture in hot:
        picture[::20, 7] = 65535 * unit
    for pictures in (clean, hot):
        mean, std = pixel_statistics(build(make_tiffs(tmp_path, pictures), 2, dtype))
        np.testing.assert_allclose(mean, [1000 * unit] * 2, rtol=0.01)
        np.testing.assert_allclose(std, [100 * unit] * 2, rtol=0.05)


def test_rare_bright_things_on_a_constant_ground_still_count(tmp_path: Path) -> None:
    picture = np.zeros((100, 100, 1), np.uint16)
    picture[:6, :5] = 30000
    assert pixel_statistics(build(make_tiffs(tmp_path, [picture]), 1, "uint16"))[1][0] > 1000


def test_nan_and_infinity_are_replaced_in_training_and_prediction_alike(tmp_path: Path) -> None:
    image = np.arange(24, dtype=np.float32).reshape(3, 4, 2)
    image[0, 0] = np.nan
    image[1, 1, 0], image[2, 2, 1] = np.inf, -np.inf
    image[:, 3, 1] = np.nan
    band = image[..., 0][np.isfinite(image[..., 0])]
    fitted = fit_bands(image, 2, "float32", "x.tif")
    assert np.isfinite(fitted).all()
    assert (fitted[0, 0, 0], fitted[1, 1, 0]) == (np.float32(band.mean()), band.max())
    assert fitted[2, 2, 1] == np.nanmin(image[..., 1][np.isfinite(image[..., 1])])
    known = np.isfinite(image)
    assert (fitted[known] == image[known]).all()
    assert not fit_bands(np.full((2, 2, 1), np.nan, np.float32), 1, "float32", "x.tif").any()
    sample = build(make_tiffs(tmp_path, [image]), 2, "float32", WorkingSize(scale=2.0))[0]
    assert np.isfinite(sample.image).all(), "before resizing, which would spread it"
    assert np.isfinite(pixel_statistics(build(make_tiffs(tmp_path, [image]), 2, "float32"))).all()


def test_bands_are_fitted_or_refused() -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    assert (fit_bands(grey, 3, "uint8", "x.png") == np.repeat(grey, 3, 2)).all()
    with pytest.raises(UsageError, match=r"x.png has 1 bands, but 4 are needed"):
        fit_bands(grey, 4, "uint8", "x.png")
    with pytest.raises(UsageError, match=r"x.png holds uint8 pixels, but .* uint16"):
        fit_bands(grey, 1, "uint16", "x.png")
