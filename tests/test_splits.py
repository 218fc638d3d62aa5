"""Official splits are honoured, films are cut in blocks with a gap, and only unnumbered names are split at random."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from useg.classes import CARLA
from useg.data.dataset import Dataset, Pair
from useg.data.layouts import find
from useg.data.splits import assign_splits, looks_filmed, read_split_csv, sequences, write_split_csv
from useg.errors import UsageError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
WORDS = [
    "ash", "beech", "cedar", "daisy", "elm", "fir", "grape", "hazel", "iris", "jasmine", "kale", "lilac",
    "maple", "nettle", "oak", "pine", "quince", "rose", "sage", "thyme",
]  # fmt: skip


def dataset(*names: str, splits: dict[str, str] | None = None) -> Dataset:
    root = Path("/data")
    pairs = tuple(Pair(root / "images" / f"{name}.png", root / "masks" / f"{name}.png", (splits or {}).get(name, "")) for name in names)
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
    assert Counter(kinds(assign_splits(dataset(*film(204, "000_"))))) == {"train": 153, "gap": 10, "val": 41}


def test_the_gap_is_at_most_10_and_at_least_1():
    assert Counter(kinds(assign_splits(dataset(*film(1000)))))["gap"] == 10
    assert Counter(kinds(assign_splits(dataset(*film(8)))))["gap"] == 1


def test_every_long_sequence_is_cut():
    assigned = assign_splits(dataset(*film(60, "a_"), *film(40, "b_f", 30)))
    assert Counter(pair.image.stem[0] for pair in assigned.of("val")) == {"a": 12, "b": 8}
    assert "each of 2 sequences" in assigned.splits_by
    assert "each of 6 sequences" in assign_splits(dataset(*(name for letter in "abcdef" for name in film(60, letter)))).splits_by


def test_many_short_sequences_are_held_out_whole():
    names = [name for k in range(12) for name in film(10, f"{'abcdefghijkl'[k]}_")]
    assigned = assign_splits(dataset(*names))
    by_sequence = {letter: {pair.split for pair in assigned.pairs if pair.image.stem.startswith(letter)} for letter in "abcdefghijkl"}
    assert all(len(splits) == 1 for splits in by_sequence.values())
    assert 10 <= len(assigned.of("val")) <= 40
    assert "short sequences held out whole" in assigned.splits_by


def test_names_without_numbers_are_split_by_hash_and_adding_images_moves_none():
    few, more = assign_splits(dataset(*WORDS[:15])), assign_splits(dataset(*WORDS))
    assert few.splits_by == "random, by a hash of the name"
    assert [pair.split for pair in more.pairs][:15] == kinds(few)
    assert {"train", "val"} == set(kinds(more))


def test_hashed_names_are_no_film():
    names = ["00ae65c1c663", "0121d6759c5a", "01d44a26f689", "0280fa8f60f6", "02903040e19d", "03398329ced0", "03b9306f44e9", "03f583ec5018"]
    assert not looks_filmed(dataset(*names).pairs)


def test_running_numbers_are_never_split_at_random_by_itself():
    assigned = kinds(assign_splits(dataset(*film(50))))
    assert assigned == sorted(assigned, key=["train", "gap", "val"].index)
    scattered = kinds(assign_splits(dataset(*film(50)), "random"))
    assert scattered != sorted(scattered), "asked for, it is"


def test_blocks_on_names_without_numbers_take_the_end():
    assigned = assign_splits(dataset(*WORDS), "blocks")
    assert "val" in kinds(assigned)


def test_official_splits_are_kept():
    given_splits = {"0000": "train", "0001": "val", "0002": "test"}
    assigned = assign_splits(dataset(*film(3), splits=given_splits))
    assert kinds(assigned) == ["train", "val", "test"]
    assert assigned.splits_by == "official"
    assert kinds(assign_splits(dataset(*film(3), splits=given_splits), "official")) == ["train", "val", "test"]


def test_val_is_cut_from_train_when_there_is_none():
    splits = dict.fromkeys(film(40), "train") | dict.fromkeys(film(9, "t"), "test")
    assigned = assign_splits(dataset(*film(40), *film(9, "t"), splits=splits))
    assert Counter(kinds(assigned)) == {"train": 30, "gap": 2, "val": 8, "test": 9}
    assert assigned.splits_by == "official; val cut from train: blocks: the last 20% of the sequence, 2 images before it left out"


@pytest.mark.parametrize("mode", ["blocks", "random"])
def test_official_test_images_are_never_trained_on(mode):
    splits = dict.fromkeys(film(40), "train") | dict.fromkeys(film(9, "t"), "test")
    assigned = assign_splits(dataset(*film(40), *film(9, "t"), splits=splits), mode)
    assert {pair.image.stem for pair in assigned.of("test")} == set(film(9, "t"))
    assert "val" in kinds(assigned)


def test_what_cannot_be_split_is_one_clear_sentence():
    with pytest.raises(UsageError, match="the number of images for training and validation is 1, but each needs at least one of its own; add images"):
        assign_splits(dataset("a"))
    with pytest.raises(UsageError, match="is 0, but each needs"):
        assign_splits(dataset())
    with pytest.raises(UsageError, match="is 1, but each needs"):
        assign_splits(dataset("a", "b", splits={"a": "val", "b": "test"}))
    with pytest.raises(UsageError, match="'/data' has no official splits; choose the split auto, blocks or random, or make folders train/"):
        assign_splits(dataset("a", "b"), "official")
    with pytest.raises(
        UsageError, match=r"the split mode 'block' is not known; choose one of auto, blocks, official, random; did you mean 'blocks'\?"
    ):
        assign_splits(dataset("a", "b"), "block")
    with pytest.raises(UsageError, match=r"held out for validation is 1.5, but it must lie between 0 and 1; 0.2 is usual"):
        assign_splits(dataset("a", "b"), holdout=1.5)
    with pytest.raises(UsageError, match=r"1 of 2 images are in no split while the others are, such as '/data/images/b.png'; put them into train"):
        assign_splits(dataset("a", "b", splits={"a": "train"}))


@given(
    st.lists(st.tuples(st.sampled_from(["", "a_", "b", "walk"]), st.integers(0, 300)), min_size=2, unique=True),
    st.sampled_from(["auto", "blocks", "random"]),
    st.floats(0.01, 0.9),
)
def test_there_is_always_something_to_train_on_and_something_to_validate(numbered, mode, holdout):
    assigned = assign_splits(dataset(*(f"{prefix}{number}" for prefix, number in numbered)), mode, holdout)
    assert assigned.of("train")
    assert assigned.of("val")
    assert len(assigned.pairs) == len(numbered)
    assert set(kinds(assigned)) <= {"train", "val", "gap"}


@given(st.integers(4, 400), st.floats(0.05, 0.5))
def test_in_a_film_no_validation_frame_touches_a_training_frame(count, holdout):
    assigned = kinds(assign_splits(dataset(*film(count)), "blocks", holdout))
    assert not any({a, b} == {"train", "val"} for a, b in itertools.pairwise(assigned))


def test_one_film_in_two_split_folders_is_one_sequence():
    root = Path("/data")
    pairs = [Pair(root / folder / f"A_{k}.png", root / f"{folder}annot" / f"A_{k}.png") for folder, k in (("train", 1), ("val", 2), ("train", 3))]
    assert [[pair.image.stem for pair in group] for group in sequences(pairs)] == [["A_1", "A_2", "A_3"]]


def test_a_written_split_csv_gives_the_same_splits_back(tmp_path):
    assigned = assign_splits(dataset(*film(30)))
    write_split_csv(tmp_path / "split.csv", assigned)
    assert (tmp_path / "split.csv").read_text().splitlines()[:2] == ["image,split", "images/0000.png,train"]
    again = read_split_csv(tmp_path / "split.csv", dataset(*film(30)))
    assert again.pairs == assigned.pairs
    assert assign_splits(again).splits_by == "split.csv"


@pytest.mark.parametrize("name", ["images/a.png", "images/a", "a.png", "a"])
def test_a_split_csv_may_name_images_as_people_do(tmp_path, name):
    (tmp_path / "split.csv").write_text(f"\ufeffimage,split\n{name},validation\nb,train\n")
    assert kinds(read_split_csv(tmp_path / "split.csv", dataset("a", "b"))) == ["val", "train"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "needs a first line with the columns image,split and one line per image; it has none"),
        ("file,part\na,train", "needs a first line with the columns image,split and one line per image; it has file, part"),
        ("image,split\na,trian\nb,val", "puts 'a' into the split 'trian'; known are train, val, test, gap"),
        ("image,split\na\nb,val", "puts 'a' into the split ''"),
        ("image,split\na,train\nc,val", "names 'c', but there is no such image with a mask"),
        ("image,split\na,train\na,val", "puts 'a' into two splits; keep one"),
        ("image,split\na,train", r"does not name 1 of 2 images, such as '/data/images/b.png'; add them \(gap leaves one out\)"),
    ],
)
def test_a_wrong_split_csv_is_one_clear_sentence(tmp_path, content, sentence):
    (tmp_path / "split.csv").write_text(content)
    with pytest.raises(UsageError, match=sentence):
        read_split_csv(tmp_path / "split.csv", dataset("a", "b"))


def test_a_name_that_two_images_have_needs_its_path(tmp_path):
    root = Path("/data")
    twins = Dataset(root, "carla", tuple(Pair(root / f"{k}/CameraRGB/1.png", root / f"{k}/CameraSeg/1.png") for k in "ab"), CARLA)
    (tmp_path / "split.csv").write_text("image,split\n1,train")
    with pytest.raises(UsageError, match="names '1', but more than one image has this name: give its path below the data folder"):
        read_split_csv(tmp_path / "split.csv", twins)


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data are not beside this checkout")
@pytest.mark.parametrize(
    ("folder", "counts"),
    [("carla", {"train": 153, "gap": 10, "val": 41}), ("camvid", {"train": 367, "val": 101}), ("isbi2012", {"train": 22, "gap": 2, "val": 6})],
)
def test_real_data(folder, counts):
    assert Counter(kinds(assign_splits(find(SHARED / folder)))) == counts
