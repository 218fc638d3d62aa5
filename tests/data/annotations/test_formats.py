"""JSON, XML and lists of class names from anywhere are read safely or refused."""

import contextlib
import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_annotations import write_file, write_photo

from useg.data.annotations.formats import (
    AnnotatedImage,
    Reading,
    parse_yaml_names,
    read_class_names,
)
from useg.data.annotations.shapes import Drawing
from useg.data.layouts import find_dataset
from useg.errors import DataError
from useg.machine import paused_garbage_collection


@pytest.mark.parametrize("content", ["{", "", "\x00", "[" * 100_000, '{"a": 1e'])
def test_invalid_json_is_refused(tmp_path, content):
    write_photo(tmp_path / "a.jpg")
    write_file(tmp_path / "x.json", content)
    with pytest.raises(
        DataError,
        match=r"x.json' is not valid JSON \(.*\); save or copy it again, or remove it",
    ):
        find_dataset(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "names: [cat, no, 1e3]",
        "names: ['cat', \"no\", 1e3]  # three",
        "names:\n  [\n    cat, # one\n    no,\n    1e3,\n  ]\nnc: 3",
        "names: {0: cat, 1: no, 2: 1e3}",
        "names:\n- cat\n- no\n- 1e3\nnc: 3",
        "nc: 3\nnames:   # list\n  # begins\n\n  - cat\n  - 'no'   # never false\n  - "
        "1e3\nroboflow:\n  license: MIT\n",
        "names:\n    0: cat\n    1: no\n    2: 1e3",
        "names:\r\n  0: cat\r\n  1: no\r\n  2: 1e3\r\n",
    ],
)
def test_yaml_names_are_text_however_they_are_written(text):
    assert parse_yaml_names(text, "x") == {0: "cat", 1: "no", 2: "1e3"}


def test_yaml_names_may_have_gaps_spaces_and_commas():
    assert parse_yaml_names('names: {3: "a, b", 7: traffic light}', "x") == {
        3: "a, b",
        7: "traffic light",
    }
    assert parse_yaml_names("other: [a]\nmy_names: [b]\n", "x") == {}
    assert parse_yaml_names("names: data/coco.names", "x") == {}


@given(st.text())
def test_random_yaml_is_read_or_refused(text):
    with contextlib.suppress(DataError):
        parse_yaml_names("names:" + text, "'data.yaml'")


def nested_aliases(depth: int) -> str:
    """Text that would have 10**depth names if every alias were expanded."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, depth + 1)]
    return "\n".join([*lines, f"names: *a{depth}"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (nested_aliases(30), "an entry in 'names:' that is not a number with a name"),
        ("names: &a [*a]", "is not valid YAML .*recursive"),
        ("names: " + "[" * 90_000, "is not valid YAML"),
        ("names:\n" + "- " * 40_000, "is not valid YAML"),
        ("names: [a", r"'data.yaml' is not valid YAML \(.*\); correct it, or remove it"),
        ('names: ["\\UFFFFFFFF"]', "is not valid YAML"),
        ("names: {? [a] : b}", "is not valid YAML"),
        ("names: {car: 0}", r"not a number with a name \('car'\); write for example '0: car'"),
        ("names: [[a, b]]", "not a number with a name"),
        ("names: {0: a, 10000000000: b}", "not a number with a name"),
        ("names: [a]\n#" + "x" * 100_000, "has more than 100,000 bytes, too many for a list"),
    ],
)
def test_hostile_yaml_is_refused_at_once(text, sentence):
    with pytest.raises(DataError, match=sentence):
        parse_yaml_names(text, "'data.yaml'")


def test_yaml_tags_run_no_code():
    text = "names: [!!python/object/apply:os.getcwd []]"
    with pytest.raises(DataError, match="not a number with a name"):
        parse_yaml_names(text, "'data.yaml'")


def test_yaml_files_without_names_are_skipped_even_if_they_are_invalid_or_large(tmp_path):
    write_file(tmp_path / "a.yaml", "hostnames: [\n")
    write_file(tmp_path / "b.yaml", "other: é" * 500_000)
    (tmp_path / "c.yaml").write_bytes(b"\xff names: [x]")
    write_file(tmp_path / "d.yaml", "\ufeffnames: [cat]")
    assert read_class_names(sorted(tmp_path.iterdir())) == {0: "cat"}
    write_file(tmp_path / "b.yaml", "names: [é" + "é" * 500_000)
    with pytest.raises(DataError, match=r"b.yaml' has more than 100,000 bytes"):
        read_class_names(sorted(tmp_path.iterdir()))


def test_an_image_that_many_rows_name_is_looked_up_once(tmp_path, monkeypatch):
    image, lookups = write_photo(tmp_path / "a.jpg"), []
    reading = Reading(tmp_path, [image])
    look_up = reading._find_candidates

    def count(entry):
        lookups.append(entry)
        return look_up(entry)

    monkeypatch.setattr(reading, "_find_candidates", count)
    for name in ("a.jpg", "b.jpg", "a.jpg", "b.jpg"):
        entry = AnnotatedImage(tmp_path / "a.csv", name, Drawing((), (0, 0)))
        assert reading.find(entry) == (image if name == "a.jpg" else None)
    assert len(lookups) == 2


def test_the_garbage_collector_continues_after_a_file_that_cannot_be_read():
    with paused_garbage_collection():
        assert not gc.isenabled()
    with pytest.raises(KeyError), paused_garbage_collection():
        raise KeyError
    assert gc.isenabled()
