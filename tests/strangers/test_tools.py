"""Exports of annotation tools, as strangers bring them, are read exactly or asked about."""

import json

import numpy as np
import pytest
from made_strangers import save, yard
from made_strangers_tools import NUM_YARDS, TOOLS, expected, label_studio_masks, write_file

from useg.data.dataset import read_sample
from useg.data.layouts import find_dataset
from useg.errors import DataError


@pytest.mark.parametrize("tool", TOOLS)
def test_the_export_of_a_tool_is_read_exactly(tmp_path, tool):
    TOOLS[tool](tmp_path)
    dataset = find_dataset(tmp_path)
    assert sorted(dataset.classes.names) == ["background", "ball", "house", "lawn"]
    assert (len(dataset.pairs), dataset.skipped) == (NUM_YARDS, ())
    order = np.argsort(np.argsort(dataset.classes.names))
    for k, pair in enumerate(dataset.pairs):
        label = order[read_sample(pair, dataset).label]
        assert np.array_equal(label, expected(k)), pair.image


def test_masks_of_label_studio_without_the_json_are_asked_about(tmp_path):
    label_studio_masks(tmp_path)
    (tmp_path / "project.json").unlink()
    with pytest.raises(DataError, match=r"export the project as JSON too|masks"):
        find_dataset(tmp_path)


def test_label_studio_says_which_of_several_annotations_it_reads(tmp_path):
    TOOLS["label studio, brush"](tmp_path)
    path = tmp_path / "project-3-at-2026-01-05.json"
    tasks = json.loads(path.read_text("utf-8"))
    tasks[0]["annotations"][1]["was_cancelled"] = False
    tasks[1]["annotations"] = []
    path.write_text(json.dumps(tasks), "utf-8")
    dataset = find_dataset(tmp_path)
    said = " ".join(passed.reason for passed in dataset.skipped)
    assert "1 task with several annotations" in said
    assert "1 task without an annotation, whose images are left out" in said
    assert len(dataset.pairs) == NUM_YARDS - 1


def test_coordinates_of_label_studio_turn_about_the_first_corner(tmp_path):
    save(tmp_path / "a.png", yard(0)[0])
    value = {"x": 50, "y": 25, "width": 25, "height": 25, "rotation": 90, "rectanglelabels": ["x"]}
    region = {"original_width": 48, "original_height": 32, "value": value}
    tasks = [{"id": 1, "data": {"image": "a.png"}, "annotations": [{"id": 1, "result": [region]}]}]
    write_file(tmp_path / "p.json", tasks)
    dataset = find_dataset(tmp_path)
    rows, columns = np.nonzero(read_sample(dataset.pairs[0], dataset).label)
    assert (rows.min(), rows.max() + 1) == (8, 20)
    assert (columns.min(), columns.max() + 1) == (16, 24)


@pytest.mark.parametrize("suffix", ["xml", "json", "regions.txt"])
def test_an_unknown_format_of_files_named_after_images_is_mentioned(tmp_path, suffix):
    content = {"xml": "<ASAP_Annotations/>", "json": "[{}]", "regions.txt": "0 0 1 1"}
    for k in range(3):
        save(tmp_path / f"slide_{k}.png", yard(k)[0])
        write_file(tmp_path / f"slide_{k}.{suffix}", content[suffix])
    with pytest.raises(DataError, match=r"does not know the format of '.*slide_0.*COCO, LabelMe"):
        find_dataset(tmp_path)


def test_the_masks_of_nuimages_are_saved_by_its_devkit(tmp_path):
    save(tmp_path / "samples" / "a.png", yard(0)[0])
    write_file(tmp_path / "object_ann.json", [{"sample_data_token": "a", "mask": {"counts": ""}}])
    with pytest.raises(DataError, match=r"the format nuImages, which .* get_segmentation"):
        find_dataset(tmp_path)
