"""Official splits are honoured, films are cut in blocks with a gap, what belongs together stays together, and only the rest goes by lot."""

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

from useg.classes import CARLA, ClassTable
from useg.data import duplicates
from useg.data.dataset import Dataset, Pair, read_split_csv, restore_splits, write_split_csv
from useg.data.layouts import find_dataset
from useg.data.splits import assign_splits, choose_holdout, find_sequences, group_by_name, is_film
from useg.errors import UsageError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
WORDS = [
    "ash", "beech", "cedar", "daisy", "elm", "fir", "grape", "hazel", "iris", "jasmine", "kale", "lilac",
    "maple", "nettle", "oak", "pine", "quince", "rose", "sage", "thyme",
]  # fmt: skip


def dataset(*names: str, splits: dict[str, str] | None = None) -> Dataset:
    root = Path("/data")
    pairs = tuple(
        Pair(
            root / "images" / f"{name}.png",
            root / "masks" / f"{name}.png",
            (splits or {}).get(name, ""),
        )
        for name in names
    )
    return Dataset(root, "folders", pairs, CARLA)


def film(count: int, prefix: str = "", step: int = 1) -> list[str]:
    return [f"{prefix}{k * step:04}" for k in range(count)]


def kinds(assigned: Dataset) -> list[str]:
    return [pair.split for pair in assigned.pairs]


def test_a_stack_of_30_gives_6_at_the_end_and_a_small_gap():
    assigned = assign_splits(dataset(*(str(k) for k in range(30))))
    assert kinds(assigned) == ["train"] * 22 + ["gap"] * 2 + ["val"] * 6
    assert assigned.splits_by == "blocks: the last 20% of the sequence, 2 images before it left out"


def test_a_drive_of_204_gives_41_at_the_end_and_a_gap_of_10():
    assert Counter(kinds(assign_splits(dataset(*film(204, "000_"))))) == {
        "train": 153,
        "gap": 10,
        "val": 41,
    }


def test_the_gap_is_at_most_10_and_at_least_1():
    assert Counter(kinds(assign_splits(dataset(*film(1000)))))["gap"] == 10
    assert Counter(kinds(assign_splits(dataset(*film(8)))))["gap"] == 1


def test_every_long_sequence_is_cut():
    assigned = assign_splits(dataset(*film(60, "a_"), *film(40, "b_f", 30)))
    assert Counter(pair.image.stem[0] for pair in assigned.of("val")) == {"a": 12, "b": 8}
    assert "each of 2 sequences" in assigned.splits_by
    assert (
        "each of 6 sequences"
        in assign_splits(
            dataset(*(name for letter in "abcdef" for name in film(60, letter)))
        ).splits_by
    )


def test_many_short_sequences_are_held_out_whole():
    names = [name for k in range(12) for name in film(10, f"{'abcdefghijkl'[k]}_")]
    assigned = assign_splits(dataset(*names))
    by_sequence = {
        letter: {pair.split for pair in assigned.pairs if pair.image.stem.startswith(letter)}
        for letter in "abcdefghijkl"
    }
    assert all(len(splits) == 1 for splits in by_sequence.values())
    assert 10 <= len(assigned.of("val")) <= 40
    assert "short sequences held out whole" in assigned.splits_by


def test_names_without_numbers_are_split_by_hash_and_adding_images_moves_none():
    few, more = assign_splits(dataset(*WORDS[:15])), assign_splits(dataset(*WORDS))
    assert few.splits_by == "random, by a hash of the name"
    assert [pair.split for pair in more.pairs][:15] == kinds(few)
    assert {"train", "val"} == set(kinds(more))


def test_hashed_names_are_no_film():
    names = [
        "00ae65c1c663",
        "0121d6759c5a",
        "01d44a26f689",
        "0280fa8f60f6",
        "02903040e19d",
        "03398329ced0",
        "03b9306f44e9",
        "03f583ec5018",
    ]
    assert not is_film(dataset(*names).pairs)


def test_running_numbers_are_never_split_at_random_by_itself():
    assigned = kinds(assign_splits(dataset(*film(50))))
    assert assigned == sorted(assigned, key=["train", "gap", "val"].index)
    scattered = kinds(assign_splits(dataset(*film(50)), "random"))
    assert scattered != sorted(scattered), "asked for, it is"


def test_blocks_on_names_without_numbers_take_the_end():
    assert kinds(assign_splits(dataset(*WORDS), "blocks")) == ["train"] * 15 + ["gap"] + ["val"] * 4
    assert kinds(assign_splits(dataset(*WORDS[:4]), "blocks")) == ["train"] * 2 + ["gap", "val"]


def test_official_splits_are_kept():
    given_splits = {"0000": "train", "0001": "val", "0002": "test"}
    assigned = assign_splits(dataset(*film(3), splits=given_splits))
    assert kinds(assigned) == ["train", "val", "test"]
    assert assigned.splits_by == "official"
    assert kinds(assign_splits(dataset(*film(3), splits=given_splits), "official")) == [
        "train",
        "val",
        "test",
    ]


def test_val_is_cut_from_train_when_there_is_none():
    splits = dict.fromkeys(film(40), "train") | dict.fromkeys(film(9, "t"), "test")
    assigned = assign_splits(dataset(*film(40), *film(9, "t"), splits=splits))
    assert Counter(kinds(assigned)) == {"train": 30, "gap": 2, "val": 8, "test": 9}
    assert (
        assigned.splits_by
        == "official; val cut from train: blocks: the last 20% of the sequence, 2 images before it left out"
    )


@pytest.mark.parametrize("mode", ["blocks", "random"])
def test_official_test_images_are_never_trained_on(mode):
    splits = dict.fromkeys(film(40), "train") | dict.fromkeys(film(9, "t"), "test")
    assigned = assign_splits(dataset(*film(40), *film(9, "t"), splits=splits), mode)
    assert {pair.image.stem for pair in assigned.of("test")} == set(film(9, "t"))
    assert "val" in kinds(assigned)


def test_what_cannot_be_split_is_one_clear_sentence():
    with pytest.raises(
        UsageError,
        match="the number of images for training and validation is 1, but each needs at least one of its own; add images",
    ):
        assign_splits(dataset("a"))
    with pytest.raises(UsageError, match="is 0, but each needs"):
        assign_splits(dataset())
    with pytest.raises(UsageError, match="is 1, but each needs"):
        assign_splits(dataset("a", "b", splits={"a": "val", "b": "test"}))
    with pytest.raises(
        UsageError,
        match="'/data' has no official splits; choose another split, such as auto, or make folders train/",
    ):
        assign_splits(dataset("a", "b"), "official")
    with pytest.raises(
        UsageError,
        match=r"the split mode 'block' is not known; choose one of auto, blocks, groups, official, random, stratified; did you mean 'blocks'\?",
    ):
        assign_splits(dataset("a", "b"), "block")
    with pytest.raises(
        UsageError,
        match=r"held out for validation is 1.5, but it must lie between 0 and 1; 0.2 is usual",
    ):
        assign_splits(dataset("a", "b"), holdout=1.5)
    with pytest.raises(
        UsageError,
        match=r"1 of 2 images are in no split while the others are, such as '/data/images/b.png'; put them into train",
    ):
        assign_splits(dataset("a", "b", splits={"a": "train"}))


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "a_", "b", "walk"]), st.integers(0, 300)),
        min_size=2,
        unique=True,
    ),
    st.sampled_from(["auto", "blocks", "random", "stratified"]),
    st.floats(0.01, 0.9),
)
def test_there_is_always_something_to_train_on_and_something_to_validate(numbered, mode, holdout):
    names = [f"{prefix}{number}" for prefix, number in numbered]
    assigned = assign_splits(dataset(*names), mode, holdout)
    shuffled = random.Random(0).sample(names, len(names))
    again = assign_splits(dataset(*shuffled), mode, holdout)
    assert dict(zip(shuffled, kinds(again), strict=True)) == dict(
        zip(names, kinds(assigned), strict=True)
    )
    assert again.splits_by == assigned.splits_by
    assert assigned.of("train")
    assert assigned.of("val")
    assert len(assigned.pairs) == len(numbered)
    assert set(kinds(assigned)) <= {"train", "val", "gap"}


@settings(max_examples=40)
@given(st.integers(4, 400), st.floats(0.05, 0.5))
def test_in_a_film_no_validation_frame_touches_a_training_frame(count, holdout):
    assigned = kinds(assign_splits(dataset(*film(count)), "blocks", holdout))
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


def test_a_written_split_csv_gives_the_same_splits_back(tmp_path):
    assigned = assign_splits(dataset(*film(30)))
    write_split_csv(tmp_path / "split.csv", assigned)
    assert (tmp_path / "split.csv").read_text().splitlines()[:2] == [
        "image,split",
        "images/0000.png,train",
    ]
    again = read_split_csv(tmp_path / "split.csv", dataset(*film(30)))
    assert again.pairs == assigned.pairs
    assert assign_splits(again).splits_by == "split.csv"


def test_a_run_never_holds_out_what_it_has_trained_on_though_images_came_and_went(tmp_path):
    write_split_csv(tmp_path / "split.csv", assign_splits(dataset(*film(60))))
    then = {pair.image: pair.split for pair in assign_splits(dataset(*film(60))).pairs}
    now = dataset(*film(70))
    fewer = replace(now, pairs=now.pairs[:52])
    assert [pair.split for pair in assign_splits(fewer).pairs if then[pair.image] == "train"].count(
        "val"
    ) > 0  # made again, it leaks
    other = replace(now, pairs=(*now.pairs[5:52], *now.pairs[60:]))
    recalled = restore_splits(tmp_path / "split.csv", other, "blocks of names")
    assert recalled is not None
    assert [pair.split for pair in recalled.pairs] == [
        then.get(pair.image, "gap") for pair in other.pairs
    ]
    assert recalled.splits_by == "blocks of names; 10 images came after training"


def test_a_test_folder_that_came_after_training_is_a_test(tmp_path):
    write_split_csv(tmp_path / "split.csv", assign_splits(dataset("a", "b")))
    now = dataset("a", "b", "c")
    official = replace(now, pairs=(*now.pairs[:2], replace(now.pairs[2], split="test")))
    assert kinds(restore_splits(tmp_path / "split.csv", official, ""))[2] == "test"


def test_another_data_set_has_no_splits_to_recall(tmp_path):
    write_split_csv(tmp_path / "split.csv", assign_splits(dataset("a", "b")))
    assert restore_splits(tmp_path / "split.csv", dataset("c", "d"), "") is None


@pytest.mark.parametrize("name", ["images/a.png", "images/a", "a.png", "a"])
def test_a_split_csv_may_name_images_as_people_do(tmp_path, name):
    (tmp_path / "split.csv").write_text(f"\ufeffimage,split\n{name},validation\nb,train\n")
    assert kinds(read_split_csv(tmp_path / "split.csv", dataset("a", "b"))) == ["val", "train"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "needs a first line with the columns image,split and one line per image; it has none"),
        (
            "file,part\na,train",
            "needs a first line with the columns image,split and one line per image; it has file, part",
        ),
        (
            "image,split\na,trian\nb,val",
            "puts 'a' into the split 'trian'; known are train, val, test, gap",
        ),
        ("image,split\na\nb,val", "puts 'a' into the split ''"),
        ("image,split\na,train\nc,val", "names 'c', but there is no such image with a mask"),
        ("image,split\na,train\na,val", "puts 'a' into two splits; keep one"),
        (
            "image,split\na,train",
            r"does not name 1 of 2 images, such as '/data/images/b.png'; add them \(gap leaves one out\)",
        ),
    ],
)
def test_a_wrong_split_csv_is_one_clear_sentence(tmp_path, content, sentence):
    (tmp_path / "split.csv").write_text(content)
    with pytest.raises(UsageError, match=sentence):
        read_split_csv(tmp_path / "split.csv", dataset("a", "b"))


def test_a_name_that_two_images_have_needs_its_path(tmp_path):
    root = Path("/data")
    twins = Dataset(
        root,
        "carla",
        tuple(Pair(root / f"{k}/CameraRGB/1.png", root / f"{k}/CameraSeg/1.png") for k in "ab"),
        CARLA,
    )
    (tmp_path / "split.csv").write_text("image,split\n1,train")
    with pytest.raises(
        UsageError,
        match="names '1', but more than one image has this name: give its path below the data folder",
    ):
        read_split_csv(tmp_path / "split.csv", twins)


PATTERNS = {
    "P{a:02}_slice_{b:03}": "P03",
    "images/patient{a}/{b:04}": "patient3",
    "tile_{a}_{c}_{b}": "tile_3",
    "s{a:02}t{b:02}": "s03",
    "TCGA-A{a}-{c}-{b}": "TCGA_A3",
    "v{a:02}#{b}": "v03",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_names_show_groups(pattern):
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
        [
            "00ae65c1c663",
            "0121d6759c5a",
            "01d44a26f689",
            "0280fa8f60f6",
            "02903040e19d",
            "03398329ced0",
            "03b9306f44e9",
            "03f583ec5018",
        ],
        WORDS,
        [],
    ],
)
def test_names_that_show_no_groups(names):
    assert group_by_name(names) is None


@settings(max_examples=30)
@given(
    st.integers(5, 20), st.integers(2, 8), st.floats(0.05, 0.6), st.sampled_from(["auto", "groups"])
)
def test_no_group_is_on_both_sides(num_groups, size, holdout, mode):
    names = [f"P{a:02}_slice_{b:03}" for a in range(num_groups) for b in range(size)]
    assigned = assign_splits(dataset(*names), mode, holdout)
    sides = {}
    for pair in assigned.pairs:
        sides.setdefault(pair.image.stem[:3], set()).add(pair.split)
    assert all(len(side) == 1 for side in sides.values())
    assert set(kinds(assigned)) == {"train", "val"}
    assert assigned.splits_by.startswith("groups: ")
    assert abs(len(assigned.of("val")) / len(names) - holdout) <= 1 / num_groups + 0.2 * holdout


def test_groups_asked_for_where_there_are_none():
    with pytest.raises(
        UsageError,
        match=r"neither names nor pixels of the 20 images in '/data' show groups .*; name them GROUP_NUMBER",
    ):
        assign_splits(dataset(*WORDS), "groups")


@given(st.integers(0, 2**32), st.integers(2, 60), st.integers(0, 6), st.floats(0.05, 0.6))
def test_what_is_held_out_is_neither_nothing_nor_all(seed, count, num_classes, holdout):
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
def test_rare_classes_are_on_both_sides_and_a_further_picture_moves_few(seed):
    contents, draws = rare_classes(100, seed)
    held = choose_holdout(contents, np.ones(100, np.int64), draws, 0.2)
    assert (contents[held] > 0).any(0).all()
    assert (contents[~held] > 0).any(0).all()
    assert 16 <= held.sum() <= 25
    fewer = choose_holdout(contents[:99], np.ones(99, np.int64), draws[:99], 0.2)
    assert (fewer != held[:99]).sum() <= 3


def test_by_lot_alone_rare_classes_are_missed():
    missed = 0
    for seed in range(20):
        contents, draws = rare_classes(100, seed)
        missed += not (contents[draws < 0.2] > 0).any(0).all()
    assert missed > 10


def scene(seed: int, cells: int = 12) -> np.ndarray:
    """Some blobs, no two scenes alike, each 8 pixels wide."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, cells, 3), np.uint8)
    return np.asarray(
        PIL.Image.fromarray(coarse).resize((8 * cells, 64), PIL.Image.Resampling.BICUBIC)
    )


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Twenty pictures under names that say nothing: `kale` is a copy of `ash`, and a second class is in three of them."""
    monkeypatch.setenv("USEG_CACHE", str(tmp_path / "cache"))
    pairs = []
    for k, name in enumerate(WORDS):
        pairs.append(Pair(tmp_path / f"{name}.png", tmp_path / f"{name}_mask.png"))
        PIL.Image.fromarray(scene(0 if name == "kale" else k)).save(pairs[-1].image)
        mask = np.zeros((64, 96), np.uint8)
        mask[:5, :5] = name in ("elm", "fir", "iris")
        PIL.Image.fromarray(mask).save(pairs[-1].mask)
    return Dataset(tmp_path, "folders", tuple(pairs), ClassTable(("ground", "rare")))


def test_near_twins_stay_together_and_rare_classes_are_on_both_sides(words):
    for holdout in (0.1, 0.2, 0.3, 0.5):
        assigned = assign_splits(words, "auto", holdout)
        split = {pair.image.stem: pair.split for pair in assigned.pairs}
        assert split["ash"] == split["kale"]
        assert {split["elm"], split["fir"], split["iris"]} == {"train", "val"}
        assert "2 near twins kept together" in assigned.splits_by
    assert assign_splits(words, "groups").splits_by.endswith(
        "of 19 held out whole, by their pixels: nearly the same pictures stay together"
    )


def test_pictures_are_looked_at_once(words, monkeypatch):
    first = assign_splits(words)

    def fail(*_):
        raise AssertionError("looked at again")

    monkeypatch.setattr(duplicates, "read_label", fail)
    monkeypatch.setattr(duplicates, "read_pair_image", fail)
    assert assign_splits(words) == first
    with pytest.raises(AssertionError, match="looked at again"):
        assign_splits(replace(words, pairs=words.pairs[1:]))
    monkeypatch.setattr(duplicates, "MAX_COMPARED_PIXELS", 19 * 64 * 96)
    large = assign_splits(
        replace(words, pairs=words.pairs[:15] + words.pairs[16:] + words.pairs[15:16])
    )
    assert (
        large.splits_by
        == "random, by a hash of the name; too many pictures to look into unasked (data.split = stratified does)"
    )
    assert assign_splits(words, "stratified") == first, "asked for, they are"
    monkeypatch.undo()
    monkeypatch.setattr(duplicates, "MAX_COMPARED_PAIRS", 19)
    assert "too many pictures to look into" in assign_splits(words).splits_by


def test_a_damaged_picture_stops_no_split(words):
    words.pairs[3].image.write_bytes(b"no picture")
    words.pairs[4].mask.unlink()
    assert {"train", "val"} == set(kinds(assign_splits(words)))


def test_a_film_whose_names_do_not_say_so_is_cut_in_blocks(words):
    panorama = scene(0, 50)
    for k, pair in enumerate(words.pairs):
        PIL.Image.fromarray(panorama[:, k : k + 96]).save(pair.image)
    assigned = assign_splits(words)
    assert kinds(assigned) == ["train"] * 15 + ["gap"] + ["val"] * 4
    assert assigned.splits_by.endswith("(most of the pictures are nearly the same, as in a film)")


def test_pages_of_a_stack_are_a_sequence_and_have_names_of_their_own(tmp_path):
    root = Path("/data")
    stack = Dataset(
        root,
        "folders",
        tuple(Pair(root / "a.tif", root / "a_mask.tif", page=page) for page in range(30)),
        CARLA,
    )
    assigned = assign_splits(stack)
    assert kinds(assigned) == ["train"] * 22 + ["gap"] * 2 + ["val"] * 6
    write_split_csv(tmp_path / "split.csv", assigned)
    assert (tmp_path / "split.csv").read_text().splitlines()[1] == "a.tif#0,train"
    assert read_split_csv(tmp_path / "split.csv", stack).pairs == assigned.pairs
    assert kinds(assign_splits(stack, "random")) != kinds(assigned)


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
    assert Counter(kinds(assign_splits(find_dataset(SHARED / folder)))) == counts
