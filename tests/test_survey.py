"""What is in a data set and what is wrong with it: every finding on data made to have it."""

import json
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import PIL.Image
import pytest
import tifffile

from useg.classes import ClassTable, write_classes
from useg.data.layouts import find_dataset
from useg.data.splits import assign_splits
from useg.doctor.measure import Finding
from useg.doctor.stored_values import defer_classes
from useg.doctor.survey import Survey, survey_dataset

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TABLE = ClassTable(("sky", "road", "sign"), ignore=(9,))
NAMES = ("ash", "beech", "cedar", "daisy", "elm", "fir")


def make(root: Path, names: tuple[str, ...] = NAMES, size: tuple[int, int] = (20, 15)) -> Path:
    """Six pairs; a tenth of each mask is ignored, the rest is sky, road and sign in equal columns."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(exist_ok=True)
    label = np.tile(np.repeat(np.array([0, 1, 2, 9], np.uint8), (6, 6, 6, 2)), (size[1], 1))[
        :, : size[0]
    ]
    for name in names:
        noise = np.random.default_rng([ord(letter) for letter in name]).integers(
            0, 256, (size[1], size[0], 3), np.uint8
        )
        PIL.Image.fromarray(noise).save(root / "images" / f"{name}.png")
        PIL.Image.fromarray(label).save(root / "masks" / f"{name}.png")
    write_classes(root / "classes.toml", TABLE)
    return root


def film(root: Path, num: int = 20) -> Path:
    """Frames f000, f001, ... of which each is much like the one before."""
    make(root, tuple(f"f{k:03}" for k in range(num)))
    rng = np.random.default_rng(0)
    frame = rng.normal(0, 1, (15, 20, 3))
    for k in range(num):
        PIL.Image.fromarray((128 + 30 * frame).clip(0, 255).astype(np.uint8)).save(
            root / "images" / f"f{k:03}.png"
        )
        frame = 0.92 * frame + 0.4 * rng.normal(0, 1, frame.shape)
    return root


def look(root: Path, mode: str = "auto") -> Survey:
    return survey_dataset(
        find_dataset(root, strict=False, guess=defer_classes),
        split=lambda dataset: assign_splits(dataset, mode),
    )


def of_kind(report: Survey, kind: str) -> Finding:
    found = [finding for finding in report.findings if finding.kind == kind]
    assert found, f"no finding {kind!r} among {[finding.kind for finding in report.findings]}"
    return found[0]


def test_a_clean_set_has_no_findings(tmp_path):
    report = look(make(tmp_path))
    assert report.findings == ()
    assert (report.num_pairs, report.layout, report.sizes, report.bands, report.dtypes) == (
        6,
        "folders",
        {"20x15": 6},
        {3: 6},
        {"uint8": 6},
    )
    assert report.pixels == (540, 540, 540)
    assert report.images == (6, 6, 6)
    assert report.shares == pytest.approx((1 / 3,) * 3)
    assert report.ignore_share == pytest.approx(0.1)
    assert sum(report.splits.values()) == 6


def test_json_has_the_promised_keys_and_nothing_json_cannot_say(tmp_path):
    make(tmp_path)
    (tmp_path / "images" / "elm.png").write_text("x")
    content = json.loads(json.dumps(look(tmp_path).as_dict()))
    assert {"num_pairs", "layout", "sizes", "splits", "classes", "findings"} <= content.keys()
    assert content["classes"][1] == {
        "id": 1,
        "name": "road",
        "pixels": 450,
        "share": pytest.approx(1 / 3),
        "images": 5,
        "color": ANY,
    }
    assert content["findings"][0].keys() == {"kind", "severity", "files", "message", "remedy"}
    assert content["findings"][0]["files"] == [str(tmp_path / "images" / "elm.png")]


def test_lines_say_it_in_plain_text(tmp_path):
    make(tmp_path)
    (tmp_path / "images" / "elm.png").write_text("x")
    text = "\n".join(look(tmp_path).lines())
    assert f"{tmp_path}: 6 pairs, layout folders" in text
    assert "20x15 (5); 3 bands, uint8" in text
    assert "   1  road   33.333% of the pixels, in 5 images" in text
    assert "findings 1 error\n  error: '" in text
    assert "under a picture's name" in text


def test_unreadable_files_stop_nothing(tmp_path):
    make(tmp_path)
    (tmp_path / "images" / "elm.png").write_text("x")
    (tmp_path / "masks" / "fir.png").write_bytes((tmp_path / "masks" / "fir.png").read_bytes()[:60])
    report = look(tmp_path)
    files = [finding.files for finding in report.findings if finding.kind == "unreadable file"]
    assert files == [(tmp_path / "images" / "elm.png",), (tmp_path / "masks" / "fir.png",)]
    assert report.images == (4, 4, 4)
    assert report.findings[0].severity == "error"
    assert report.findings[0].remedy == "download it again, or remove it"


def test_every_pair_unreadable_is_still_a_report(tmp_path):
    make(tmp_path)
    for path in (tmp_path / "images").iterdir():
        path.write_text("x")
    report = look(tmp_path)
    assert [finding.kind for finding in report.findings] == ["unreadable file"]
    assert len(report.findings[0].files) == 6
    assert "(and 5 more pairs with the same kind of error)" in report.findings[0].message
    assert "images   none could be read" in report.lines()


def test_size_mismatch(tmp_path):
    make(tmp_path)
    make(tmp_path / "images", ())  # only to have a folder beside
    PIL.Image.fromarray(np.zeros((15, 19), np.uint8)).save(tmp_path / "masks" / "elm.png")
    finding = of_kind(look(tmp_path), "size mismatch")
    assert finding.files == (tmp_path / "images" / "elm.png", tmp_path / "masks" / "elm.png")
    assert "is 20x15 pixels, but its mask" in finding.message


def test_unknown_value(tmp_path):
    make(tmp_path)
    PIL.Image.fromarray(np.full((15, 20), 17, np.uint8)).save(tmp_path / "masks" / "elm.png")
    finding = of_kind(look(tmp_path), "unknown value")
    assert finding.severity == "error"
    assert finding.message.endswith(
        "has the value 17 at (row 0, column 0), but there are 3 classes (0-2; ignored: 9)"
    )
    assert finding.remedy == "map it in classes.toml or set ignore = [17]"


def test_files_without_partner(tmp_path):
    make(tmp_path)
    (tmp_path / "masks" / "elm.png").unlink()
    (tmp_path / "masks" / "fir.png").unlink()
    finding = of_kind(look(tmp_path), "image without mask")
    assert (finding.severity, len(finding.files)) == ("error", 2)
    assert finding.message.startswith("2 images have no mask, such as '")
    make(tmp_path)
    (tmp_path / "images" / "fir.png").unlink()
    assert of_kind(look(tmp_path), "mask without image").files == (tmp_path / "masks" / "fir.png",)


def test_absent_and_rare_classes(tmp_path):
    make(tmp_path)
    for path in (tmp_path / "masks").iterdir():
        PIL.Image.fromarray(np.zeros((15, 20), np.uint8)).save(path)
    label = np.zeros((15, 20), np.uint8)
    label[0, 0] = 1
    PIL.Image.fromarray(label).save(tmp_path / "masks" / "ash.png")
    report = look(tmp_path)
    assert of_kind(report, "class without pixels").message == "no pixel belongs to sign"
    assert (
        of_kind(report, "rare class").message
        == "rare: less than 0.5% of the pixels are road (0.06%)"
    )


def test_a_class_missing_on_one_side_of_the_split(tmp_path):
    make(tmp_path)
    (tmp_path / "split.csv").write_text(
        "image,split\n"
        + "".join(f"{name},{'val' if name == 'fir' else 'train'}\n" for name in NAMES)
    )
    PIL.Image.fromarray(np.zeros((15, 20), np.uint8)).save(tmp_path / "masks" / "fir.png")
    assert (
        of_kind(look(tmp_path), "class missing from validation").message
        == "the split val has no pixel of road and sign"
    )
    make(tmp_path)
    for name in NAMES[:-1]:
        PIL.Image.fromarray(np.zeros((15, 20), np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    assert (
        of_kind(look(tmp_path), "class missing from training").message
        == "the split train has no pixel of road and sign"
    )


def test_mixtures(tmp_path):
    make(tmp_path)
    PIL.Image.fromarray(np.zeros((15, 20), np.uint8)).save(tmp_path / "images" / "ash.png")
    finding = of_kind(look(tmp_path), "mixed bands")
    assert (finding.severity, finding.files, finding.message) == (
        "warning",
        (tmp_path / "images" / "ash.png",),
        "the images have 1 and 3 bands, such as 'images/ash.png'",
    )
    make(tmp_path)
    make(tmp_path, ("elm",), (18, 10))
    assert (
        of_kind(look(tmp_path), "mixed sizes").message
        == "the images have 2 different sizes, from 18x10 to 20x15"
    )
    make(tmp_path)
    (tmp_path / "images" / "fir.png").unlink()
    tifffile.imwrite(
        tmp_path / "images" / "fir.tif", np.zeros((15, 20, 3), np.uint16), photometric="rgb"
    )
    finding = of_kind(look(tmp_path), "mixed number types")
    assert (finding.severity, finding.message) == (
        "error",
        "the images hold uint16 and uint8 pixels, such as 'images/fir.tif'",
    )


def test_a_film_is_noticed_and_a_split_that_leaks_is_warned_of(tmp_path):
    blocks = look(film(tmp_path))
    assert of_kind(blocks, "looks like a film").severity == "note"
    assert all(finding.kind != "validation beside training" for finding in blocks.findings)
    leaking = of_kind(look(tmp_path, "random"), "validation beside training")
    assert leaking.severity == "warning"
    assert "next to a training image of the same sequence" in leaking.message


def test_errors_come_first(tmp_path):
    film(tmp_path)
    (tmp_path / "masks" / "f003.png").unlink()
    PIL.Image.fromarray(np.zeros((15, 20), np.uint8)).save(tmp_path / "images" / "f004.png")
    tifffile.imwrite(
        tmp_path / "images" / "f005.png", np.zeros((15, 20, 3), np.uint16), photometric="rgb"
    )
    severities = [finding.severity for finding in look(tmp_path).findings]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert len(set(severities)) == 3


def test_undecided_splits_and_progress(tmp_path):
    done: list[None] = []
    report = survey_dataset(find_dataset(make(tmp_path)), lambda: done.append(None))
    assert len(done) == 6
    assert report.splits == {"": 6}
    assert "splits   6 not decided" in report.lines()


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data are not beside this checkout")
def test_real_data():
    report = look(SHARED / "isbi2012")
    assert [finding.kind for finding in report.findings] == ["looks like a film", "two grey levels"]
    assert report.shares[0] == pytest.approx(0.22, abs=0.005)
