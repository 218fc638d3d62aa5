"""Folds: each image is held out once, groups whole, and neighbours of what is scored left out."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from made_data import dataset_of_names, film_names, write_blob_dataset

from useg.data.dataset import Dataset
from useg.data.folds import Folds, describe_score, find_groups, make_folds
from useg.data.splits import assign_splits
from useg.errors import DataError, SettingsError

RECORDINGS = [name for letter in ("a1", "b2", "c3") for name in film_names(60, f"{letter}_")]
PATIENTS = [f"p{k}_{eye}" for k in range(12) for eye in ("left", "right")]


def split_counts(folds: Folds) -> list[Counter[str]]:
    return [Counter(pair.split for pair in fold.dataset.pairs) for fold in folds.folds]


def held_out(folds: Folds) -> list[str]:
    return [pair.image.stem for fold in folds.folds for pair in fold.dataset.of("val")]


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(
    "names", [RECORDINGS, PATIENTS, film_names(100)], ids=["recordings", "patients", "film"]
)
def test_every_image_is_held_out_once(names: list[str], count: int) -> None:
    folds = make_folds(dataset_of_names(*names), count)
    assert sorted(held_out(folds)) == sorted(names)
    for fold in folds.folds:
        assert {pair.split for pair in fold.dataset.pairs} <= {"train", "val", "gap"}
        assert len(fold.dataset.of("train")) > len(names) / 4


def test_groups_are_held_out_whole() -> None:
    for names, count, where in ((RECORDINGS, 5, 3), (PATIENTS, 5, 5)):
        folds = make_folds(dataset_of_names(*names), count)
        assert len(folds.folds) == where
        num_groups = len({n.split("_")[0] for n in names})
        assert f"{where} folds of whole groups; file names show {num_groups} groups" in folds.by
        for fold in folds.folds:
            inside, outside = (
                {pair.image.stem.split("_")[0] for pair in pairs}
                for pairs in (fold.dataset.of("val"), (*fold.dataset.of("train"), *fold.near))
            )
            assert not inside & outside


def test_images_like_the_training_images_are_kept_back() -> None:
    folds = make_folds(dataset_of_names(*RECORDINGS), 3)
    for fold in folds.folds:
        near = {pair.image.stem for pair in fold.near}
        train = {pair.image.stem for pair in fold.dataset.of("train")}
        assert len(near) == 12
        assert not near & train
        assert {name[:2] for name in near} == {name[:2] for name in train}
        # A film's neighbours of what is scored do not train.
        order = [pair.image.stem for pair in fold.dataset.pairs]
        assert not any(
            {one, other} & near and {one, other} & train
            for one, other in pairwise(order)
            if one[:2] == other[:2]
        )
    assert len({frozenset(fold.near) for fold in folds.folds}) == 3
    patients = make_folds(dataset_of_names(*PATIENTS), 4)
    assert all(fold.near for fold in patients.folds)


def test_blocks_of_a_film_have_gaps_on_both_sides() -> None:
    folds = make_folds(dataset_of_names(*film_names(100)), 4)
    assert not any(fold.near for fold in folds.folds)
    assert [counts["gap"] for counts in split_counts(folds)] == [5, 10, 10, 5]
    for fold in folds.folds:
        splits = [pair.split for pair in fold.dataset.pairs]
        assert not any({"train", "val"} == set(each) for each in pairwise(splits))


def test_kinds_are_no_groups() -> None:
    names = [*film_names(30, "cat_"), *film_names(30, "dog_")]
    dataset = dataset_of_names(*names)
    assert find_groups(dataset, dataset.pairs) is None
    assert not make_folds(dataset, 2).groups


def test_near_duplicates_stay_together_at_random(tmp_path) -> None:
    folds = make_folds(write_blob_dataset(tmp_path), 4)
    assert "near duplicates stay together" in folds.by
    sides = [{pair.image.stem for pair in fold.dataset.of("val")} for fold in folds.folds]
    assert sum({"ash", "kale"} <= side for side in sides) == 1
    assert sorted(map(len, sides)) == [5, 5, 5, 5]


def test_official_test_images_take_no_part() -> None:
    official = dict.fromkeys(PATIENTS[:4], "test") | dict.fromkeys(PATIENTS[4:6], "gap")
    folds = make_folds(dataset_of_names(*PATIENTS, splits=official), 3)
    assert not set(held_out(folds)) & set(PATIENTS[:6])
    assert all(counts["test"] == 4 for counts in split_counts(folds))


def test_too_few_folds_or_images_are_refused() -> None:
    with pytest.raises(SettingsError, match="1 folds are not possible; choose 2 or more"):
        make_folds(dataset_of_names(*PATIENTS), 1)
    with pytest.raises(DataError, match="has 1 images with masks, but folds need 2 or more"):
        make_folds(dataset_of_names("a"), 2)


def split(names: list[str], mode: str) -> Dataset:
    return assign_splits(dataset_of_names(*names), mode)


def test_what_a_score_says_is_said() -> None:
    shared = describe_score(split(RECORDINGS, "blocks"))
    assert "from the same 3 groups (such as images/a1) as the training images" in shared
    assert "expect less on a new group, and measure how much with five folds" in shared
    assert "whole groups are held out" in describe_score(split(PATIENTS, "auto"))
    assert "from the same recording" in describe_score(split(film_names(60), "auto"))
    words = [f"{a}{b}" for a in "abcd" for b in ("oak", "elm", "fir")]
    assert describe_score(split(words, "random")) == ""
