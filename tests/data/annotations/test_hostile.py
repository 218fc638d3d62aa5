"""Annotation files that would take far more time or memory than they seem to are refused.

Each test has a control: without the limit, the same file is read.
"""

import json
import re
import time
import tracemalloc

import pytest
from made_annotations import write_file, write_photo

from useg.data.annotations import formats, run_lengths
from useg.data.annotations.formats import Reading, read_json, read_json_lines, read_xml
from useg.data.layouts import find_dataset
from useg.errors import DataError

NUM_IMAGES = 9


def list_coco(names):
    images = [{"id": k, "file_name": name} for k, name in enumerate(names)]
    shape = {"image_id": 0, "category_id": 1, "segmentation": [[1, 1, 6, 1, 6, 5]]}
    return {"images": images, "annotations": [shape], "categories": [{"id": 1, "name": "car"}]}


def list_via(names):
    shape = {"name": "rect", "x": 1, "y": 1, "width": 3, "height": 3}
    region = {"shape_attributes": shape, "region_attributes": {"class": "car"}}
    return {name: {"filename": name, "regions": [region]} for name in names}


def list_via3(names):
    about = {
        "project": {},
        "file": {str(k): {"fname": name} for k, name in enumerate(names)},
        "view": {str(k): {"fid_list": [str(k)]} for k in range(len(names))},
    }
    return about | {"metadata": {"a": {"vid": "0", "xy": [2, 1, 1, 3, 3], "av": {}}}}


def list_label_studio(names):
    value = {"x": 1, "y": 1, "width": 9, "height": 9, "rectanglelabels": ["car"]}
    result = [{"type": "rectanglelabels", "value": value}]
    return [{"data": {"image": name}, "annotations": [{"result": result}]} for name in names]


def list_cvat(names):
    box = '<box label="car" xtl="1" ytl="1" xbr="6" ybr="5"/>'
    images = (f'<image name="{name}" width="12" height="10">{box}</image>' for name in names)
    return f"<annotations>{''.join(images)}</annotations>"


def list_via_csv(names):
    quoted = '"{""name"":""rect"",""x"":1,""y"":1,""width"":3,""height"":3}"'
    rows = "".join(f"{name},{quoted},{{}}\n" for name in names)
    return f"filename,region_shape_attributes,region_attributes\n{rows}"


def list_run_lengths(names):
    return "ImageId,EncodedPixels\n" + "".join(f"{name},1 5\n" for name in names)


LISTS = {
    "coco.json": list_coco,
    "via.json": list_via,
    "via3.json": list_via3,
    "tasks.json": list_label_studio,
    "cvat.xml": list_cvat,
    "via.csv": list_via_csv,
    "runs.csv": list_run_lengths,
}


@pytest.mark.parametrize("file", LISTS)
def test_a_file_that_names_very_many_missing_images_is_refused(file, tmp_path, monkeypatch):
    write_photo(tmp_path / "p0.jpg")
    write_file(tmp_path / file, LISTS[file]([f"p{k}.jpg" for k in range(NUM_IMAGES)]))
    monkeypatch.setattr(formats, "MAX_MISSING_IMAGES", NUM_IMAGES - 2)
    with pytest.raises(
        DataError, match=f"{file}' names {NUM_IMAGES} images, but the data set has 1; put"
    ):
        find_dataset(tmp_path)
    monkeypatch.setattr(formats, "MAX_MISSING_IMAGES", NUM_IMAGES - 1)
    assert len(find_dataset(tmp_path, strict=False).masks) == NUM_IMAGES - 1


@pytest.mark.parametrize("file", LISTS)
def test_an_image_name_longer_than_any_path_is_refused(file, tmp_path):
    write_photo(tmp_path / "p0.jpg")
    for length, sentence in ((4096, "p0.jpg"), (4097, "has 4,097 characters")):
        write_file(tmp_path / file, LISTS[file](["p0.jpg", "x" * (length - 4) + ".jpg"]))
        try:
            found = find_dataset(tmp_path, strict=False)
            text = str((found.skipped, found.masks))
        except DataError as error:
            text = str(error)
        assert (sentence in text) == (length == 4097)
        assert len(text) < 10_000


MANY_NAMES = "".join(f"<n{k}/>" for k in range(1001))
MANY_ATTRIBUTES = "<a " + " ".join(f"n{k}='1'" for k in range(1001)) + "/>"


@pytest.mark.parametrize("content", [MANY_NAMES, MANY_ATTRIBUTES])
def test_xml_of_very_many_names_is_refused(content, tmp_path, monkeypatch):
    path = write_file(tmp_path / "a.xml", f"<annotations>{content}</annotations>")
    monkeypatch.setattr(formats, "_XML_PART_BYTES", 3000)
    with pytest.raises(DataError, match="it has more than 1,000 different names"):
        read_xml(path)
    monkeypatch.setattr(formats, "_MAX_XML_NAMES", 1010)
    assert len(read_xml(path)) == content.count("<")


def test_xml_is_parsed_alike_in_parts_of_any_size(tmp_path, monkeypatch):
    points = ";".join(f"{k},{k}" for k in range(300))
    path = write_file(tmp_path / "a.xml", f"<a><b points='{points}'>te&amp;xt ü</b><c/></a>")
    whole = read_xml(path)
    monkeypatch.setattr(formats, "_XML_PART_BYTES", 1)
    monkeypatch.setattr(formats, "_MAX_XML_PARTS", 10_000)
    parts = read_xml(path)
    assert [(e.tag, e.attrib, e.text) for e in parts.iter()] == [
        (e.tag, e.attrib, e.text) for e in whole.iter()
    ]
    assert parts[0].attrib["points"] == points


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("a.json", '[{"a":1}' + ',{"a":1}' * 99 + "]", read_json),
        ("a.json", "[[]" + ",[]" * 99 + "]", read_json),
        ("a.jsonl", "0\n" * 99, read_json_lines),
        ("a.xml", "<x>" + '<a b=""/>' * 99 + "</x>", read_xml),
        ("a.xml", "<x>" + "<a/>" * 99 + "</x>", read_xml),
    ],
)
def test_a_large_file_of_tiny_items_is_refused(name, content, read, tmp_path, monkeypatch):
    path = write_file(tmp_path / name, content)
    assert len(read(path)) >= 99
    monkeypatch.setattr(formats, "_LARGE_BYTES", 100)
    with pytest.raises(DataError, match="nested items in"):
        read(path)


RUN_ROWS = "".join(f"p0.jpg,class {k},{12 * k + 1} 1 {12 * k + 4} 2\n" for k in range(5))


@pytest.mark.parametrize(
    ("limit", "sentence"),
    [
        ("_MAX_ROWS", "has more than 4 rows of run lengths; remove"),
        ("_MAX_ROWS_OF_AN_IMAGE", "has more than 4 rows of run lengths of 'p0.jpg'"),
        ("MAX_DRAWN_CLASSES", "has more than 4 classes"),
    ],
)
def test_a_table_of_very_many_runs_or_classes_is_refused(limit, sentence, tmp_path, monkeypatch):
    write_photo(tmp_path / "p0.jpg")
    write_file(tmp_path / "runs.csv", "ImageId,ClassId,EncodedPixels\n" + RUN_ROWS)
    assert len(find_dataset(tmp_path).classes) == 6
    monkeypatch.setattr(run_lengths, limit, 4)
    with pytest.raises(DataError, match=sentence):
        find_dataset(tmp_path)


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        ("1 1 " * 120 + "1 1", "has a row of 121 run lengths for an image of 12x10 pixels"),
        ("5 1 7 " + "9" * 40, r"from pixel 5 to \d+, which overlap or do not fit"),
        ("9" * 18 + " " + "9" * 18, r"from pixel \d+ to \d+, which overlap or do not fit"),
    ],
)
def test_runs_that_no_image_can_have_are_refused(runs, sentence, tmp_path):
    write_photo(tmp_path / "p0.jpg")
    write_file(tmp_path / "runs.csv", f"ImageId,EncodedPixels\np0.jpg,{runs}\n")
    with pytest.raises(DataError, match=sentence):
        find_dataset(tmp_path)


def test_a_row_of_very_many_runs_takes_little_memory_beside_its_text():
    text = "1 1 " * 100_000 + "1 1"
    tracemalloc.start()
    try:
        assert run_lengths._RUNS.fullmatch(text)
        assert tracemalloc.get_traced_memory()[1] < len(text)
        # The control: a group that may give back what it took remembers each run.
        tracemalloc.reset_peak()
        assert re.fullmatch(run_lengths._RUNS.pattern.removesuffix("+"), text)
        assert tracemalloc.get_traced_memory()[1] > 10 * len(text)
    finally:
        tracemalloc.stop()


def test_only_some_keys_of_a_record_of_run_lengths_are_looked_at(tmp_path):
    write_photo(tmp_path / "p0.jpg")
    record = {"ImageId": "p0.jpg"} | {f"k{k}": "1 1 3 1 5 1" for k in range(30_000)}
    write_file(tmp_path / "runs.json", [record])
    # Columns of runs were looked up in a list of all of them: four seconds.
    started = time.process_time()
    assert len(find_dataset(tmp_path).classes) < 110
    assert time.process_time() - started < 0.5


def test_label_studio_regions_without_labels_take_no_time_each_for_all_others(tmp_path):
    write_photo(tmp_path / "p0.jpg")
    tasks = list_label_studio(["p0.jpg"])
    regions = tasks[0]["annotations"][0]["result"]
    regions += [{"id": str(k), "value": {}} for k in range(5000)]
    write_file(tmp_path / "tasks.json", tasks)
    # Each one was compared with all others, which took two seconds.
    started = time.process_time()
    assert len(find_dataset(tmp_path).pairs) == 1
    assert time.process_time() - started < 0.5


def test_json_lines_are_values_of_their_own(tmp_path):
    path = write_file(tmp_path / "a.jsonl", '\ufeff{"a": 1}\r\n\n[2, 3]\n')
    assert read_json_lines(path) == [{"a": 1}, [2, 3]]
    for content in ("1, 2\n", '{"a": 1}\n{"b"\n', "1\n2,\n"):
        with pytest.raises(DataError, match="does not have a JSON value in each line"):
            read_json_lines(write_file(path, content))


ONE_IMAGE = {
    "p0.json": (
        {"imagePath": "p0.jpg", "imageWidth": 12, "imageHeight": 10}
        | {"shapes": [{"label": "car", "shape_type": "polygon", "points": [[1, 1]] * 50}]}
    ),
    "p0_gtFine_polygons.json": (
        {"imgHeight": 10, "imgWidth": 12}
        | {"objects": [{"label": "car", "polygon": [[1, 1]] * 50}]}
    ),
    "p0.jpg.json": {
        "size": {"width": 12, "height": 10},
        "objects": [
            {
                "classTitle": "car",
                "geometryType": "polygon",
                "points": {"exterior": [[1, 1]] * 50, "interior": []},
            }
        ],
    },
    "p0.xml": "<Annotations><Annotation Name='car'><Regions><Region><Vertices>"
    + "<Vertex X='1' Y='2'/>" * 50
    + "</Vertices></Region></Regions></Annotation></Annotations>",
}
SPELLINGS = {
    "plain": str.encode,
    "escapes": lambda text: re.sub(
        r'(?<=")([a-z])(?=[A-Za-z]+":)', lambda found: f"\\u{ord(found[1]):04x}", text
    ).encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("file", ONE_IMAGE)
def test_very_many_points_of_one_image_are_refused_however_keys_are_spelled(
    file, spelling, tmp_path, monkeypatch
):
    if (file, spelling) == ("p0.xml", "escapes"):
        pytest.skip("names in XML have no escapes")
    write_photo(tmp_path / "p0.jpg")
    content = ONE_IMAGE[file]
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / file).write_bytes(SPELLINGS[spelling](text))
    assert len(find_dataset(tmp_path).pairs) == 1
    monkeypatch.setattr(formats, "_MAX_ITEMS_OF_AN_IMAGE", 40)
    with pytest.raises(DataError, match="points and other items for one image"):
        find_dataset(tmp_path)


def test_very_many_points_of_many_images_are_read(tmp_path, monkeypatch):
    write_photo(tmp_path / "p0.jpg")
    write_file(tmp_path / "coco.json", list_coco(["p0.jpg"]))
    monkeypatch.setattr(formats, "_MAX_ITEMS_OF_AN_IMAGE", 1)
    assert len(find_dataset(tmp_path).pairs) == 1
    assert Reading(tmp_path, []).check_count(tmp_path, 200_000) is None
