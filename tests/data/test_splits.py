"""Official splits are kept, films are cut into blocks, groups stay together, the rest is random."""

import itertools
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_data import (
    WORDS,
    blob_image,
    dataset_of_names,
    film_names,
    splits_of,
    write_blob_dataset,
    write_folders,
    write_image,
    write_mask,
)

from useg.classes import CARLA
from useg.data import duplicates
from useg.data.dataset import Dataset, Pair
from useg.data.layouts import find_dataset
from useg.data.split_files import read_split_csv, write_split_csv
from useg.data.splits import (
    are_numbered,
    assign_splits,
    choose_holdout,
    find_sequences,
    group_by_name,
    keep_every,
)
from useg.errors import DataError, SettingsError

HASHED_NAMES = [
    "00ae65c1c663",
    "0121d6759c5a",
    "01d44a26f689",
    "0280fa8f60f6",
    "02903040e19d",
    "03398329ced0",
    "03b9306f44e9",
    "03f583ec5018",
]
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def blob_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Twenty images under names without numbers, two of them near duplicates; a rare class."""
    monkeypatch.setenv("USEG_CACHE", str(tmp_path / "cache"))
    return write_blob_dataset(tmp_path)


def test_images_called_test_are_for_prediction_if_none_with_a_mask_is(tmp_path: Path):
    write_folders(tmp_path, names=("a_1", "a_2"))
    write_image(tmp_path / "images" / "test_a_3.jpg")
    assert any("left for prediction" in note for note in find_dataset(tmp_path).notes)
    write_image(tmp_path / "images" / "a_4.jpg")
    with pytest.raises(DataError, match=r"1 image without a mask .*a_4.jpg"):
        find_dataset(tmp_path)
    (tmp_path / "images" / "a_4.jpg").rename(tmp_path / "images" / "test_a_4.jpg")
    write_mask(tmp_path / "masks" / "test_a_4.png")
    with pytest.raises(DataError, match=r"1 image without a mask .*test_a_3.jpg"):
        find_dataset(tmp_path)


def test_a_stack_of_30_gives_6_at_the_end_and_a_small_gap():
    assigned = assign_splits(dataset_of_names(*(str(k) for k in range(30))))
    assert splits_of(assigned) == ["train"] * 22 + ["gap"] * 2 + ["val"] * 6
    assert (
        assigned.splits_by == "blocks: the last 20 % of the sequence, 2 images before it left out"
    )


def test_a_drive_of_204_gives_41_at_the_end_and_a_gap_of_10():
    assert Counter(splits_of(assign_splits(dataset_of_names(*film_names(204, "000_"))))) == {
        "train": 153,
        "gap": 10,
        "val": 41,
    }


def test_the_gap_is_at_most_10_and_at_least_1():
    assert Counter(splits_of(assign_splits(dataset_of_names(*film_names(1000)))))["gap"] == 10
    assert Counter(splits_of(assign_splits(dataset_of_names(*film_names(8)))))["gap"] == 1


def test_every_long_sequence_is_cut():
    assigned = assign_splits(dataset_of_names(*film_names(60, "a_"), *film_names(40, "b_f", 30)))
    assert Counter(pair.image.stem[0] for pair in assigned.of("val")) == {"a": 12, "b": 8}
    assert "each of 2 sequences" in assigned.splits_by
    assert (
        "each of 6 sequences"
        in assign_splits(
            dataset_of_names(*(name for letter in "abcdef" for name in film_names(60, letter)))
        ).splits_by
    )


def test_many_short_sequences_are_held_out_whole():
    names = [name for k in range(12) for name in film_names(10, f"{'abcdefghijkl'[k]}_")]
    assigned = assign_splits(dataset_of_names(*names))
    by_sequence = {
        letter: {pair.split for pair in assigned.pairs if pair.image.stem.startswith(letter)}
        for letter in "abcdefghijkl"
    }
    assert all(len(splits) == 1 for splits in by_sequence.values())
    assert 10 <= len(assigned.of("val")) <= 40
    assert "short sequences held out whole" in assigned.splits_by


def test_names_without_numbers_are_split_by_hash_and_adding_images_moves_none():
    few, more = (
        assign_splits(dataset_of_names(*WORDS[:15])),
        assign_splits(dataset_of_names(*WORDS)),
    )
    assert few.splits_by == "random, by a hash of the name"
    assert [pair.split for pair in more.pairs][:15] == splits_of(few)
    assert {"train", "val"} == set(splits_of(more))


def test_hashed_names_are_no_film():
    assert not are_numbered(dataset_of_names(*HASHED_NAMES).pairs)


def test_running_numbers_are_split_at_random_only_on_request():
    assigned = splits_of(assign_splits(dataset_of_names(*film_names(50))))
    assert assigned == sorted(assigned, key=["train", "gap", "val"].index)
    scattered = splits_of(assign_splits(dataset_of_names(*film_names(50)), "random"))
    assert scattered != sorted(scattered), "on request, it is random"


def test_blocks_on_names_without_numbers_take_the_end():
    assert (
        splits_of(assign_splits(dataset_of_names(*WORDS), "blocks"))
        == ["train"] * 15 + ["gap"] + ["val"] * 4
    )
    assert splits_of(assign_splits(dataset_of_names(*WORDS[:4]), "blocks")) == ["train"] * 2 + [
        "gap",
        "val",
    ]


def test_official_splits_are_kept():
    given_splits = {"0000": "train", "0001": "val", "0002": "test"}
    assigned = assign_splits(dataset_of_names(*film_names(3), splits=given_splits))
    assert splits_of(assigned) == ["train", "val", "test"]
    assert assigned.splits_by == "official"
    assert splits_of(
        assign_splits(dataset_of_names(*film_names(3), splits=given_splits), "official")
    ) == [
        "train",
        "val",
        "test",
    ]


def test_val_is_taken_from_train_if_there_is_none():
    splits = dict.fromkeys(film_names(40), "train") | dict.fromkeys(film_names(9, "t"), "test")
    assigned = assign_splits(dataset_of_names(*film_names(40), *film_names(9, "t"), splits=splits))
    assert Counter(splits_of(assigned)) == {"train": 30, "gap": 2, "val": 8, "test": 9}
    assert assigned.splits_by == (
        "official; val taken from train: blocks: the last 20 % of the sequence, 2 images "
        "before it left out"
    )


@pytest.mark.parametrize("mode", ["blocks", "random"])
def test_official_test_images_are_never_trained_on(mode):
    splits = dict.fromkeys(film_names(40), "train") | dict.fromkeys(film_names(9, "t"), "test")
    assigned = assign_splits(
        dataset_of_names(*film_names(40), *film_names(9, "t"), splits=splits), mode
    )
    assert {pair.image.stem for pair in assigned.of("test")} == set(film_names(9, "t"))
    assert "val" in splits_of(assigned)


@pytest.mark.parametrize(
    ("names", "splits", "mode", "sentence"),
    [
        ("a", {}, "auto", "there is 1 image for training and validation, but each of them needs"),
        ("", {}, "auto", "there are no images for training and validation; add images"),
        ("ab", {"a": "test", "b": "test"}, "auto", "all 2 images with masks are in the split test"),
        ("ab", {"a": "val", "b": "test"}, "auto", "are in the split test or val, so none is left"),
        ("ab", {"a": "val", "b": "val"}, "auto", "images with masks, set data.split to blocks"),
        ("ab", {}, "official", r"'/data' has no official splits; choose another split, such as"),
        (
            "ab",
            {"a": "train"},
            "auto",
            r"1 of 2 images have no split, such as '/data/images/b.png', but the others have one",
        ),
    ],
)
def test_data_that_cannot_be_split_is_refused(names, splits, mode, sentence):
    with pytest.raises(DataError, match=sentence):
        assign_splits(dataset_of_names(*names, splits=splits), mode)


def test_an_unknown_mode_and_an_impossible_share_are_refused():
    modes = "auto, blocks, groups, official, random, stratified"
    sentence = f"the split mode 'block' is not known; choose one of {modes}; did you mean 'blocks'"
    with pytest.raises(SettingsError, match=sentence):
        assign_splits(dataset_of_names("a", "b"), "block")
    sentence = "held out for validation is 1.5, but it must be between 0 and 1; 0.2 is usual"
    with pytest.raises(SettingsError, match=sentence):
        assign_splits(dataset_of_names("a", "b"), holdout=1.5)


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "a_", "b", "walk"]), st.integers(0, 300)),
        min_size=2,
        unique=True,
    ),
    st.sampled_from(["auto", "blocks", "random", "stratified"]),
    st.floats(0.01, 0.9),
)
def test_there_are_always_images_for_training_and_validation(numbered, mode, holdout):
    names = [f"{prefix}{number}" for prefix, number in numbered]
    assigned = assign_splits(dataset_of_names(*names), mode, holdout)
    shuffled = random.Random(0).sample(names, len(names))
    again = assign_splits(dataset_of_names(*shuffled), mode, holdout)
    assert dict(zip(shuffled, splits_of(again), strict=True)) == dict(
        zip(names, splits_of(assigned), strict=True)
    )
    assert again.splits_by == assigned.splits_by
    assert assigned.of("train")
    assert assigned.of("val")
    assert len(assigned.pairs) == len(numbered)
    assert set(splits_of(assigned)) <= {"train", "val", "gap"}


@settings(max_examples=40)
@given(st.integers(4, 400), st.floats(0.05, 0.5))
def test_in_a_film_no_validation_frame_touches_a_training_frame(count, holdout):
    assigned = splits_of(assign_splits(dataset_of_names(*film_names(count)), "blocks", holdout))
    assert not any({a, b} == {"train", "val"} for a, b in itertools.pairwise(assigned))


def test_one_film_in_two_split_folders_is_one_sequence():
    root = Path("/data")
    pairs = [
        Pair(root / folder / f"A_{k}.png", root / f"{folder}annot" / f"A_{k}.png")
        for folder, k in (("train", 1), ("val", 2), ("train", 3))
    ]
    assert [[pair.image.stem for pair in group] for group in find_sequences(pairs)] == [
        ["A_1", "A_2", "A_3"]
    ]


PATTERNS = {
    "P{a:02}_slice_{b:03}": "P03",
    "images/patient{a}/{b:04}": "patient3",
    "tile_{a}_{c}_{b}": "tile_3",
    "s{a:02}t{b:02}": "s03",
    "TCGA-A{a}-{c}-{b}": "TCGA_A3",
    "v{a:02}#{b}": "v03",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_names_with_numbers_show_groups(pattern):
    names = [pattern.format(a=a, b=b, c=(a * 7 + b) % 5) for a in range(3, 11) for b in range(6)]
    groups = group_by_name(names)
    assert groups
    assert len(set(groups)) == 8
    assert groups[0].rpartition("/")[2].replace("/", "_") in (
        PATTERNS[pattern],
        f"images_{PATTERNS[pattern]}",
    )
    assert all(len(set(groups[k : k + 6])) == 1 for k in range(0, 48, 6))


@pytest.mark.parametrize(
    "names",
    [
        [f"frame_{k:04}" for k in range(60)],
        [f"{k:04}" for k in range(60)],
        [f"{kind}_{k}" for kind in ("cat", "dog", "cow", "elk", "yak", "emu") for k in range(20)],
        [f"{k // 30}_{k % 30}" for k in range(60)],
        [f"{k:06}_{k * 7919}" for k in range(60)],
        HASHED_NAMES,
        WORDS,
        [],
    ],
)
def test_other_names_show_no_groups(names):
    assert group_by_name(names) is None


@settings(max_examples=30)
@given(
    st.integers(5, 20), st.integers(2, 8), st.floats(0.05, 0.6), st.sampled_from(["auto", "groups"])
)
def test_no_group_is_on_both_sides(num_groups, size, holdout, mode):
    names = [f"P{a:02}_slice_{b:03}" for a in range(num_groups) for b in range(size)]
    assigned = assign_splits(dataset_of_names(*names), mode, holdout)
    sides = {}
    for pair in assigned.pairs:
        sides.setdefault(pair.image.stem[:3], set()).add(pair.split)
    assert all(len(side) == 1 for side in sides.values())
    assert set(splits_of(assigned)) == {"train", "val"}
    assert assigned.splits_by.startswith("groups: ")
    assert abs(len(assigned.of("val")) / len(names) - holdout) <= 1 / num_groups + 0.2 * holdout


def test_groups_are_refused_where_there_are_none():
    with pytest.raises(
        DataError,
        match=(
            r"neither the names nor the pixels of the 20 images in '/data' show groups; name the "
            r"images"
        ),
    ):
        assign_splits(dataset_of_names(*WORDS), "groups")


@given(st.integers(0, 2**32), st.integers(2, 60), st.integers(0, 6), st.floats(0.05, 0.6))
def test_some_groups_are_held_out_but_never_all(seed, count, num_classes, holdout):
    rng = np.random.default_rng(seed)
    contents = rng.integers(0, 100, (count, num_classes)) * (rng.random((count, num_classes)) < 0.3)
    held = choose_holdout(contents, rng.integers(1, 9, count), rng.random(count), holdout)
    assert 0 < held.sum() < count


def rare_classes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A common class, and three of which each is in 3 pictures only."""
    rng = np.random.default_rng(seed)
    contents = np.zeros((count, 4), np.int64)
    contents[:, 0] = 1000
    for k in range(1, 4):
        contents[rng.choice(count, 3, replace=False), k] = rng.integers(20, 60, 3)
    return contents, rng.random(count)


@pytest.mark.parametrize("seed", range(20))
def test_rare_classes_are_on_both_sides_and_an_added_image_moves_few(seed):
    contents, draws = rare_classes(100, seed)
    held = choose_holdout(contents, np.ones(100, np.int64), draws, 0.2)
    assert (contents[held] > 0).any(0).all()
    assert (contents[~held] > 0).any(0).all()
    assert 16 <= held.sum() <= 25
    fewer = choose_holdout(contents[:99], np.ones(99, np.int64), draws[:99], 0.2)
    assert (fewer != held[:99]).sum() <= 3


def test_random_splits_alone_miss_rare_classes():
    missed = 0
    for seed in range(20):
        contents, draws = rare_classes(100, seed)
        missed += not (contents[draws < 0.2] > 0).any(0).all()
    assert missed > 10


def test_near_duplicates_stay_together_and_rare_classes_are_divided(blob_dataset):
    for holdout in (0.1, 0.2, 0.3, 0.5):
        assigned = assign_splits(blob_dataset, "auto", holdout)
        split = {pair.image.stem: pair.split for pair in assigned.pairs}
        assert split["ash"] == split["kale"]
        assert {split["elm"], split["fir"], split["iris"]} == {"train", "val"}
        assert "2 near duplicates kept together" in assigned.splits_by
    assert assign_splits(blob_dataset, "groups").splits_by.endswith(
        "of 19 held out whole, by their pixels: near duplicates stay together"
    )


def test_images_are_compared_once_and_only_if_they_are_few(blob_dataset, monkeypatch):
    first = assign_splits(blob_dataset)

    def fail(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(duplicates, "read_label", fail)
    monkeypatch.setattr(duplicates, "read_pair_image", fail)
    assert assign_splits(blob_dataset) == first
    with pytest.raises(AssertionError, match="decoded again"):
        assign_splits(replace(blob_dataset, pairs=blob_dataset.pairs[1:]))
    monkeypatch.setattr(duplicates, "MAX_COMPARED_PIXELS", 19 * 64 * 96)
    large = assign_splits(
        replace(
            blob_dataset,
            pairs=blob_dataset.pairs[:15] + blob_dataset.pairs[16:] + blob_dataset.pairs[15:16],
        )
    )
    assert large.splits_by == (
        "random, by a hash of the name; too many images to compare by default (data.split = "
        "stratified compares them)"
    )
    assert assign_splits(blob_dataset, "stratified") == first, "on request, they are compared"
    monkeypatch.undo()
    monkeypatch.setattr(duplicates, "MAX_COMPARED_PAIRS", 19)
    assert "too many images to compare" in assign_splits(blob_dataset).splits_by


def test_a_damaged_image_does_not_prevent_a_split(blob_dataset):
    blob_dataset.pairs[3].image.write_bytes(b"no picture")
    blob_dataset.pairs[4].mask.unlink()
    assert {"train", "val"} == set(splits_of(assign_splits(blob_dataset)))


def test_a_film_without_numbered_names_is_cut_into_blocks(blob_dataset):
    panorama = blob_image(0, 50)
    for k, pair in enumerate(blob_dataset.pairs):
        PIL.Image.fromarray(panorama[:, k : k + 96]).save(pair.image)
    assigned = assign_splits(blob_dataset)
    assert splits_of(assigned) == ["train"] * 15 + ["gap"] + ["val"] * 4
    assert assigned.splits_by.endswith("(most of the images are near duplicates, as in a video)")


def test_pages_of_a_stack_are_a_sequence(tmp_path):
    root = Path("/data")
    stack = Dataset(
        root,
        "folders",
        tuple(Pair(root / "a.tif", root / "a_mask.tif", page=page) for page in range(30)),
        CARLA,
    )
    assigned = assign_splits(stack)
    assert splits_of(assigned) == ["train"] * 22 + ["gap"] * 2 + ["val"] * 6
    write_split_csv(tmp_path / "split.csv", assigned)
    assert (tmp_path / "split.csv").read_text().splitlines()[1] == "a.tif#0,train"
    assert read_split_csv(tmp_path / "split.csv", stack).pairs == assigned.pairs
    assert splits_of(assign_splits(stack, "random")) != splits_of(assigned)


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data are not beside this checkout")
@pytest.mark.parametrize(
    ("folder", "counts"),
    [
        ("carla", {"train": 153, "gap": 10, "val": 41}),
        ("camvid", {"train": 367, "val": 101}),
        ("isbi2012", {"train": 22, "gap": 2, "val": 6}),
    ],
)
def test_real_data(folder, counts):
    assert Counter(splits_of(assign_splits(find_dataset(SHARED / folder)))) == counts


def test_every_third_image_of_a_split_is_kept_in_the_order_of_names() -> None:
    splits = ["train"] * 7 + ["val"] * 2 + ["test"]
    names = [f"{k}.png" for k in (9, 10, 8, 7, 6, 5, 4, 3, 2, 1)]
    pairs = [Pair(Path(n), Path(n), each) for n, each in zip(names, splits, strict=True)]
    dataset = Dataset(Path(), "", tuple(pairs), CARLA)
    kept = keep_every(dataset, "train", 3)
    assert [pair.image.stem for pair in kept.of("train")] == ["8", "5"]
    assert [pair.image.stem for pair in kept.of("gap")] == ["9", "10", "7", "6", "4"]
    assert kept.of("val") == dataset.of("val")
    assert kept.of("test") == dataset.of("test")
    assert len(keep_every(dataset, "val", 9).of("val")) == 1
    assert keep_every(dataset, "train", 1) == dataset
