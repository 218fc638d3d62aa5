"""Classes of a data set become those of a model by name, by value, or as somebody confirms."""

import numpy as np
import pytest

from useg.classes import IGNORE, ClassTable
from useg.data.class_mapping import (
    ClassMapping,
    has_default_names,
    match_classes,
    parse_class_map,
    unnamed_classes_error,
)
from useg.errors import DataError, SettingsError

MODEL = ClassTable(("None", "Buildings", "Poles", "Vehicles"))


def test_equal_names_need_no_mapping() -> None:
    assert match_classes(ClassTable(MODEL.names, values=(9, 8, 7, 6)), MODEL, None, "data") is None


def test_another_order_and_plural_are_matched_by_name() -> None:
    own = ClassTable(("vehicle", "pole", "none"))
    mapping = match_classes(own, MODEL, None, "data")
    assert mapping
    assert mapping.ids == (3, 2, 0)
    label = np.uint8([[0, 1, 2, IGNORE]])
    assert mapping.apply(label).tolist() == [[3, 2, 0, IGNORE]]


def test_other_names_are_refused_with_a_mapping_to_confirm() -> None:
    own = ClassTable(("Sky", "Building", "Pole"))
    with pytest.raises(DataError) as error:
        match_classes(own, MODEL, None, "camvid")
    assert "camvid has the classes Sky, Building, Pole, but the model has None" in str(error.value)
    proposal = str(error.value).split("--map '")[1].split("'")[0]
    assert "Sky would be ignored" in str(error.value)
    mapping = match_classes(own, MODEL, parse_class_map(proposal), "camvid")
    assert mapping == ClassMapping(own, (IGNORE, 1, 2))
    assert mapping.describe(MODEL) == ("scored Building as Buildings, Pole as Poles; ignored Sky")


def test_several_classes_can_become_one() -> None:
    own = ClassTable(("Car", "Bus", "Poles"))
    mapping = match_classes(own, MODEL, {"Car": "Vehicles", "Bus": "Vehicles"}, "data")
    assert mapping == ClassMapping(own, (3, 3, 2))


def test_equal_values_are_equal_classes_if_confirmed() -> None:
    own = ClassTable(("a", "b"), values=(3, 1))
    assert match_classes(own, MODEL, "ids", "data") == ClassMapping(own, (3, 1))
    with pytest.raises(SettingsError, match="does not fit: b of data cannot be found among"):
        match_classes(ClassTable(("a", "b"), values=(3, 77)), MODEL, "ids", "data")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Car", "has the part 'Car'; write NAME=NAME"),
        ("Car=", "has the part 'Car='"),
        ("Car=Vehicles,,", "has the part ''"),
        ("Car=Vehicles,Car=Poles", "maps 'Car' to two classes"),
    ],
)
def test_a_mapping_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_class_map(text)


def test_unknown_names_in_a_mapping_are_refused_with_a_suggestion() -> None:
    own = ClassTable(("Car",))
    with pytest.raises(SettingsError, match="names the class 'Cra', but data has Car"):
        match_classes(own, MODEL, {"Cra": "Vehicles"}, "data")
    with pytest.raises(SettingsError, match=r"'Vehicle', but the model has .*Vehicles"):
        match_classes(own, MODEL, {"Car": "Vehicle"}, "data")
    with pytest.raises(SettingsError, match="the class mapping is 'same'; give 'ids'"):
        match_classes(own, MODEL, "same", "data")


def test_names_that_no_file_gave_are_recognised() -> None:
    assert has_default_names(ClassTable(("class 0", "class 12")))
    assert has_default_names(ClassTable(("background", "foreground")))
    assert has_default_names(ClassTable(("color #307020",)))
    assert not has_default_names(MODEL)
    assert "--map ids" in str(unnamed_classes_error(MODEL, "data"))
