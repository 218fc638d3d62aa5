"""More kinds of data sets as strangers have them: tables of paths, odd masks, tables of classes.

What a sensible user expects is read, or is said with a way out.
"""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
import pytest
from made_strangers import COLORS, HEIGHT, NAMES, WIDTH, blobs, paint, save, yard

from useg.classes import IGNORE
from useg.data.dataset import Dataset, read_label
from useg.data.layouts import find_dataset
from useg.data.splits import open_dataset
from useg.errors import DataError
from useg.images.image_files import read_image
from useg.reporting.inspection import inspect_dataset

Change = Callable[[np.ndarray, int], np.ndarray]


def same(label: np.ndarray, _: int) -> np.ndarray:
    return label


def ellipses(k: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture of 96 x 96 pixels with four ellipses, and its label map."""
    rng = np.random.default_rng(k)
    label = np.zeros((96, 96), np.uint8)
    y, x = np.mgrid[:96, :96]
    for value in (1, 2, 3, 1):
        row, column, radius = rng.integers(12, 84), rng.integers(12, 84), rng.integers(8, 20)
        label[(y - row) ** 2 * (1 + value / 3) + (x - column) ** 2 < radius**2] = value
    return paint(COLORS[label], rng), label


def write(
    root: Path,
    change: Change = same,
    image: str = "images/{k}.png",
    mask: str = "masks/{k}.png",
    count: int = 8,
    picture: Callable[[int], tuple[np.ndarray, np.ndarray]] = yard,
) -> Path:
    """Write pictures with changed label maps; ``{k}`` in the names is the number."""
    for k in range(count):
        pixels, label = picture(k)
        save(root / image.format(k=k), pixels)
        save(root / mask.format(k=k), change(label, k))
    return root


def kinds(root: Path, severity: str = "error") -> set[str]:
    return {each.kind for each in inspect_dataset(root).findings if each.severity == severity}


def is_true(dataset: Dataset, numbers: dict[str, int]) -> bool:
    """Whether the labels are those of the yards, whose numbers the image files stand for."""
    return all(
        np.array_equal(read_label(pair, dataset), yard(numbers[pair.image.name])[1])
        for pair in dataset.pairs
    )


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("Bilder/Straße {k}.jpg", "Masken/Straße {k}_Maske.png"),
        ("Images d'entrée/cliché n°{k}.jpg", "Masques/cliché n°{k} (masque).png"),
        ("画像/写真{k}.jpg", "マスク/写真{k}.png"),
        ("图{k}.jpg", "图{k}_标签.png"),
        ("IMG_{k}.JPG", "IMG_{k}_MASK.PNG"),
        ("images/img[{k}] #1 %20.png", "masks/img[{k}] #1 %20.png"),
        ("P{k}/2019.01.1{k}/001.png", "P{k}/2019.01.1{k}/001_seg.png"),
        ("{k}.jpg", "{k}.jpg.mask.png"),
    ],
)
def test_names_in_any_language_and_order_are_paired(tmp_path: Path, image: str, mask: str) -> None:
    dataset = find_dataset(write(tmp_path, image=image, mask=mask))
    assert len(dataset.pairs) == 8
    assert all(
        np.array_equal(read_label(p, dataset), yard(k)[1]) for k, p in enumerate(dataset.pairs)
    )


def test_folders_of_operating_systems_are_no_part_of_the_data(tmp_path: Path) -> None:
    write(tmp_path)
    for name in ("@eaDir/0.png/THUMB.jpg", "__MACOSX/images/0.png", ".ipynb_checkpoints/0.png"):
        save(tmp_path / "images" / name, yard(9)[0])
    assert (len(find_dataset(tmp_path).pairs), find_dataset(tmp_path).notes) == (8, ())


TABLES = {
    "train.csv": ("image_path,mask_path", "{image},{mask}"),
    "a/list.tsv": ("label\timage", "/disk/me/{mask}\tC:\\data\\{image}"),
    "train.txt": ("", "{image} {mask}"),
    "pairs.csv": ("nr;mask;photo", "{k};{mask};{image}"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_paths_pairs_files_whose_names_do_not_agree(tmp_path: Path, name: str) -> None:
    header, line = TABLES[name]
    rng, lines, numbers = np.random.default_rng(0), [header] if header else [], {}
    for k in range(8):
        pixels, label = yard(k)
        image, mask = (f"{folder}/{rng.integers(1 << 60):015x}.png" for folder in ("a", "b"))
        save(tmp_path / image, pixels)
        save(tmp_path / mask, label)
        lines.append(line.format(k=k, image=image, mask=mask))
        numbers[Path(image).name] = k
    save(tmp_path / "other.png", yard(9)[0])
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    dataset = open_dataset(tmp_path)
    assert len(dataset.pairs) == 8
    assert is_true(dataset, numbers)
    assert dataset.of("val")
    assert f"images and masks are paired as in {name}" in dataset.notes
    assert "1 other image file not named in any table: left out" in dataset.notes
    (tmp_path / name).write_text("\n".join([*lines, line.format(k=8, image=image, mask="b")]))
    assert len(find_dataset(tmp_path).pairs) == 8


def test_a_table_of_paths_may_have_splits_but_no_two_masks_of_one_image(tmp_path: Path) -> None:
    rows = ["image,mask,split"]
    for k, letter in enumerate("qwertz"):
        save(tmp_path / f"{letter}.png", yard(k)[0])
        save(tmp_path / f"{chr(97 + k) * 3}.png", yard(k)[1])
        rows.append(f"{letter}.png,{chr(97 + k) * 3}.png,{'test' if k > 3 else 'train'}")
    (tmp_path / "data.csv").write_text("\n".join(rows))
    assert [pair.split for pair in find_dataset(tmp_path).pairs].count("test") == 2
    (tmp_path / "data.csv").write_text("\n".join([*rows, "q.png,bbb.png,train"]))
    with pytest.raises(DataError, match=r"names two masks for '.*q.png'"):
        find_dataset(tmp_path)


def test_a_split_csv_of_another_program_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    lines = [f"{k}.png,{'Training' if k < 6 else 'TEST'}" for k in range(8)]
    text = "\n".join(["filename,set", *lines])
    for content in (text, text.replace(",", ";"), text.replace(",", "\t")):
        for encoding in ("utf-8", "utf-16"):
            (tmp_path / "split.csv").write_text(content, encoding)
            splits = [pair.split for pair in find_dataset(tmp_path).pairs]
            assert splits == ["train"] * 6 + ["test"] * 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Farben.csv", "Klasse;R;G;B\n{rows:{name};{r};{g};{b}}"),
        ("label_colors.txt", "{rows:{name}: ({r}, {g}, {b})}"),
        ("colours.txt", "{rows:[{r},{g},{b}] {name}}"),
        ("Klassen.csv", "Nr;Bezeichnung\n{rows:{k};{name}}"),
        ("classes.tsv", "nom\tvaleur\n{rows:{name}\t{k}}"),
    ],
)
def test_tables_of_classes_in_other_shapes_and_languages_are_read(
    tmp_path: Path, name: str, text: str
) -> None:
    has_colors = "{r}" in text
    write(tmp_path, lambda label, _: COLORS[label] if has_colors else label)
    head, _, row = text.partition("{rows:")
    rows = [
        row[:-1].format(k=k, name=each, r=r, g=g, b=b)
        for k, (each, (r, g, b)) in enumerate(zip(NAMES, COLORS.tolist(), strict=True))
    ]
    (tmp_path / name).write_text(head + "\n".join(rows) + "\n")
    assert find_dataset(tmp_path).classes.names == NAMES


def test_names_that_count_from_one_are_not_given_to_masks_that_count_from_zero(
    tmp_path: Path,
) -> None:
    write(tmp_path)
    rows = [f"{k},{name}" for k, name in enumerate(NAMES, 1)]
    (tmp_path / "classes.csv").write_text("\n".join(["id,name", *rows]))
    dataset = find_dataset(tmp_path)
    assert dataset.classes.names == ("class 0", "class 1", "class 2", "class 3")
    assert (
        "'classes.csv' numbers its classes from 1, but the masks number them from 0"
        in dataset.notes[0]
    )


@pytest.mark.parametrize("noise", [0.02, 1.0])
def test_noisy_black_and_white_is_two_classes_and_repaired(tmp_path: Path, noise: float) -> None:
    def noisy(label: np.ndarray, k: int) -> np.ndarray:
        rng = np.random.default_rng(k)
        change = rng.integers(0, 4, label.shape) * (rng.random(label.shape) < noise)
        return np.where(label == 3, 255 - change, change).astype(np.uint8)

    write(tmp_path / "data", noisy, picture=ellipses)
    with pytest.raises(DataError, match=r"useg inspect DATA --fix OUT"):
        find_dataset(tmp_path / "data")
    survey = inspect_dataset(tmp_path / "data", fix=tmp_path / "out")
    assert "smeared mask" in {each.kind for each in survey.findings}
    assert len(survey.classes) == 2
    mended = find_dataset(tmp_path / "out")
    assert all(
        np.array_equal(read_label(pair, mended), ellipses(k)[1] == 3)
        for k, pair in enumerate(mended.pairs)
    )


def test_ids_beside_high_ids_that_do_not_count_stay_classes(tmp_path: Path) -> None:
    def with_void(label: np.ndarray, _: int) -> np.ndarray:
        return np.where(np.arange(HEIGHT)[:, None] < 3, 254, label % 3).astype(np.uint8)

    dataset = find_dataset(write(tmp_path, with_void))
    assert dataset.classes.values == (0, 1, 2, 254)
    assert "254 beside ids up to 2 may mean that pixels have no label" in dataset.notes[0]


@pytest.mark.parametrize("value", [0, 7])
def test_a_border_between_all_areas_is_reported(tmp_path: Path, value: int) -> None:
    def bordered(label: np.ndarray, _: int) -> np.ndarray:
        drawn = label + 1
        drawn[1:][label[1:] != label[:-1]] = value
        drawn[:, 1:][label[:, 1:] != label[:, :-1]] = value
        return drawn

    dataset = find_dataset(write(tmp_path / "a", bordered))
    assert f"set ignore = [{value}]" in dataset.notes[0]
    assert find_dataset(write(tmp_path / "b")).notes == ()


def test_the_border_of_pascal_voc_is_ignored_in_colours_too(tmp_path: Path) -> None:
    voc = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)], np.uint8)

    def bordered(label: np.ndarray, _: int) -> np.ndarray:
        colors = voc[label]
        colors[1:][label[1:] != label[:-1]] = (224, 224, 192)
        return colors

    dataset = find_dataset(write(tmp_path, bordered))
    assert len(dataset.classes) == 4
    assert "#e0e0c0 is ignored" in dataset.notes[0]
    assert (read_label(dataset.pairs[0], dataset) == IGNORE).any()


def test_trimaps_with_other_values_are_no_pets(tmp_path: Path) -> None:
    levels = np.array([0, 128, 255, 255], np.uint8)
    write(tmp_path, lambda label, _: levels[label], mask="trimaps/{k}.png")
    assert find_dataset(tmp_path).classes.values == (0, 128, 255)


def test_an_array_with_a_band_for_each_class_holds_ids(tmp_path: Path) -> None:
    write(tmp_path)
    for path in list((tmp_path / "masks").iterdir()):
        np.save(path.with_suffix(".npy"), np.asarray(PIL.Image.open(path))[..., None] == range(4))
        path.unlink()
    dataset = find_dataset(tmp_path)
    assert np.array_equal(read_label(dataset.pairs[3], dataset), yard(3)[1])


@pytest.mark.parametrize("name", ["metadata.csv", "utf16.csv", "metadata.jsonl", "output.manifest"])
def test_a_table_wins_where_a_few_names_agree_by_accident(tmp_path: Path, name: str) -> None:
    rows = []
    for k in range(8):
        pixels, label = yard(k)
        save(tmp_path / f"pic{k * 5}.jpg", pixels)
        save(tmp_path / "ann" / f"z{k * 3 % 8}.png", label)
        rows.append({"file_name": f"pic{k * 5}.jpg", "mask": f"ann/z{k * 3 % 8}.png", "id": k})
    if name.endswith(".csv"):
        lines = ["file_name,mask", *(f"{row['file_name']},{row['mask']}" for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    encoding = "utf-16" if name == "utf16.csv" else "utf-8"
    (tmp_path / name).write_text("\n".join(lines), encoding)
    dataset = find_dataset(tmp_path)
    assert {pair.image.name: pair.mask.name for pair in dataset.pairs} == {
        f"pic{k * 5}.jpg": f"z{k * 3 % 8}.png" for k in range(8)
    }


def test_probabilities_are_refused_with_what_to_do(tmp_path: Path) -> None:
    def likely(label: np.ndarray, k: int) -> np.ndarray:
        return (label / 4 + np.random.default_rng(k).random(label.shape) / 9).astype(np.float32)

    write(tmp_path, likely, mask="prob/{k}.tif")
    with pytest.raises(DataError, match=r"names of images/\*.png and prob/\*.tif agree, but both"):
        find_dataset(tmp_path)


def count_runs(mask: np.ndarray, order: Literal["C", "F"]) -> str:
    """Kaggle's run lengths: starts, counted from 1, and lengths."""
    steps = np.diff(np.concatenate([[0], mask.ravel(order), [0]]).astype(int))
    starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    runs = zip(starts, ends, strict=True)
    return " ".join(f"{start + 1} {end - start}" for start, end in runs)


RUN_TABLES = ("ImageId,ClassId,EncodedPixels", "ImageId_ClassId,EncodedPixels", "id,class,rle")


@pytest.mark.parametrize("header", RUN_TABLES)
@pytest.mark.parametrize(("order", "how"), [("F", "columns"), ("C", "rows")])
@pytest.mark.parametrize("width", [96, 80])
def test_tables_of_run_lengths_are_read_in_the_order_that_the_shapes_show(
    tmp_path: Path, header: str, order: Literal["C", "F"], how: str, width: int
) -> None:
    truth = {}
    rows = [header]
    for k in range(6):
        pixels, label = (each[:, :width] for each in ellipses(k))
        save(tmp_path / "train_images" / f"a{k}.png", pixels)
        truth[f"a{k}.png"] = label
        name = f"a{k}" if header.startswith("id") else f"a{k}.png"
        for value in (1, 2, 3):
            cells = f"{name}_{value}" if "_" in header else f"{name},{value}"
            rows.append(f"{cells},{count_runs(label == value, order)}")
    save(tmp_path / "train_images" / "a7.png", yard(7)[0])
    save(tmp_path / "test_images" / "b.png", yard(8)[0])
    (tmp_path / "train.csv").write_text("\n".join(rows))
    (tmp_path / "sample_submission.csv").write_text("ImageId,EncodedPixels\nb.png,1 5\n")
    dataset = find_dataset(tmp_path)
    assert dataset.classes.names == ("background", "class 1", "class 2", "class 3")
    assert any(f"follow the {how} of the images" in note for note in dataset.notes)
    assert any("1 image without an annotation left out, such" in note for note in dataset.notes)
    assert {pair.image.name for pair in dataset.pairs} == truth.keys()
    for pair in dataset.pairs:
        assert np.array_equal(read_label(pair, dataset), truth[pair.image.name])


RunRow = tuple[str, str, str]
RUN_HEADER = ("ImageId", "ClassId", "EncodedPixels")


def write_discs(root: Path) -> list[RunRow]:
    """Write images of discs, and return their names, their classes and their run lengths."""
    rows = []
    for k in range(4):
        image, numbers = blobs(k, 3)
        save(root / "images" / f"{k}.png", image)
        rows.append((f"{k}.png", "disc", count_runs(numbers > 0, "F")))
    return rows


def table(separator: str) -> Callable[[list[RunRow]], str]:
    return lambda rows: "\n".join(map(separator.join, [RUN_HEADER, *rows]))


def records(rows: list[RunRow]) -> list[dict[str, str]]:
    return [dict(zip(RUN_HEADER, row, strict=True)) for row in rows]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.csv", table(";")),
        ("a.csv", table("\t")),
        ("a.tsv", table("\t")),
        ("a.json", lambda rows: json.dumps(records(rows))),
        ("a.json", lambda rows: json.dumps({image: {kind: runs} for image, kind, runs in rows})),
        ("a.json", lambda rows: json.dumps({image: {kind: [runs]} for image, kind, runs in rows})),
        ("a.jsonl", lambda rows: "\n".join(map(json.dumps, records(rows)))),
    ],
)
def test_run_lengths_are_read_in_any_table(
    tmp_path: Path, name: str, form: Callable[[list[RunRow]], str]
) -> None:
    text = form(write_discs(tmp_path))
    # JSON is UTF-8 by its standard.
    for encoding in ("utf-8", "utf-16") if ".json" not in name else ("utf-8",):
        (tmp_path / name).write_text(text, encoding)
        dataset = find_dataset(tmp_path)
        assert dataset.classes.names == ("background", "disc")
        for k, pair in enumerate(dataset.pairs):
            assert np.array_equal(read_label(pair, dataset), blobs(k, 3)[1] > 0)


def test_numbers_by_image_are_no_run_lengths(tmp_path: Path) -> None:
    rows = write_discs(tmp_path)
    (tmp_path / "sizes.json").write_text(json.dumps({image: "48 32" for image, *_ in rows}))
    with pytest.raises(DataError, match="has no pairs of image and mask"):
        find_dataset(tmp_path)


def test_polygons_by_image_in_json_lines_are_read(tmp_path: Path) -> None:
    # As in HuBMAP's competition of 2023.
    lines = []
    for k in range(4):
        save(tmp_path / "train" / f"00{k}.tif", yard(k)[0])
        corners = [[4 + k, 5], [20 + k, 5], [20 + k, 17], [4 + k, 17]]
        shapes = [{"type": "vessel", "coordinates": [corners]}] if k else []
        lines.append(json.dumps({"id": f"00{k}", "annotations": shapes}))
    (tmp_path / "polygons.jsonl").write_text("\n".join(lines) + "\n")
    dataset = find_dataset(tmp_path)
    assert dataset.classes.names == ("background", "vessel")
    truth = np.zeros((HEIGHT, WIDTH), np.uint8)
    assert np.array_equal(read_label(dataset.pairs[0], dataset), truth)
    truth[5:17, 7:23] = 1
    assert np.array_equal(read_label(dataset.pairs[3], dataset), truth)


@pytest.mark.parametrize("header", ["image,rle_ant,bee_rle,EncodedPixels_cow", "image,ant,bee,cow"])
def test_each_column_of_run_lengths_is_a_class(tmp_path: Path, header: str) -> None:
    rows = [header]
    for k in range(3):
        pixels, label = ellipses(k)
        save(tmp_path / f"a{k}.png", pixels)
        # The first rows have no cow.
        cells = [count_runs(label == value, "F") for value in (1, 2, 3)]
        rows.append(",".join([f"a{k}.png", *cells[:2], cells[2] if k == 2 else ""]))
    (tmp_path / "train.csv").write_text("\n".join(rows))
    dataset = find_dataset(tmp_path)
    assert dataset.classes.names == ("background", "ant", "bee", "cow")
    assert np.array_equal(read_label(dataset.pairs[2], dataset), ellipses(2)[1])


def write_three_rows(folder: Path, runs: str) -> None:
    """Write three images with a table of run lengths, of which the second row is given."""
    for k in range(3):
        save(folder / f"{k}.png", yard(k)[0])
    rows = ["image,EncodedPixels", "0.png,1 40 60 30", f"1.png,{runs}", "2.png,"]
    (folder / "masks.csv").write_text("\n".join(rows))


def test_run_lengths_that_do_not_fit_their_image_are_skipped(tmp_path: Path) -> None:
    write_three_rows(tmp_path, f"{WIDTH * HEIGHT} 2")
    dataset = find_dataset(tmp_path)
    assert [pair.image.name for pair in dataset.pairs] == ["0.png", "2.png"]
    assert "which overlap or do not fit its image of 48x32 pixels" in dataset.skipped[0].reason
    assert np.count_nonzero(read_label(dataset.pairs[0], dataset)) == 70
    (tmp_path / "masks.csv").write_text("image,EncodedPixels\n0.png,5 4 7 4\n")
    with pytest.raises(DataError, match="do not fit"):
        find_dataset(tmp_path)


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        ("from 0", "a run begins at 0"),
        ("borders from 0", "because only then do many runs end at the borders"),
        ("relative", "counted from the end of the previous run"),
    ],
)
def test_tables_may_count_pixels_from_zero_or_from_the_run_before(
    tmp_path: Path, kind: str, note: str
) -> None:
    rows = ["ImageId,EncodedPixels"]
    truth = {}
    for k in range(6):
        pixels, label = (each[:32] for each in ellipses(k))
        mask = label > 1
        mask[: 9 if "0" in kind else 0, 5 + k : 20] = True
        mask[:9, : 9 * (kind == "from 0")] = True
        # The names of DICOM files have points.
        save(tmp_path / "train" / f"1.2.{k}.png", pixels)
        truth[f"1.2.{k}.png"] = mask
        starts, lengths = np.array(count_runs(mask, "F").split(), int).reshape(-1, 2).T
        ends = np.append(0, starts + lengths - 1)
        starts = starts - 1 - (ends[:-1] if kind == "relative" else 0)
        runs = " ".join(f"{one} {other}" for one, other in zip(starts, lengths, strict=True))
        rows.append(f"1.2.{k},{runs}")
    (tmp_path / "train.csv").write_text("\n".join(rows))
    dataset = find_dataset(tmp_path)
    assert any(note in each for each in dataset.notes)
    for pair in dataset.pairs:
        assert np.array_equal(read_label(pair, dataset), truth[pair.image.name])


@pytest.mark.parametrize(
    "runs",
    [
        "2 9223372036854775807",
        "9223372036854775807 9223372036854775807",
        "5 9223372036854775800 600 5",
        "1 " + "9" * 6000,
    ],
)
def test_run_lengths_whose_sum_overflows_are_skipped(tmp_path: Path, runs: str) -> None:
    write_three_rows(tmp_path, runs)
    dataset = find_dataset(tmp_path)
    assert [pair.image.name for pair in dataset.pairs] == ["0.png", "2.png"]
    assert "run lengths" in dataset.skipped[0].reason


def test_long_quoted_and_very_wide_rows_of_run_lengths_are_read_or_left_out(tmp_path: Path) -> None:
    """The csv module refuses cells of more than 131,072 characters."""
    for k in range(2):
        save(tmp_path / f"{k}.png", yard(k)[0])
    long = " ".join(f"{at} 1" for at in range(1, WIDTH * HEIGHT, 2)) + 150_000 * " "
    rows = ["image,EncodedPixels", f'"0.png","{long}"', "," * 5_000_000, "1.png,1 40"]
    (tmp_path / "masks.csv").write_text("\n".join(rows))
    tracemalloc.start()
    try:
        dataset = find_dataset(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    counts = [np.count_nonzero(read_label(pair, dataset)) for pair in dataset.pairs]
    assert counts == [WIDTH * HEIGHT // 2, 40]
    # A list of five million cells would take 40 MB more.
    assert peak < 50_000_000


def test_thousands_of_runs_on_one_image_take_little_memory(tmp_path: Path) -> None:
    """A mask for each of them would take 18 MB."""
    for k in range(2):
        save(tmp_path / f"{k}.png", yard(k)[0])
    rows = ["image,EncodedPixels", *(f"0.png,{1 + 2 * (k % 9)} 1" for k in range(12_000)), "1.png,"]
    (tmp_path / "masks.csv").write_text("\n".join(rows))
    tracemalloc.start()
    try:
        assert len(find_dataset(tmp_path).pairs) == 2
        assert tracemalloc.get_traced_memory()[1] < 15_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("tag", "crop"), [(6, 96), (3, 72), (2, 80)])
def test_masks_that_ignore_the_rotation_of_their_photographs_are_found_and_turned(
    tmp_path: Path, tag: int, crop: int
) -> None:
    data = tmp_path / "data"
    for k in range(10):
        pixels, label = ellipses(k)
        picture = PIL.Image.fromarray(pixels[:crop])
        exif = picture.getexif()
        exif[274] = tag if k % 4 else 1
        (data / "images").mkdir(parents=True, exist_ok=True)
        picture.save(data / "images" / f"{k}.jpg", exif=exif, quality=95)
        save(data / "masks" / f"{k}.png", label[:crop])
    assert "turned masks" in kinds(data)
    inspect_dataset(data, fix=tmp_path / "out")
    assert kinds(tmp_path / "out") == set()


def test_a_set_of_which_one_half_is_inverted_is_an_error(tmp_path: Path) -> None:
    def inverted(label: np.ndarray, k: int) -> np.ndarray:
        return ((label == 3) ^ (k % 2 == 1)) * np.uint8(255)

    write(tmp_path / "data", inverted, count=16, picture=ellipses)
    assert kinds(tmp_path / "data") == {"masks of two kinds"}
    write(tmp_path / "sound", lambda label, _: (label == 3) * np.uint8(255), picture=ellipses)
    assert kinds(tmp_path / "sound") == set()


@pytest.mark.parametrize(("dtype", "factor"), [(np.float32, 1 / 255), (np.uint16, 257)])
def test_images_of_two_scales_are_an_error(tmp_path: Path, dtype: type, factor: float) -> None:
    def two_scales(k: int) -> tuple[np.ndarray, np.ndarray]:
        pixels, label = ellipses(k)
        grey = pixels[..., 0].astype(float)
        return (grey * (factor if k % 3 == 1 else 1)).astype(dtype), label

    write(tmp_path, image="images/{k}.tif", picture=two_scales, count=10)
    assert "mixed scales" in kinds(tmp_path)


def test_masks_with_red_and_blue_exchanged_are_found_and_repaired(tmp_path: Path) -> None:
    def exchanged(label: np.ndarray, k: int) -> np.ndarray:
        return np.ascontiguousarray(COLORS[label][..., :: -1 if k % 3 == 1 else 1])

    write(tmp_path / "data", exchanged)
    with pytest.raises(DataError, match="its red and blue look exchanged"):
        find_dataset(tmp_path / "data")
    survey = inspect_dataset(tmp_path / "data", fix=tmp_path / "out")
    assert {each.kind for each in survey.findings if each.severity == "error"} >= {
        "red and blue exchanged"
    }
    assert len(find_dataset(tmp_path / "out").classes) == 4


def test_a_table_of_colours_in_the_other_order_names_the_classes_and_is_reported(
    tmp_path: Path,
) -> None:
    write(tmp_path, lambda label, _: np.ascontiguousarray(COLORS[label][..., ::-1]))
    rows = [f"{name},{r},{g},{b}" for name, (r, g, b) in zip(NAMES, COLORS.tolist(), strict=True)]
    (tmp_path / "classes.csv").write_text("\n".join(["name,r,g,b", *rows]))
    dataset = find_dataset(tmp_path)
    assert dataset.classes.names == NAMES
    assert "named by 'classes.csv' if red and blue are exchanged" in dataset.notes[0]
    assert np.array_equal(read_label(dataset.pairs[2], dataset), yard(2)[1])


def test_classes_in_red_or_blue_alone_are_classes(tmp_path: Path) -> None:
    def one_color(label: np.ndarray, k: int) -> np.ndarray:
        return (label == 3)[..., None] * np.uint8([(255, 0, 0), (0, 0, 255)][k % 2])

    assert len(find_dataset(write(tmp_path, one_color)).classes) == 3


def test_few_numbered_objects_are_joined_and_test_parts_are_tests(tmp_path: Path) -> None:
    for part, count in (("train", 6), ("testA", 3)):
        for k in range(count):
            image, numbers = blobs(k + len(part), 3)
            save(tmp_path / f"{part}_{k}.png", image)
            save(tmp_path / f"{part}_{k}_anno.png", numbers.astype(np.uint8))
    dataset = find_dataset(tmp_path)
    assert "the masks number their objects" in dataset.notes[0]
    assert [pair.split for pair in dataset.pairs].count("test") == 3
    (tmp_path / "dataset.toml").write_text("objects = false\n")
    assert len(find_dataset(tmp_path).classes) == 4


def test_files_without_suffix_are_refused_with_what_to_do(tmp_path: Path) -> None:
    write(tmp_path)
    for path in list(tmp_path.rglob("*.png")):
        path.rename(path.with_suffix(""))
    with pytest.raises(DataError, match=r"16 files such as .* have no suffix; give them"):
        find_dataset(tmp_path)


@pytest.mark.parametrize(
    ("ids", "name"),
    [
        ([0, *range(1, 120), 149], "ADE20K"),
        ([0, *range(1, 11), *range(92, 182)], "COCO-Stuff"),
        (list(range(66)), "Mapillary Vistas"),
        (
            [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, *range(23, 29), 31, 32, 33, 0, 1, 3, 4, 5],
            "Citysc",
        ),
        ([*range(21)], "Pascal VOC"),
    ],
)
def test_ids_of_published_sets_are_asked_about_and_not_guessed(
    tmp_path: Path, ids: list[int], name: str
) -> None:
    def stripes(label: np.ndarray, k: int) -> np.ndarray:
        places = (np.arange(WIDTH) // 4 + 12 * k) % len(ids)
        return np.broadcast_to(np.uint8(ids)[places], label.shape)

    dataset = find_dataset(write(tmp_path, stripes, count=11))
    assert dataset.classes.names[0].startswith("class ")
    assert f"fit those of {name}" in dataset.notes[-1]


def test_two_sets_with_names_of_their_own_are_both_read(tmp_path: Path) -> None:
    write(tmp_path / "setA")
    for k in range(6):
        pixels, label = yard(k + 20)
        save(tmp_path / "setB" / "img" / f"b{k}.png", pixels)
        save(tmp_path / "setB" / "lbl" / f"b{k}.png", label)
    dataset = find_dataset(tmp_path)
    assert (len(dataset.pairs), dataset.notes) == (14, ())
    assert {pair.image.parent.parent == pair.mask.parent.parent for pair in dataset.pairs} == {True}


def test_annotations_next_to_masks_are_reported_and_can_be_used(tmp_path: Path) -> None:
    write(tmp_path, image="images/{k}.jpg")
    images = [{"id": k, "file_name": f"{k}.jpg", "width": 48, "height": 32} for k in range(8)]
    shape = {"category_id": 1, "segmentation": [[1, 1, 20, 1, 20, 20]], "iscrowd": 0, "area": 190}
    shapes = [{"id": k, "image_id": k, "bbox": [1, 1, 19, 19], **shape} for k in range(8)]
    content = {"images": images, "categories": [{"id": 1, "name": "hut"}], "annotations": shapes}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    dataset = find_dataset(tmp_path)
    assert dataset.pairs[0].mask.name == "0.png"
    assert "'boxes.json' looks like annotations of these images" in dataset.notes[0]
    (tmp_path / "dataset.toml").write_text('images = "images/*.jpg"\nmasks = "boxes.json"\n')
    assert "hut" in find_dataset(tmp_path).classes.names


def test_names_without_ids_are_reported_in_their_order(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    assert "(0 sky, 1 house, 2 lawn and 3 ball)" in find_dataset(tmp_path).notes[0]


@pytest.mark.parametrize("half", [0, 1])
def test_images_beside_their_masks_are_cut_by_lines_of_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: int
) -> None:
    for k in range(5):
        image, label = yard(k)
        sides = [image, COLORS[label]] if half else [COLORS[label], image]
        save(tmp_path / "data" / ("train" if k < 3 else "val") / f"{k}.png", np.hstack(sides))
    side = ("left", "right")[half]
    with pytest.raises(DataError, match=f"The {side} half of '.*' and others has") as raised:
        find_dataset(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    exec("import" + str(raised.value).partition("\nimport")[2], {})
    dataset = find_dataset(tmp_path / "OUT")
    assert [pair.split for pair in dataset.pairs] == ["train"] * 3 + ["val"] * 2
    assert set(dataset.classes.colors) <= {tuple(color) for color in COLORS.tolist()}
    assert np.array_equal(read_image(dataset.pairs[0].image), yard(0)[0])


def test_two_photographs_side_by_side_are_no_mask(tmp_path: Path) -> None:
    for k in range(4):
        save(tmp_path / f"{k}.png", np.hstack([yard(k)[0], yard(k + 9)[0]]))
    with pytest.raises(DataError, match="no pairs of image and mask") as raised:
        find_dataset(tmp_path)
    assert "half" not in str(raised.value)


def test_images_of_two_times_are_joined_as_bands(tmp_path: Path) -> None:
    for k in range(6):
        image, label = yard(k)
        save(tmp_path / "A" / f"{k}.png", image)
        save(tmp_path / "B" / f"{k}.png", paint(COLORS[label][:, ::-1], np.random.default_rng(k)))
        save(tmp_path / "label" / f"{k}.png", (label == 1).astype(np.uint8) * 255)
    with pytest.raises(DataError, match=r"show what has changed between them, join the bands"):
        find_dataset(tmp_path)


def test_tables_may_name_images_by_folder_and_number(tmp_path: Path) -> None:
    # As UW-Madison's do on Kaggle.
    rows = ["id,class,segmentation"]
    for case, k in itertools.product((1, 2), range(4)):
        image, label = yard(k + 10 * case)
        scans = tmp_path / "train" / f"case{case}" / f"case{case}_day0" / "scans"
        save(scans / f"slice_{k + 1:04}_32_48_1.50_1.50.png", image)
        runs = np.flatnonzero(np.diff(np.pad((label == 1).ravel().astype(np.int8), 1))) + 1
        text = " ".join(f"{one} {other - one}" for one, other in runs.reshape(-1, 2))
        rows.append(f"case{case}_day0_slice_{k + 1:04},stomach,{text}")
    (tmp_path / "train.csv").write_text("\n".join(rows))
    dataset = find_dataset(tmp_path)
    assert (len(dataset.pairs), dataset.classes.names) == (8, ("background", "stomach"))
    assert np.array_equal(read_label(dataset.pairs[5], dataset), yard(21)[1] == 1)
