"""What is written for annotation tools is read back as the same label maps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from useg.classes import ClassTable
from useg.data.annotations.platforms import decode_brush_rle, encode_brush_rle
from useg.data.dataset import read_label
from useg.data.layouts import find_dataset
from useg.errors import SettingsError
from useg.images.image_files import write_label
from useg.inference.outputs import OutputOptions, make_folders
from useg.inference.summaries import LabelledImage, write_summaries

TABLE = ClassTable(("background", "house & yard", "lawn"))


def label_map() -> np.ndarray:
    label = np.zeros((60, 80), np.uint8)
    y, x = np.mgrid[:60, :80]
    label[(y - 30) ** 2 + (x - 40) ** 2 < 400] = 1
    label[(y - 30) ** 2 + (x - 40) ** 2 < 100] = 2
    label[(y - 30) ** 2 + (x - 40) ** 2 < 30] = 0
    label[50:, :20] = 2
    return label


def export(folder: Path, tool: str) -> np.ndarray:
    """Write the label map for a tool beside its image, without useg's own label map."""
    label = label_map()
    image, target = folder / "a.jpg", folder / "a.png"
    PIL.Image.fromarray(np.dstack([label * 60] * 3)).save(image)
    write_label(target, label, TABLE)
    wanted = OutputOptions(overlays=False, tool=tool)
    make_folders(folder, wanted)
    write_summaries(folder, [LabelledImage(1, image, target, "a.jpg")], TABLE, wanted)
    # A second time it replaces its own file.
    write_summaries(folder, [LabelledImage(1, image, target, "a.jpg")], TABLE, wanted)
    target.unlink()
    return label


@pytest.mark.parametrize("tool", ["labelme", "cvat", "label-studio"])
def test_what_is_written_for_a_tool_gives_the_label_map_back(tmp_path, tool):
    label = export(tmp_path, tool)
    if tool == "label-studio":
        # Label Studio turns predictions into annotations when somebody accepts them.
        path = tmp_path / "label_studio.json"
        tasks = json.loads(path.read_text("utf-8"))
        tasks[0]["annotations"] = tasks[0].pop("predictions")
        path.write_text(json.dumps(tasks))
    dataset = find_dataset(tmp_path)
    assert set(dataset.classes.names) == set(TABLE.names)
    assert not dataset.skipped
    ids = np.array([TABLE.names.index(name) for name in dataset.classes.names])
    read = ids[read_label(dataset.pairs[0], dataset)]
    assert (read == label).mean() > (0.98 if tool == "labelme" else 0.9999)


def test_polygons_for_labelme_have_few_corners(tmp_path):
    export(tmp_path, "labelme")
    content = json.loads((tmp_path / "labelme" / "a.json").read_text("utf-8"))
    assert content["imagePath"] == "a.jpg"
    assert sum(len(shape["points"]) for shape in content["shapes"]) < 90


def test_brush_masks_are_reversed():
    for mask in (label_map() == 1, np.ones((3, 5), bool), np.zeros((300, 300), bool)):
        values = decode_brush_rle(bytes(encode_brush_rle(mask)), mask.size * 4)
        assert np.array_equal(values.reshape(*mask.shape, 4)[..., 3] > 0, mask)


def test_an_unknown_tool_is_refused():
    with pytest.raises(SettingsError, match="choose one of cvat, label-studio, labelme"):
        OutputOptions(tool="labelbox")
