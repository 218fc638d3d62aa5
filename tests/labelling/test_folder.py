"""The labelled folder: where masks lie, how they are stored, and that nothing newer is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_labelling import scene, write_images
from PIL import Image

from useg import files
from useg.classes import IGNORE, ClassTable, read_classes, write_classes
from useg.data.dataset import read_label
from useg.data.layouts import find_dataset
from useg.errors import DataError, SettingsError
from useg.files import replacing
from useg.labelling import folder as labelled_folder
from useg.labelling.folder import NO_REVISION, LabelFolder, StaleMaskError, split_names
from useg.labelling.mask_files import encode_mask, find_paths
from useg.labelling.rounds import Rounds


def opened(images: Path, *classes: str, masks: Path | None = None) -> LabelFolder:
    return LabelFolder(find_paths(images, masks), classes)


def test_masks_lie_beside_images_or_among_the_images_or_where_the_user_says(
    tmp_path: Path,
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "holiday").mkdir()
    assert find_paths(tmp_path / "images").masks == tmp_path / "masks"
    assert find_paths(tmp_path / "holiday").masks == tmp_path / "holiday" / "masks"
    place = find_paths(tmp_path / "holiday", tmp_path / "other" / "truth")
    assert (place.masks, place.root) == (tmp_path / "other/truth", tmp_path / "other/truth")
    assert find_paths(tmp_path / "images", tmp_path / "truth").root == tmp_path
    with pytest.raises(DataError, match="mixed with the images"):
        find_paths(tmp_path / "images", tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        find_paths(tmp_path / "missing")


@pytest.mark.parametrize("form", ["beside", "among", "elsewhere", "subfolders", "mixed"])
def test_what_is_painted_is_a_data_set_for_training(form: str, tmp_path: Path) -> None:
    images, masks = write_images(tmp_path), None
    if form == "among":
        images = images.rename(tmp_path / "holiday [1]")
    elif form == "elsewhere":
        masks = tmp_path / "far" / "truth"
    elif form == "subfolders":
        (images / "day").mkdir()
        (images / "p1.png").rename(images / "day" / "p1.png")
    elif form == "mixed":
        Image.fromarray(scene(1)[0]).save(images / "p1.jpg")
        (images / "p1.png").unlink()
    folder = opened(images, "ground", "square", masks=masks)
    by_name = {Path(each.name).stem: k for k, each in enumerate(folder.images)}
    # p2 is not painted yet.
    for k in (0, 1):
        folder.patch(by_name[f"p{k}"], (0, 0), scene(k)[1], NO_REVISION)
    dataset = find_dataset(folder.paths.root)
    assert sorted(pair.image.stem for pair in dataset.pairs) == ["p0", "p1"]
    assert dataset.classes.names == ("ground", "square")
    for pair in dataset.pairs:
        expected = scene(int(pair.image.stem[1:]))[1]
        np.testing.assert_array_equal(read_label(pair, dataset), expected)
    again = opened(images, masks=masks)
    assert [each.state for each in again.images].count("scribbled") == 2


def test_a_stroke_changes_its_rectangle_and_the_rest_stays_unpainted(tmp_path: Path) -> None:
    folder = opened(write_images(tmp_path), "ground", "square")
    revision = folder.patch(1, (10, 20), np.ones((5, 7), np.uint8), NO_REVISION)
    label, read = opened(tmp_path / "images").read(1)
    expected = np.full((48, 64), IGNORE, np.uint8)
    expected[20:25, 10:17] = 1
    np.testing.assert_array_equal(label, expected)
    assert read == revision
    with Image.open(tmp_path / "masks" / "p1.png") as stored:
        assert stored.mode == "P"
    folder.patch(1, (10, 20), np.full((5, 7), IGNORE, np.uint8), revision)
    assert [each.state for each in folder.images] == ["empty"] * 3


def test_no_mask_is_overwritten_by_an_older_one(tmp_path: Path) -> None:
    folder = opened(write_images(tmp_path), "ground", "square")
    part = np.ones((4, 4), np.uint8)
    first = folder.patch(0, (0, 0), part, NO_REVISION)
    newest = folder.patch(0, (4, 0), part, first)
    before = (tmp_path / "masks/p0.png").read_bytes()
    for old in (NO_REVISION, first):
        with pytest.raises(StaleMaskError, match="was changed by another program"):
            folder.patch(0, (0, 0), np.zeros((4, 4), np.uint8), old)
    # Another program corrects the mask.
    changed = scene(0)[1]
    Image.fromarray(changed).save(tmp_path / "masks/p0.png")
    with pytest.raises(StaleMaskError):
        folder.patch(0, (0, 0), part, newest)
    np.testing.assert_array_equal(folder.read(0)[0], changed)
    assert before != (tmp_path / "masks/p0.png").read_bytes()


@pytest.mark.parametrize(
    ("corner", "shape", "value"),
    [((60, 0), (1, 5), 0), ((-1, 0), (1, 5), 0), ((0, 47), (2, 1), 0), ((0, 0), (1, 1), 2)],
)
def test_strokes_outside_of_the_image_or_of_no_class_are_refused(
    corner: tuple[int, int], shape: tuple[int, int], value: int, tmp_path: Path
) -> None:
    folder = opened(write_images(tmp_path), "ground", "square")
    with pytest.raises(DataError, match=r"exceeds .p0|there are 2 classes"):
        folder.patch(0, corner, np.full(shape, value, np.uint8), NO_REVISION)
    assert not list(tmp_path.rglob("masks/*.png"))


FORMS = {
    "ids": (ClassTable(("ground", "square")), lambda label: label),
    "grey": (ClassTable(("ground", "square"), values=(0, 255)), lambda label: 255 * label),
    "colours": (
        ClassTable(("ground", "square"), ((9, 8, 7), (250, 0, 99)), by_color=True),
        lambda label: np.array([(9, 8, 7), (250, 0, 99)], np.uint8)[label],
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("described", [True, False])
def test_foreign_masks_are_corrected_in_the_form_in_which_they_are_stored(
    form: str, described: bool, tmp_path: Path
) -> None:
    table, stored = FORMS[form]
    images = write_images(tmp_path)
    (tmp_path / "masks").mkdir()
    if described:
        write_classes(tmp_path / "classes.toml", table)
    for k in range(3):
        Image.fromarray(stored(scene(k)[1])).save(tmp_path / "masks" / f"p{k}_mask.png")
    folder = opened(images)
    assert [each.state for each in folder.images] == ["done"] * 3
    label, revision = folder.read(1)
    square = int(label[scene(1)[1] == 1][0])
    patch = np.array([[square, IGNORE]], np.uint8)
    folder.patch(1, (0, 0), patch, revision)
    label[0, :2] = patch
    dataset = find_dataset(tmp_path)
    assert len(dataset.pairs) == 3
    assert not (tmp_path / "masks/p1.png").exists()
    again = opened(images)
    for k in (0, 1, 2):
        expected = label if k == 1 else folder.read(k)[0]
        np.testing.assert_array_equal(read_label(dataset.pairs[k], dataset), expected)
        np.testing.assert_array_equal(again.read(k)[0], expected)


def test_masks_that_cannot_be_written_as_they_are_stored_are_refused(tmp_path: Path) -> None:
    images = write_images(tmp_path)
    (tmp_path / "masks").mkdir()
    for k in range(3):
        objects = np.where(scene(k)[1], np.arange(64)[None] // 8, 0).astype(np.uint8)
        Image.fromarray(objects).save(tmp_path / "masks" / f"p{k}.png")
    (tmp_path / "dataset.toml").write_text("objects = true")
    before = {path: path.read_bytes() for path in (tmp_path / "masks").iterdir()}
    with pytest.raises(DataError, match=r"useg inspect .* --fix OUT"):
        opened(images)
    assert {path: path.read_bytes() for path in (tmp_path / "masks").iterdir()} == before


def test_masks_of_other_images_are_refused(tmp_path: Path) -> None:
    images = write_images(tmp_path)
    other = write_images(tmp_path / "other")
    folder = opened(other, "ground", "square")
    folder.patch(0, (0, 0), scene(0)[1], NO_REVISION)
    with pytest.raises(DataError, match=r"the masks in .* cannot be opened"):
        opened(images, masks=tmp_path / "other" / "masks")


def test_images_with_one_name_are_refused(tmp_path: Path) -> None:
    images = write_images(tmp_path)
    Image.fromarray(scene(0)[0]).save(images / "p0.jpg")
    with pytest.raises(DataError, match=r"'p0\.jpg' and 'p0\.png' would have the same mask"):
        opened(images)


def test_unreadable_images_are_left_out_with_a_sentence(tmp_path: Path) -> None:
    images = write_images(tmp_path)
    (images / "p9.png").write_bytes(b"no picture")
    folder = opened(images, "a", "b")
    assert len(folder.images) == 3
    assert len(folder.notes) == 1
    assert "p9.png" in folder.notes[0]


def test_states_survive_and_are_found_anew_where_the_file_is_lost(tmp_path: Path) -> None:
    images = write_images(tmp_path)
    folder = opened(images, "ground", "square")
    folder.patch(0, (0, 0), scene(0)[1], NO_REVISION)
    folder.set_done(0, True)
    folder.patch(1, (3, 3), np.ones((2, 2), np.uint8), NO_REVISION)
    assert [each.state for each in opened(images).images] == ["done", "scribbled", "empty"]
    (tmp_path / "masks/.useg-label.json").write_text("[")
    again = opened(images)
    assert [each.state for each in again.images] == ["done", "scribbled", "empty"]
    assert [sorted(each.classes) for each in again.images] == [[0, 1], [1], []]
    with pytest.raises(DataError, match="has no painted pixels"):
        again.set_done(2, True)


def test_an_image_is_not_done_because_the_program_was_killed_after_its_first_stroke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    @contextmanager
    def replacing_and_dying(path: Path, is_own: Any) -> Iterator[Path]:
        with replacing(path, is_own) as draft:
            yield draft
        if path.suffix == ".png":
            raise KilledError

    folder = opened(write_images(tmp_path), "ground", "square")
    monkeypatch.setattr(labelled_folder, "replacing", replacing_and_dying)
    with pytest.raises(KilledError):
        folder.patch(0, (0, 0), scene(0)[1], NO_REVISION)
    again = opened(tmp_path / "images")
    assert again.images[0].state == "scribbled"
    np.testing.assert_array_equal(again.read(0)[0], scene(0)[1])


def test_classes_are_added_and_renamed_but_never_removed(tmp_path: Path) -> None:
    folder = opened(write_images(tmp_path), "ground", "square")
    folder.patch(0, (0, 0), scene(0)[1], NO_REVISION)
    folder.set_classes([("soil", (1, 2, 3)), ("square", (4, 5, 6)), ("sky", (7, 8, 9))])
    table = read_classes(tmp_path / "classes.toml")
    assert table.names == ("soil", "square", "sky")
    assert table.colors[2] == (7, 8, 9)
    assert table.ignore == (255,)
    with pytest.raises(DataError, match="the masks have 3"):
        folder.set_classes([("soil", (1, 2, 3))])
    assert opened(tmp_path / "images", "soil", "square", "sky", "tree").table.names[3] == "tree"
    with pytest.raises(SettingsError, match="the folder already has the classes soil"):
        opened(tmp_path / "images", "ground")


@pytest.mark.parametrize("text", ["", "a,,b", "a, a"])
def test_class_names_are_checked(text: str) -> None:
    with pytest.raises(SettingsError, match="give each name once"):
        split_names(text)


def test_masks_carry_no_mark_by_which_other_commands_would_replace_them(tmp_path: Path) -> None:
    from useg.ownership import is_own_label_map, is_own_mask, is_own_picture

    path = tmp_path / "mask.png"
    path.write_bytes(encode_mask(scene(0)[1], ClassTable(("a", "b"), ignore=(255,))))
    assert not any(own(path) for own in (is_own_label_map, is_own_mask, is_own_picture))


SCORE = {"name": "p0.png", "tally": [[1, 2], [3, 4], [5, 6]], "round": 1}


@pytest.mark.parametrize(
    "scores",
    [
        5,
        {"a": 1},
        [{}],
        [{**SCORE, "name": ["p0.png"]}],
        *([{**SCORE, "tally": tally}] for tally in (3, [], [[]] * 3, [[1], [1, 2], [1]])),
        *([{**SCORE, "tally": [[count]] * 3}] for count in (1.5, True, -1, "1", 10**30)),
        [{**SCORE, "tally": [[1] * 1000] * 3}],
    ],
)
def test_scores_that_useg_did_not_write_are_left_out(scores: Any, tmp_path: Path) -> None:
    images, state = write_images(tmp_path), tmp_path / "masks/.useg-label.json"
    state.parent.mkdir()
    for stored, kept in ((scores, []), ([SCORE], [SCORE])):
        state.write_text(json.dumps({"useg_label": 1, "scores": stored}))
        folder = opened(images)
        assert folder.scores == kept
        assert len(Rounds(folder).score_curve()) == len(kept)


def test_states_stored_by_earlier_versions_are_read(tmp_path: Path) -> None:
    images = write_images(tmp_path)
    folder = opened(images, "ground", "square")
    folder.patch(0, (0, 0), scene(0)[1], NO_REVISION)
    stored = {
        "p0.png": {"state": "done", "revision": "old", "classes": [0], "was_trained": True},
        "p1.png": {"state": "empty", "revision": "0", "classes": [], "was_trained": True},
    }
    (tmp_path / "masks/.useg-label.json").write_text(
        json.dumps({"useg_label": 1, "pictures": stored, "scores": []})
    )
    again = opened(images).images
    assert [each.state for each in again] == ["done", "empty", "empty"]
    assert [each.was_trained_on for each in again] == [True, True, False]


def test_a_state_file_that_is_larger_than_its_images_need_is_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, state = write_images(tmp_path), tmp_path / "masks/.useg-label.json"
    state.parent.mkdir()
    state.write_text('{"useg_label": 1, "more": [' + "[]," * 500_000 + "0]}")
    monkeypatch.setattr(labelled_folder, "parse_json", lambda _: pytest.fail("it was parsed"))
    (note,) = opened(images).notes
    assert "it has more than 1,049,152 bytes" in note


def test_classes_that_cannot_be_written_are_not_taken(tmp_path: Path) -> None:
    folder = opened(write_images(tmp_path), "ground", "square")
    folder.patch(0, (0, 0), scene(0)[1], NO_REVISION)
    # Another program.
    write_classes(tmp_path / "classes.toml", ClassTable(("a", "b", "c")))
    with pytest.raises(DataError, match="would replace a file that useg did not write"):
        folder.set_classes([("ground", (1, 2, 3)), ("box", (4, 5, 6))])
    assert folder.table is not None
    assert folder.table.names == ("ground", "square")


def test_images_whose_masks_are_one_file_on_this_disk_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_images(tmp_path)
    (images / "p0.png").rename(images / "P1.png")
    assert len(opened(images).images) == 3
    monkeypatch.setattr(files, "_ignores_case", lambda _: True)
    with pytest.raises(DataError, match=r"'P1\.png' and 'p1\.png' would be one file"):
        opened(images)
