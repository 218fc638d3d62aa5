"""The names of classes lie beside the masks, in any form; published ids are told apart."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from made_strangers import COLORS, NAMES, save, yard

from useg.classes import IGNORE
from useg.data.class_names import find_class_names
from useg.data.dataset import Dataset, read_label
from useg.data.layouts import find_dataset
from useg.errors import DataError, UsageError
from useg.reporting.inspection import inspect_dataset

pytestmark = pytest.mark.wheel

HEX = ["#{:02X}{:02x}{:02x}".format(*color) for color in COLORS]
ROWS = list(zip(NAMES, COLORS.tolist(), HEX, strict=True))


def write_yards(root: Path, stored: Callable[[np.ndarray], np.ndarray]) -> Path:
    for k in range(5):
        image, label = yard(k)
        save(root / "images" / f"photo{chr(97 + k)}.png", image)
        save(root / "masks" / f"photo{chr(97 + k)}.png", stored(label))
    return root


def decide(root: Path) -> Dataset:
    dataset = find_dataset(root)
    inspected = inspect_dataset(root).dataset
    assert (inspected.classes, inspected.notes) == (dataset.classes, dataset.notes)
    return dataset


FILES_OF_IDS = {
    "itksnap_labels.txt": "# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL\n"
    + "".join(
        f'    {k}   {r}  {g}  {b}        {k / 4:g}  1  1    "{name}"\n'
        for k, (name, (r, g, b), _) in enumerate(ROWS)
    ),
    "Slicer.ctbl": "# Color table file\n# 4 values\n"
    + "".join(f"{k} {name} {r} {g} {b} 255\n" for k, (name, (r, g, b), _) in enumerate(ROWS)),
    "mapping.csv": "class_name,label_key,has_instance,hex\n"
    + "".join(f"{name},{k},0,{color}\n" for k, (name, _, color) in enumerate(ROWS)),
    # The facades of CMP.
    "label_names.txt": "   label    zorder    labelname\n"
    + "".join(f"       {k}       {k // 2}    {name}\n" for k, name in enumerate(NAMES)),
    "numbered_keys.json": json.dumps({f"class_{k}": name for k, name in enumerate(NAMES)}),
    "_classes.csv": "Pixel Value, Class\n" + "".join(f"{k}, {n}\n" for k, n in enumerate(NAMES)),
    "codes.txt": "".join(f"{name}\n" for name in NAMES),
    "labels.txt": "".join(f"{k}: {name}\n" for k, name in enumerate(NAMES)),
    "classes.csv": "id;name;comment\n" + "".join(f"{k};{n};x\n" for k, n in enumerate(NAMES)),
    "map.txt": "".join(f"{n} {k}\n" for k, n in enumerate(NAMES)),
    "table.txt": "".join(f"{n}\t{k}\n" for k, n in enumerate(NAMES)),
    "dataset.json": json.dumps(
        {"labels": {name: k for k, name in enumerate(NAMES)}, "numTraining": 5}
    ),
    "id2label.json": json.dumps({str(k): name for k, name in enumerate(NAMES)}),
    "meta.json": json.dumps(
        {"classes": [{"title": n, "color": h, "id": k} for k, (n, _, h) in enumerate(ROWS)]}
    ),
    "mapping.json": json.dumps(NAMES),
    "mapping_of_rows.json": json.dumps(list(enumerate(NAMES))),
    "mapping_to_lists.json": json.dumps({k: [name] for k, name in enumerate(NAMES)}),
    "ids_in_lists.json": json.dumps({name: [k] for k, name in enumerate(NAMES)}),
    "numbered_labels.json": json.dumps([{"label": k, "name": n} for k, n in enumerate(NAMES)]),
    "legend.json": json.dumps([{"grey": k, "meaning": n} for k, n in enumerate(NAMES)]),
    "columns.json": json.dumps({"ids": [0, 1, 2, 3], "names": NAMES}),
    "config.json": json.dumps({"labels": [{"name": n, "color": c} for n, c, _ in ROWS]}),
    "data.yaml": f"path: .\nnc: 4\nnames: {json.dumps(NAMES)}\n",
    "names.yaml": "names:\n" + "".join(f"  {k}: {name}\n" for k, name in enumerate(NAMES)),
    "photoa.png.aux.xml": "<PAMDataset><PAMRasterBand band='1'><CategoryNames>"
    + "".join(f"<Category>{name}</Category>" for name in NAMES)
    + "</CategoryNames></PAMRasterBand></PAMDataset>",
    "style.qml": "<qgis><palette>"
    + "".join(
        f'<paletteEntry value="{k}" label="{n}" color="{h}"/>' for k, (n, _, h) in enumerate(ROWS)
    )
    + "</palette></qgis>",
}


@pytest.mark.parametrize("name", FILES_OF_IDS)
def test_ids_are_named_by_any_file(tmp_path: Path, name: str) -> None:
    write_yards(tmp_path, lambda label: label)
    (tmp_path / "masks" / name).write_text(FILES_OF_IDS[name])
    # Lists of pictures are no classes.
    (tmp_path / "train.txt").write_text("photoa\nphotob\nphotoc\nphotod\n")
    (tmp_path / "README.txt").write_text("four classes: made\n")
    dataset = decide(tmp_path)
    assert (dataset.classes.names, dataset.classes.values) == (NAMES, (0, 1, 2, 3))
    assert any(f"named by 'masks/{name}'" in note for note in dataset.notes)


FILES_OF_COLORS = {
    "class_dict.csv": "name,r,g,b\n"
    + "".join(f"{n},{c[0]},{c[1]},{c[2]}\n" for n, c, _ in ROWS)
    + "cat,0,0,9\n",
    "labelmap.txt": "# label:color_rgb:parts:actions\n"
    + "".join(f"{n}:{c[0]},{c[1]},{c[2]}::\n" for n, c, _ in ROWS)
    + "cat:0,0,9::\n",
    "label_colors.txt": "".join(f"{c[0]} {c[1]} {c[2]}\t{n}\n" for n, c, _ in ROWS)
    + "0 0 9\tcat\n",
    "legend.txt": "".join(f"{n} {c[0]} {c[1]} {c[2]}\n" for n, c, _ in ROWS) + "cat 0 0 9\n",
    "classes.json": json.dumps({"classes": [*({"name": n, "color": h} for n, _, h in ROWS)]})[:-2]
    + ', {"name": "cat", "color": "#000009"}]}',
    "colors.json": json.dumps({**{n: c for n, c, _ in ROWS}, "cat": [0, 0, 9]}),
    "mapping.json": json.dumps(
        {k: {"name": n, "color": c} for k, (n, c, _) in enumerate([*ROWS, ("cat", [0, 0, 9], "")])}
    ),
    "rows.json": json.dumps([*([n, c] for n, c, _ in ROWS), ["cat", [0, 0, 9]]]),
    "columns.json": json.dumps(
        {"classes": [*NAMES, "cat"], "palette": [*COLORS.tolist(), [0, 0, 9]]}
    ),
    "css.json": json.dumps(
        {**{n: "rgb({}, {}, {})".format(*c) for n, c, _ in ROWS}, "cat": "rgba(0,0,9,1)"}
    ),
    "hex.json": json.dumps({**{h: n for n, _, h in ROWS}, "#000009": "cat"}),
    "bare_hex.json": json.dumps({**{n: h[1:] for n, _, h in ROWS}, "cat": "000009"}),
    "bare_hex.csv": "name,color\n" + "".join(f"{n},{h[1:]}\n" for n, _, h in ROWS) + "cat,000009\n",
    "ids_and_colors.csv": "".join(
        f"{k + 7},{n},{c[0]},{c[1]},{c[2]}\n" for k, (n, c, _) in enumerate(ROWS)
    )
    + "3,cat,0,0,9\n",
}


@pytest.mark.parametrize("name", FILES_OF_COLORS)
def test_colours_are_named_by_any_file_in_its_order(tmp_path: Path, name: str) -> None:
    write_yards(tmp_path, lambda label: COLORS[label])
    (tmp_path / name).write_text(FILES_OF_COLORS[name])
    dataset = decide(tmp_path)
    assert dataset.classes.names == (*NAMES, "cat")
    assert np.array_equal(read_label(dataset.pairs[1], dataset), yard(1)[1])


def test_a_palette_is_named_by_colours(tmp_path: Path) -> None:
    order = np.array([2, 0, 3, 1])
    write_yards(tmp_path, lambda label: label)
    for path in (tmp_path / "masks").iterdir():
        with PIL.Image.open(path) as opened:
            indexed = PIL.Image.fromarray(np.array(opened))
        indexed.putpalette(COLORS.ravel().tolist())
        indexed.save(path)
    listed = [{"name": NAMES[k], "color": COLORS[k].tolist()} for k in order]
    (tmp_path / "config.json").write_text(json.dumps({"labels": listed}))
    dataset = decide(tmp_path)
    assert dataset.classes.names == tuple(NAMES[k] for k in order)
    assert dataset.classes.values == tuple(order.tolist())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.txt", "one\ntwo\n"),
        ("classes.json", '{"classes": ["a", "b"]}'),
        ("ids.csv", "id,name\n0,a\n1,b\n"),
        ("colors.csv", "name,r,g,b\na,1,2,3\nb,4,5,6\n"),
        ("broken.json", "{"),
        ("broken.xml", "<a>"),
        ("classes.yaml", "a: [&x b, *y]"),
        ("deep.json", "[" * 5000),
        ("scores.csv", "name,score\na,1\nb,2\nc,3\nd,4\ne,5\n"),
    ],
)
def test_a_file_that_the_masks_do_not_fit_names_nothing(
    tmp_path: Path, name: str, content: str
) -> None:
    write_yards(tmp_path, lambda label: label)
    (tmp_path / name).write_text(content)
    assert decide(tmp_path).classes.names == tuple(f"class {k}" for k in range(4))


def test_names_alone_are_counted_from_1_where_masks_are_or_reported_as_unused(
    tmp_path: Path,
) -> None:
    write_yards(tmp_path, lambda label: label + 1)
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    dataset = decide(tmp_path)
    assert (dataset.classes.names, dataset.classes.values) == (tuple(NAMES), (1, 2, 3, 4))
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "masks" / "classes.txt").write_text("one\ntwo\n")
    dataset = decide(tmp_path)
    assert dataset.classes.names == tuple(f"class {k}" for k in range(1, 5))
    assert "'masks/classes.txt' lists 2 classes and the masks have the values 1, 2, 3 and 4" in str(
        dataset.notes
    )


def test_two_levels_get_the_names_of_ids_0_and_1(tmp_path: Path) -> None:
    write_yards(tmp_path, lambda label: (label == 1) * np.uint8(255))
    (tmp_path / "dataset.json").write_text('{"labels": {"ground": 0, "hut": 1}}')
    table = decide(tmp_path).classes
    assert (table.names, table.values) == (("ground", "hut"), (0, 255))


def test_a_class_that_means_not_labelled_is_ignored_and_reported(tmp_path: Path) -> None:
    write_yards(tmp_path, lambda label: label)
    (tmp_path / "labels.csv").write_text("id,name\n0,Unlabeled\n1,hut\n2,lawn\n3,ball\n")
    dataset = decide(tmp_path)
    assert (dataset.classes.names, dataset.classes.ignore) == (("hut", "lawn", "ball"), (0,))
    assert "'Unlabeled' is ignored" in dataset.notes[-1]
    assert (read_label(dataset.pairs[0], dataset) == IGNORE).sum() == (yard(0)[1] == 0).sum()


def test_a_folder_of_a_thousand_text_files_is_read_once(tmp_path: Path) -> None:
    for k in range(20):
        save(tmp_path / "labels" / f"{k}.png", yard(k)[1]).with_suffix(".txt").write_text(
            "a 1\nb 2\n"
        )
    assert len(find_class_names(tmp_path)) == 1


def write_carla(root: Path, ids: list[int]) -> Path:
    for k in range(5):
        image, label = yard(k)
        red = np.array(ids, np.uint8)[label]
        save(root / "CameraRGB" / f"{k}.png", image)
        save(root / "CameraSeg" / f"{k}.png", np.dstack([red, red * 0, red * 0, red * 0 + 255]))
    return root


@pytest.mark.parametrize(
    ("ids", "names"),
    [
        ([0, 1, 7, 10], {"None", "Buildings", "Roads", "Vehicles"}),
        ([13, 1, 7, 10], {"Sky", "Buildings", "Roads", "Vehicles"}),
        ([11, 3, 1, 14], {"Sky", "Building", "Roads", "Car"}),
        ([11, 3, 1, 24], {"Sky", "Building", "Roads", "RoadLine"}),
    ],
)
def test_the_versions_of_carla_are_distinguished(
    tmp_path: Path, ids: list[int], names: set[str]
) -> None:
    dataset = find_dataset(write_carla(tmp_path, ids))
    assert {dataset.classes.names[dataset.classes.values.index(each)] for each in ids} == names
    assert bool(dataset.notes) == (max(ids) > 12)


def test_ids_of_two_versions_of_carla_are_asked_about(tmp_path: Path) -> None:
    write_carla(tmp_path, [11, 3, 1, 9])
    with pytest.raises(
        UsageError, match=r'choose with classes = "carla-0.8" or classes = "carla-0'
    ):
        find_dataset(tmp_path)
    (tmp_path / "dataset.toml").write_text('classes = "carla-0.9.14"\n')
    assert find_dataset(tmp_path).classes.names[1] == "Roads"
    assert inspect_dataset(tmp_path).classes[11] == "Sky"


OMNIVERSE = {
    str((*map(int, color), 255)): {"class": name} for name, color in zip(NAMES, COLORS, strict=True)
}
UNITY = {
    "spec": [
        {"label_name": name, "pixel_value": dict(zip("rgba", (*(color / 255), 1.0), strict=True))}
        for name, color in zip(NAMES, COLORS, strict=True)
    ]
}


@pytest.mark.parametrize("content", [OMNIVERSE, UNITY])
def test_colours_are_named_by_files_of_simulators(tmp_path: Path, content: object) -> None:
    write_yards(tmp_path, lambda label: COLORS[label])
    (tmp_path / "labels.json").write_text(json.dumps(content))
    assert decide(tmp_path).classes.names == NAMES


def test_files_that_name_one_value_differently_for_each_image_are_refused(tmp_path: Path) -> None:
    # LabelMe's json_to_dataset counts the classes of each image anew.
    for k in range(4):
        pixels, label = yard(k)
        save(tmp_path / f"{k}_json" / "img.png", pixels)
        save(tmp_path / f"{k}_json" / "label.png", label)
        (tmp_path / f"{k}_json" / "label_names.txt").write_text("\n".join(NAMES))
    assert decide(tmp_path).classes.names == NAMES
    swapped = [NAMES[k] for k in (0, 2, 1, 3)]
    (tmp_path / "2_json" / "label_names.txt").write_text("\n".join(swapped))
    with pytest.raises(DataError, match=r"0_json/label_names.txt' and '.*2_json.*different names"):
        find_dataset(tmp_path)
    (tmp_path / "2_json" / "label_names.txt").unlink()
    # A file that lies elsewhere is about other masks.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "label_names.txt").write_text("\n".join(swapped))
    assert decide(tmp_path).classes.names == NAMES


UNRELATED = {
    "image-labels.csv": "video_01,Lower GI,polyps\nvideo_02,Upper GI,z-line\n",
    "labels.json": json.dumps({"categories": [{"id": 1, "name": "Cell"}, {"id": 2, "name": "Nu"}]}),
}


@pytest.mark.parametrize(
    "content",
    [
        [{"photo": k, "place": name} for k, name in enumerate(("a", "b", "b", "c"))],
        [{"count": k, "place": name, "by": "me"} for k, name in enumerate("abcd")],
        {"classes": list(NAMES), "counts": [9, 7, 5]},
        [["a", "b"], ["c", "d"]],
    ],
)
def test_json_of_something_else_gives_masks_no_ids(tmp_path: Path, content: object) -> None:
    write_yards(tmp_path, lambda label: label)
    (tmp_path / "statistics.json").write_text(json.dumps(content))
    assert not any("statistics.json'; a classes.toml" in note for note in decide(tmp_path).notes)


@pytest.mark.parametrize("name", UNRELATED)
def test_a_table_of_something_else_names_no_classes(tmp_path: Path, name: str):
    write_yards(tmp_path, lambda label: (label > 1).astype(np.uint8) * 255)
    (tmp_path / name).write_text(UNRELATED[name])
    assert decide(tmp_path).classes.names == ("background", "foreground")
