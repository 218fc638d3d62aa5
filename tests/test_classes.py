"""What a mask stores <-> label map, and the class table in a file."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from useg.classes import (
    CAMVID,
    CARLA,
    CITYSCAPES,
    IGNORE,
    ClassTable,
    count_pixels,
    most_probable,
    palette,
    read_classes,
    spread_colors,
    to_color,
    to_label,
    write_classes,
)
from useg.errors import UsageError

pytestmark = pytest.mark.wheel

TWO = ClassTable(("membrane", "cell"), values=(0, 255))
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@st.composite
def tables(draw: st.DrawFn) -> ClassTable:
    count = draw(st.integers(1, 12))
    return ClassTable(
        names=tuple(draw(st.lists(names, min_size=count, max_size=count))),
        colors=tuple(
            draw(
                st.lists(
                    st.tuples(*[st.integers(0, 255)] * 3),
                    min_size=count,
                    max_size=count,
                    unique=True,
                )
            )
        ),
        values=tuple(
            draw(st.lists(st.integers(0, 65535), min_size=count, max_size=count, unique=True))
        ),
        ignore=tuple(draw(st.lists(st.integers(0, 65535), max_size=3))),
        by_color=draw(st.booleans()),
    )


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3, 1 << 20), (2050, 600)])
def test_pixels_of_all_classes_are_counted(shape: tuple[int, int]) -> None:
    label = np.random.default_rng(0).integers(0, 9, shape).astype(np.uint8)
    label[0, 0] = IGNORE
    for each in (label, label[::-1, ::2]):
        assert count_pixels(each, 6).tolist() == [int((each == k).sum()) for k in range(6)]


@settings(deadline=None)
@given(tables())
def test_a_table_written_is_the_table_read(table):
    with tempfile.TemporaryDirectory() as folder:
        write_classes(Path(folder, "classes.toml"), table)
        assert read_classes(Path(folder, "classes.toml")) == table


@settings(deadline=None)
@given(tables(), st.data())
def test_encoding_undoes_decoding(table, data):
    label = data.draw(hnp.arrays(np.uint8, (3, 4), elements=st.integers(0, len(table) - 1)))
    stored = to_color(label, table) if table.by_color else np.array(table.values, np.uint16)[label]
    assert np.array_equal(to_label(stored, table), label)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.uint32])
def test_every_integer_type_is_decoded(dtype):
    assert to_label(np.array([[0, 255]], dtype), TWO).tolist() == [[0, 1]]


def test_booleans_are_zero_and_one():
    assert to_label(np.array([[False, True]]), ClassTable(("a", "b"))).tolist() == [[0, 1]]


def test_ignored_values_become_255():
    assert to_label(np.array([[0, 10, 11]], np.uint8), CAMVID).tolist() == [[0, 10, IGNORE]]
    assert to_label(np.array([[7, 33, 4]], np.uint8), CITYSCAPES).tolist() == [[0, 18, IGNORE]]


def test_negative_values_are_ignored():
    table = ClassTable(("a", "b"), ignore=(-9999,))
    assert to_label(np.array([[0, -1, 1, -9999]], np.int16), table).tolist() == [
        [0, IGNORE, 1, IGNORE]
    ]


def test_ignored_colours_become_255():
    table = ClassTable(("red",), ((255, 0, 0),), ignore=(0x000000, 0x0000FF), by_color=True)
    assert to_label(
        np.array([[[255, 0, 0], [0, 0, 0], [0, 0, 255]]], np.uint8), table
    ).tolist() == [[0, IGNORE, IGNORE]]


def test_an_unknown_value_is_named_with_its_place_and_the_way_out():
    mask = np.zeros((5, 10), np.uint8)
    mask[3, 9] = 17
    with pytest.raises(UsageError) as caught:
        to_label(mask, CARLA, "mask 'a.png'")
    assert str(caught.value) == (
        "mask 'a.png' has the value 17 at (row 3, column 9), but there are 13 classes (0-12); "
        "map it in classes.toml or set ignore = [17]"
    )
    with pytest.raises(UsageError, match=r"11 classes \(0-10; ignored: 11\)"):
        to_label(mask, CAMVID)


def test_an_unknown_colour_is_named_with_its_place_and_the_way_out():
    table = ClassTable(("a", "b"), ((0, 0, 0), (9, 9, 9)), by_color=True)
    with pytest.raises(
        UsageError,
        match=r"colour \(1, 2, 3\) at \(row 0, column 0\), which is not a colour of the 2 "
        r".* set ignore = \[0x010203\]",
    ):
        to_label(np.array([[[1, 2, 3]]], np.uint8), table)
    with pytest.raises(
        UsageError,
        match=(
            "does not have three bands, but the class table says that masks store colours; set "
            "by_color = false"
        ),
    ):
        to_label(np.zeros((2, 2), np.uint8), table)


def test_what_is_no_mask_is_refused():
    with pytest.raises(UsageError, match="values from 0 to 70000"):
        to_label(np.array([[0, 70000]], np.int32), CARLA)
    with pytest.raises(
        UsageError, match=r"holds float32 values of shape \(1, 1\), but a mask holds one band"
    ):
        to_label(np.zeros((1, 1), np.float32), CARLA)
    with pytest.raises(UsageError, match=r"shape \(1, 1, 3\), but a mask holds one band"):
        to_label(np.zeros((1, 1, 3), np.uint8), CARLA)


def test_impossible_tables_are_refused():
    with pytest.raises(UsageError, match="a class table has 0 classes, but 1 to 255 are possible"):
        ClassTable(())
    with pytest.raises(UsageError, match="has 256 classes"):
        ClassTable(tuple(str(k) for k in range(256)))
    with pytest.raises(
        UsageError, match="2 names, 1 colours and 2 values; each class needs one; check"
    ):
        ClassTable(("a", "b"), ((0, 0, 0),))
    with pytest.raises(
        UsageError, match=r"has the values -1-0, but a mask stores whole numbers from 0 to 65535"
    ):
        ClassTable(("a", "b"), values=(0, -1))
    with pytest.raises(UsageError, match="a colour that is not three numbers from 0 to 255"):
        ClassTable(("a",), ((0, 0, 256),))
    with pytest.raises(UsageError, match="ignores -4294967296, but mask files store whole numbers"):
        ClassTable(("a",), ignore=(-1 << 32,))
    with pytest.raises(
        UsageError, match="gives the value 1 to two classes, but each needs its own; check"
    ):
        ClassTable(("a", "b"), values=(1, 1))
    for value in (True, 1.0, "1", 2**70):
        with pytest.raises(UsageError, match=r"check classes\.toml"):
            ClassTable(("a",), values=(value,))
    with pytest.raises(UsageError, match="a class table has the name 5, but a name is a text of 1"):
        ClassTable((5,))
    for name in ("", "n" * 201):
        with pytest.raises(UsageError, match="a name is a text of 1 to 200 characters"):
            ClassTable((name,))
    with pytest.raises(UsageError, match=r"gives the colour \(1, 1, 1\) to two classes"):
        ClassTable(("a", "b"), ((1, 1, 1), (1, 1, 1)), by_color=True)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[[class", "is not a class table"),
        (
            "ignore = [1]",
            "is not a class table .*needs one \\[\\[class\\]\\] with a name per class",
        ),
        ("[[class]]\nvalue = 3", "is not a class table \\('name'\\)"),
        ('class = "road"', "is not a class table"),
        ('[[class]]\nname = "a"\ncolor = [1, 2]', "is not a class table"),
        (
            '[[class]]\nname = "a"\ncolour = [1, 2, 3]',
            "has the key 'colour'; known are name, value, color, objects; did you mean 'color'\\?",
        ),
        (
            'ignored = [3]\n[[class]]\nname = "a"',
            "has the key 'ignored'; known are class, ignore, by_color; did you mean 'ignore'\\?",
        ),
        ('[[class]]\nname = "a"\nvalue = "x"', "is not a class table"),
        ('[[class]]\nname = "a"\nvalue = 1.5', "is not a class table .*1.5 is not a whole number"),
        ('[[class]]\nname = "a"\nvalue = inf', "is not a class table"),
        ('[[class]]\nname = "a"\nvalue = ' + "9" * 5000, "is not a class table"),
        ("[[class]]\nname = {b = 1}", "is not a class table .* is not a name"),
        ('by_color = "false"\n[[class]]\nname = "a"', "neither true nor false"),
        ("class = " + "[" * 5000, "is not a class table .it is nested too deeply"),
        ("a" + ".a" * 5000 + " = 1", "is not a class table .line 1 has more than 100 dots"),
        ("# " + "x" * (1 << 18), "is not a class table .it has more than 262,144 bytes"),
        (f'ignore = [{1 << 24}]\n[[class]]\nname = "a"', "ignores 16777216, but mask files store"),
    ],
)
def test_a_wrong_file_is_one_clear_sentence(tmp_path, content, sentence):
    (tmp_path / "classes.toml").write_text(content)
    with pytest.raises(UsageError, match=sentence):
        read_classes(tmp_path / "classes.toml")
    with pytest.raises(UsageError, match=r"none.toml is not a class table \(.*No such file"):
        read_classes(tmp_path / "none.toml")


def test_values_and_colours_have_defaults(tmp_path):
    (tmp_path / "classes.toml").write_text(
        '[[class]]\nname = "sky"\n[[class]]\nname = "road"\nvalue = 7\ncolor = [1, 2, 3]\n'
    )
    table = read_classes(tmp_path / "classes.toml")
    assert table.values == (0, 7)
    assert table.colors == ((0, 0, 0), (1, 2, 3))


def test_known_tables_are_consistent():
    assert (len(CARLA), len(CAMVID), len(CITYSCAPES)) == (13, 11, 19)
    for table in (CARLA, CAMVID, CITYSCAPES):
        assert len(set(table.colors)) == len(table)
        assert not set(table.values) & set(table.ignore)


def test_colours_are_told_apart():
    colors = np.array(spread_colors(40), int)
    assert colors[0].tolist() == [0, 0, 0]
    assert len({tuple(color) for color in colors.tolist()}) == 40


def test_painting_is_black_outside_the_table():
    assert to_color(np.array([[4, 200, IGNORE]], np.uint8), CARLA).tolist() == [
        [[220, 20, 60], [0, 0, 0], [0, 0, 0]]
    ]
    assert palette(CARLA).shape == (256, 3)


@pytest.mark.parametrize("shape", [(1, 3, 4), (13, 64, 96), (255, 2, 3), (3, 300, 90)])
def test_of_equal_logits_the_first_class_counts(shape):
    logits = np.random.default_rng(0).integers(0, 3, shape).astype(np.float32)
    prediction = most_probable(logits)
    assert prediction.dtype == np.uint8
    np.testing.assert_array_equal(prediction, logits.argmax(0))
