"""Pairs are read as samples, and splits are written, read and restored."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_data import (
    dataset_of_names,
    film_names,
    splits_of,
    write_folders,
    write_image,
    write_mask,
)

from useg.classes import CARLA
from useg.data import class_names, official_splits, pair_lists, split_files
from useg.data.dataset import Dataset, Pair, read_label, read_sample
from useg.data.layouts import find_dataset
from useg.data.split_files import (
    MAX_TAIL_PARTS,
    find_by_tail,
    read_split_csv,
    restore_splits,
    write_split_csv,
)
from useg.data.splits import assign_splits
from useg.errors import DataError


def test_carla_masks_may_be_black_or_have_one_channel(tmp_path):
    write_image(tmp_path / "CameraRGB" / "a.png")
    write_image(tmp_path / "CameraRGB" / "b.png")
    write_mask(tmp_path / "CameraSeg" / "a.png", [(0, 0, 0)])
    write_mask(tmp_path / "CameraSeg" / "b.png", [3, 4])
    dataset = find_dataset(tmp_path)
    assert np.unique(read_label(dataset.pairs[0], dataset)).tolist() == [0]
    assert np.unique(read_label(dataset.pairs[1], dataset)).tolist() == [3, 4]


def test_values_and_colours_outside_the_class_table_are_refused(tmp_path):
    dataset = find_dataset(
        write_folders(tmp_path, "CameraRGB", "CameraSeg", values=[(7, 0, 0), (77, 0, 0)])
    )
    with pytest.raises(
        DataError,
        match=(
            r"mask '.*1.png' has the value 77 at \(row 0, column 1\), but there are 13 classes "
            r"\(0-12\)"
        ),
    ):
        read_label(dataset.pairs[0], dataset)
    write_mask(tmp_path / "CameraSeg" / "1.png", [(70, 70, 70), (128, 64, 128)])
    with pytest.raises(
        DataError,
        match=r"1.png' has colours, but the 13 classes are defined by ids; list .* by_color = true",
    ):
        read_label(dataset.pairs[0], dataset)


def test_an_image_and_a_mask_of_different_sizes_are_refused(tmp_path):
    write_folders(tmp_path)
    write_mask(tmp_path / "masks" / "2.png", size=(7, 6))
    dataset = find_dataset(tmp_path)
    assert read_sample(dataset.pairs[0], dataset).label.shape == (6, 8)
    with pytest.raises(
        DataError,
        match=(
            r"image '.*2.jpg' is 8x6 pixels, but its mask '.*2.png' is 7x6; they must have the "
            r"same size"
        ),
    ):
        read_sample(dataset.pairs[1], dataset)


def test_a_pair_has_no_split_until_it_is_decided():
    assert Pair(Path("a"), Path("b")).split == ""


def test_a_written_split_csv_is_read_back(tmp_path):
    assigned = assign_splits(dataset_of_names(*film_names(30)))
    write_split_csv(tmp_path / "split.csv", assigned)
    assert (tmp_path / "split.csv").read_text().splitlines()[:2] == [
        "image,split",
        "images/0000.png,train",
    ]
    again = read_split_csv(tmp_path / "split.csv", dataset_of_names(*film_names(30)))
    assert again.pairs == assigned.pairs
    assert assign_splits(again).splits_by == "split.csv"


def test_restored_splits_never_hold_out_training_images(tmp_path):
    write_split_csv(tmp_path / "split.csv", assign_splits(dataset_of_names(*film_names(60))))
    then = {
        pair.image: pair.split for pair in assign_splits(dataset_of_names(*film_names(60))).pairs
    }
    now = dataset_of_names(*film_names(70))
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
    assert recalled.splits_by == "blocks of names; 10 images were added after training"


def test_a_test_folder_added_after_training_is_a_test(tmp_path):
    write_split_csv(tmp_path / "split.csv", assign_splits(dataset_of_names("a", "b")))
    now = dataset_of_names("a", "b", "c")
    official = replace(now, pairs=(*now.pairs[:2], replace(now.pairs[2], split="test")))
    assert splits_of(restore_splits(tmp_path / "split.csv", official, ""))[2] == "test"


def test_another_data_set_has_no_splits_to_restore(tmp_path):
    write_split_csv(tmp_path / "split.csv", assign_splits(dataset_of_names("a", "b")))
    assert restore_splits(tmp_path / "split.csv", dataset_of_names("c", "d"), "") is None


@pytest.mark.parametrize("name", ["images/a.png", "images/a", "a.png", "a"])
def test_a_split_csv_may_name_images_with_or_without_folder_and_suffix(tmp_path, name):
    (tmp_path / "split.csv").write_text(f"\ufeffimage,split\n{name},validation\nb,train\n")
    assert splits_of(read_split_csv(tmp_path / "split.csv", dataset_of_names("a", "b"))) == [
        "val",
        "train",
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", r"has the columns \(none\), but it needs image,split in its first line"),
        (
            "file,part\na,train",
            "has the columns file, part, but it needs image,split in its first line",
        ),
        (
            "image,split\na,trian\nb,val",
            "puts 'a' into the split 'trian'; choose one of train, val, test, gap",
        ),
        ("image,split\na\nb,val", "puts 'a' into the split ''"),
        ("image,split\na,train\nc,val", "names 'c', but there is no such image with a mask"),
        ("image,split\na,train\na,val", "puts 'a' into two splits; keep one"),
        (
            "image,split\na,train",
            r"does not name 1 of 2 images, such as '/data/images/b.png'; add them \(the split gap "
            r"leaves an image out\)",
        ),
    ],
)
def test_an_invalid_split_csv_is_refused(tmp_path, content, sentence):
    (tmp_path / "split.csv").write_text(content)
    with pytest.raises(DataError, match=sentence):
        read_split_csv(tmp_path / "split.csv", dataset_of_names("a", "b"))


def test_a_name_of_two_images_is_refused(tmp_path):
    root = Path("/data")
    twins = Dataset(
        root,
        "carla",
        tuple(Pair(root / f"{k}/CameraRGB/1.png", root / f"{k}/CameraSeg/1.png") for k in "ab"),
        CARLA,
    )
    (tmp_path / "split.csv").write_text("image,split\n1,train")
    with pytest.raises(
        DataError,
        match="names '1', but several images have that name; give the path below the data folder",
    ):
        read_split_csv(tmp_path / "split.csv", twins)


@pytest.mark.parametrize(
    "name", ["caf\udce9", "=cmd", "'=cmd", "a\nb", "back\\xe9", 'quote",', "\x1b[2J"]
)
def test_splits_of_odd_names_come_back(name: str, tmp_path: Path) -> None:
    splits = ("train", "val", "test")
    pairs = tuple(
        Pair(tmp_path / f"{name}{k}.png", tmp_path / f"m{k}.png", split)
        for k, split in enumerate(splits)
    )
    dataset = Dataset(tmp_path, "folders", pairs, CARLA)
    write_split_csv(tmp_path / "split.csv", dataset)
    assert (tmp_path / "split.csv").read_text("utf-8")
    found = read_split_csv(tmp_path / "split.csv", dataset)
    assert [pair.split for pair in found.pairs] == list(splits)


def test_rows_of_a_split_csv_are_read_one_after_another(tmp_path):
    """Of short rows, a file of the allowed size has so many that they fill the memory."""
    (tmp_path / "split.csv").write_text("image,split\na,train\nb,never\n")
    rows = split_files._split_rows(tmp_path / "split.csv")
    assert next(rows) == ("a", "train")
    with pytest.raises(DataError, match="puts 'b' into the split 'never'"):
        next(rows)


@pytest.mark.parametrize(
    ("content", "limit", "sentence"),
    [
        ("a,train\n" * 30, "_MAX_ROWS", "it has 32 lines, and 20 are allowed"),
        ("\r" * 30, "_MAX_ROWS", "it has 30 lines, and 20 are allowed"),
        ("a,train" + "," * 30, "_MAX_LINE_LENGTH", "it has a line of 37 characters"),
    ],
)
def test_a_split_csv_of_very_many_or_long_lines_is_refused(
    tmp_path, monkeypatch, content, limit, sentence
):
    path = tmp_path / "split.csv"
    path.write_text(f"image,split\na,val\n{content}")
    # The control: with the usual limits, it is read.
    assert next(split_files._split_rows(path)) == ("a", "val")
    monkeypatch.setattr(split_files, limit, 20)
    with pytest.raises(DataError, match=rf"split\.csv' cannot be read \({sentence}\)"):
        list(split_files._split_rows(path))
    assert split_files.read_split_file(path) == ({}, False)


@pytest.mark.parametrize(
    "content", ["x" * 9999 + "\n", "image,split\na," + "x" * 9999, "image,split\n" + "x" * 9999]
)
def test_long_cells_of_a_split_csv_are_shortened_in_the_error(tmp_path, content):
    (tmp_path / "split.csv").write_text(content)
    with pytest.raises(DataError) as caught:
        list(split_files._split_rows(tmp_path / "split.csv"))
    assert len(str(caught.value)) < 600


def test_splits_in_json_of_very_many_keys_or_divisions_are_soon_read(tmp_path, monkeypatch):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps([{f"k{k}": "train" for k in range(20_000)}, {"k1": "val"}]))
    # Each key was looked up in a list of all of them: five seconds.
    started = time.process_time()
    assert split_files.read_split_file(path) == ({}, False)
    assert time.process_time() - started < 0.5
    path.write_text(json.dumps([{"image": "a", "split": "train"}, {"image": "b", "split": "val"}]))
    assert len(split_files.read_split_file(path)[0]) == 2
    monkeypatch.setattr(split_files, "_MAX_CELLS", 3)
    assert split_files.read_split_file(path) == ({}, False)
    path.write_text(json.dumps([{"train": ["a"], "val": ["b"]}] * 3))
    assert split_files.read_split_file(path) == ({}, True)


@pytest.mark.parametrize(
    ("content", "count"),
    [
        ('["%s"]', "[]"),
        ('{"val": ["a"], "train": [%s"b"]}', "1,"),
        ('{"val": ["a"], "train": [%s"b"]}', "[],"),
        ('{"val": ["a"], "train": [%s"b"]}', "{},"),
        ('{%s"val": ["a"], "train": ["b"]}', '"k":0,'),
    ],
)
def test_json_of_very_many_items_lists_no_splits(tmp_path, monkeypatch, content, count):
    path = tmp_path / "splits.json"
    path.write_text(content % (count * 20))
    monkeypatch.setattr(split_files, "_MAX_JSON_ITEMS", 19)
    monkeypatch.setattr(split_files, "parse_json", lambda _: pytest.fail("it was parsed"))
    assert split_files.read_split_file(path) == ({}, False)
    monkeypatch.undo()
    assert "train" in split_files.read_split_file(path)[0] or count == "[]"


def test_of_very_many_records_and_divisions_some_show_what_the_file_is(tmp_path, monkeypatch):
    path = tmp_path / "splits.json"
    records = [{"name": f"a{k}", "is_valid": int(k > 90)} for k in range(100)]
    path.write_text(json.dumps(records))
    monkeypatch.setattr(split_files, "_NUM_RECORDS_LOOKED_AT", 20)
    found, _ = split_files.read_split_file(path)
    assert {split: len(names) for split, names in found.items()} == {"train": 91, "val": 9}
    path.write_text(json.dumps({str(k): {"a": ["b"]} for k in range(20_000)}))
    monkeypatch.setattr(split_files, "_MAX_COLUMNS", 3)
    divide, calls = split_files._divide_content, []

    def count(content, depth=0):
        calls.append(depth)
        return divide(content, depth)

    monkeypatch.setattr(split_files, "_divide_content", count)
    assert split_files.read_split_file(path) == ({}, False)
    assert len(calls) == 4


def test_a_line_longer_than_any_path_names_nothing(monkeypatch):
    monkeypatch.setattr(official_splits, "find_by_tail", lambda *_: "found")
    assert official_splits._find_pairs("/" * 10_000, {}, {}) == ("found",)
    assert official_splits._find_pairs("/" * 10_001, {}, {}) == ()


def test_names_in_yaml_splits_are_text(tmp_path):
    (tmp_path / "splits.yaml").write_text("train: [007, 1:30]\nval: [yes, 1e3]\n")
    found, _ = split_files.read_split_file(tmp_path / "splits.yaml")
    assert found == {"train": ["007", "1:30"], "val": ["yes", "1e3"]}


@pytest.mark.parametrize(
    ("name", "limit", "content"),
    [
        ("a.yaml", "_MAX_YAML_BYTES", "names: [cat, dog]\n"),
        ("a.txt", "_MAX_TABLE_BYTES", "0 cat\n1 dog\n"),
        ("a.json", "_MAX_BYTES", '{"names": ["cat", "dog"]}'),
    ],
)
def test_a_large_file_does_not_name_classes(tmp_path, monkeypatch, name, limit, content):
    (tmp_path / name).write_text(content)
    assert len(class_names.read_name_file(tmp_path / name)) == 1
    monkeypatch.setattr(class_names, limit, len(content) - 1)
    assert class_names.read_name_file(tmp_path / name) == []


BLUE = (0, 0, 255)


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("names: [no, 1e3]", [("no", None, None), ("1e3", None, None)]),
        ("names: {0: no, 1: car}", [("no", 0, None), ("car", 1, None)]),
        ("a: 0xff0000\nb: '#00ff00'", [("a", None, (255, 0, 0)), ("b", None, (0, 255, 0))]),
        (
            "a: [1.0, 0.0, .5]\nb: [0.0, 1e-3, 0.0]",
            [("a", None, (255, 0, 128)), ("b", None, (0,) * 3)],
        ),
        ("a: [1, 0, 2]\nb: [0, 1, 0]", [("a", None, (1, 0, 2)), ("b", None, (0, 1, 0))]),
    ],
)
def test_classes_in_yaml_are_read_as_they_are_written(tmp_path, text, classes):
    (tmp_path / "a.yaml").write_text(text)
    (found,) = class_names.read_name_file(tmp_path / "a.yaml")
    assert [(each.name, each.id, each.color) for each in found.classes] == classes


def test_of_a_list_of_very_many_lines_only_some_are_read(tmp_path):
    (tmp_path / "train.txt").write_text("# first\n\na\r\n b \n" + "c\n" * 1000)
    assert official_splits._read_lines(tmp_path / "train.txt", 2) == ["a", "b", "c"]


@pytest.mark.parametrize("separator", [",", ";", "\t", " ", "\n", "\r"])
def test_tables_of_very_many_cells_are_no_tables_of_paths(tmp_path, monkeypatch, separator):
    pairs = "image,mask\nimages/a.png,masks/a.png\nimages/b.png,masks/b.png\n"
    path = tmp_path / "pairs.csv"
    paths = [Path(folder, f"{name}.png") for folder in ("images", "masks") for name in "ab"]
    tails = {path.as_posix(): {path} for path in paths}
    monkeypatch.setattr(pair_lists, "_MAX_CELLS", 20)
    path.write_text(pairs)
    assert pair_lists._read_table(path, tails) is not None
    path.write_text(separator * 30 if separator == " " else pairs + separator * 30)
    monkeypatch.setattr(pair_lists, "split_rows", lambda _: pytest.fail("it was read"))
    assert pair_lists._read_table(path, tails) is None


def test_tables_of_far_more_rows_than_files_are_no_tables_of_paths(tmp_path, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"image": "a.png", "mask": "b.png"}\n{"image": "c.png", "mask": "d.png"}\n')
    tails = {f"{name}.png": {Path(f"{name}.png")} for name in "abcd"}
    monkeypatch.setattr(pair_lists, "_MAX_ROWS", 1)
    assert pair_lists._read_table(path, tails) is not None
    monkeypatch.setattr(pair_lists, "_MAX_ROWS_PER_FILE", 0)
    assert pair_lists._read_table(path, tails) is None


def test_json_lines_of_very_many_keys_are_no_tables_of_paths(tmp_path):
    path = tmp_path / "pairs.jsonl"
    tails = {f"{name}.png": {Path(f"{name}.png")} for name in "abcd"}
    for num_keys in (48, 49):
        extra = "".join(f', "k{k}": ""' for k in range(num_keys))
        path.write_text(
            f'{{"image": "a.png", "mask": "b.png"{extra}}}\n{{"image": "c.png", "mask": "d.png"}}\n'
        )
        # Each line gets a cell for each key of the first: 1 MB took minutes.
        assert (pair_lists._read_table(path, tails) is not None) == (num_keys == 48)


def test_a_path_of_very_many_parts_is_compared_by_its_end():
    asked = []

    class Asked(dict):
        def get(self, key, default=None):
            asked.append(key)
            return super().get(key, default)

    tails = Asked({"x/b.png": {Path("b.png")}})
    assert find_by_tail([*["a"] * 100_000, "x", "b.png"], tails) == Path("b.png")
    assert find_by_tail(["a"] * 100_000, tails) is None
    assert len(asked) < 2 * MAX_TAIL_PARTS
    assert max(map(len, asked)) < 1000
