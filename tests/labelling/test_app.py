"""The labelling server: who may use it, what it refuses, and that refusals write nothing."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_labelling import LabelSite, labelling, scene, write_images
from PIL import Image

from useg.classes import IGNORE
from useg.errors import DataError, MachineError
from useg.labelling import folder as labelled_folder
from useg.labelling import session as labelling_session
from useg.labelling.app import LabelOptions, open_session
from useg.serving.middleware import Limits

ADDRESSES = (
    *("/", "/main.js", "/style.css", "/folder", "/state", "/images/0", "/images/0/mask"),
    *("/images/0/thumbnail", "/images/0/suggestion", "/masks.zip", "/coco.json", "/report"),
    *("/nothing", "/docs", "/openapi.json"),
)


@pytest.mark.parametrize("token", ["", "another"])
def test_every_address_needs_the_token(site: LabelSite, token: str) -> None:
    site.token = token
    for address in ADDRESSES:
        assert site.ask(address).status == 401, address
        assert site.ask(f"{address}?token={token}", authorization="").status == 401, address
    assert site.ask("/session", b"").status == 401


def test_a_browser_that_opened_the_address_has_the_token_in_a_cookie(site: LabelSite) -> None:
    page = site.ask(f"/?token={site.token}", authorization="")
    assert page.status == 200
    cookie = page.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    pair = cookie.partition(";")[0]
    assert str(site.port) in pair
    assert site.ask("/folder", authorization="", cookie=pair).status == 200
    assert site.ask("/folder", authorization="", cookie=pair[:-1]).status == 401


HOSTILE: dict[str, dict[str, Any]] = {
    "another page's origin": {"headers": {"origin": "http://evil.example"}, "status": 403},
    "another site": {"headers": {"sec_fetch_site": "cross-site"}, "status": 403},
    "no token": {"headers": {"authorization": ""}, "status": 401},
    "no session": {"headers": {"x_session": ""}, "status": 423},
    "a path in the name": {"path": "/images/../../etc/mask?{query}", "status": (404, 405)},
    "an encoded path": {"path": "/images/%2e%2e%2f0/mask?{query}", "status": (404, 422)},
    "no such image": {"path": "/images/99/mask?{query}", "status": 404},
    "a negative image": {"path": "/images/-1/mask?{query}", "status": 404},
    "outside": {"query": {"x": 61}, "status": 400},
    "negative": {"query": {"y": -1}, "status": 422},
    "no pixels": {"query": {"width": 0}, "status": 422},
    "a giant stroke": {"query": {"width": 4_000_000, "height": 4_000_000}, "status": 400},
    "more bytes than pixels": {"body": b"\1" * 17, "status": 413},
    "fewer bytes than pixels": {"body": b"\1" * 15, "status": 400},
    "no bytes": {"body": b"", "status": 400},
    "a compressed body": {"headers": {"content_encoding": "gzip"}, "status": 415},
    "no such class": {"body": b"\2" * 16, "status": 400},
    "an old revision": {"query": {"revision": "1-2-3"}, "status": 409},
    "a long revision": {"query": {"revision": "1" * 100}, "status": 422},
}


def send(site: LabelSite, path: str = "", query: dict | None = None, **how):
    chosen = {"x": 0, "y": 0, "width": 4, "height": 4, "revision": "0", **(query or {})}
    address = (path or "/images/0/mask?{query}").format(
        query="&".join(f"{name}={value}" for name, value in chosen.items())
    )
    return site.ask(address, how.get("body", b"\1" * 16), "PATCH", **how.get("headers", {}))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_strokes_are_refused_and_nothing_is_written(
    name: str, site: LabelSite, snapshot: Callable[[], dict[str, bytes]]
) -> None:
    how = dict(HOSTILE[name])
    expected = how.pop("status")
    before = snapshot()
    answer = send(site, **how)
    assert answer.status in (expected if isinstance(expected, tuple) else (expected,))
    assert len(answer.json["error"]) > 10
    assert snapshot() == before
    # The control: without the trick, the stroke is written.
    assert send(site).status == 200
    assert snapshot() != before


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/classes", b"["),
        ("/classes", b"[]"),
        ("/classes", b'{"classes": [{"name": "a"}]}'),
        ("/classes", b'{"classes": [{"name": "a", "color": "red"}]}'),
        ("/classes", json.dumps({"classes": [{"name": "a\n", "color": "#000000"}] * 2}).encode()),
        ("/classes", b"x" * 300_000),
        ("/images/0/region", b'{"view": [0, 0, 64, 480], "inside": [[1, 1]]}'),
        ("/images/0/region", b'{"view": [0, 0, 64, 48], "inside": [[64, 1]]}'),
        ("/images/0/region", b'{"view": [0, 0, 64, 48], "inside": [[1e3, true]]}'),
        ("/images/0/region", b'{"view": "all"}'),
        ("/images/0/done?done=true", b""),
        ("/train?minutes=0", b""),
        ("/train?minutes=3", b""),
    ],
)
def test_other_hostile_posts_are_refused_and_nothing_is_written(
    path: str, body: bytes, site: LabelSite, snapshot: Callable[[], dict[str, bytes]]
) -> None:
    before = snapshot()
    assert site.ask(path, body).status in (400, 413, 422)
    assert snapshot() == before


def test_a_second_browser_is_told_and_can_take_over(site: LabelSite) -> None:
    first, part = site.key, np.ones((4, 4))
    assert site.paint(0, part).status == 200
    assert not site.join()
    refused = site.paint(0, part, 8)
    assert refused.status == 423
    assert "another browser is editing this folder" in refused.json["error"]
    assert site.join(take=True)
    assert site.paint(0, part, 8).status == 200
    site.key = first
    assert site.paint(0, part, 16).status == 423
    assert site.ask("/state").json["editor"] is False
    assert np.count_nonzero(site.session.folder.read(0)[0] != IGNORE) == 32


def test_a_browser_that_has_gone_leaves_its_place(
    site: LabelSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not site.join()
    monkeypatch.setattr(labelling_session, "EDITOR_SECONDS", -1.0)
    assert site.join()


def test_a_stroke_is_on_disk_when_the_answer_comes(site: LabelSite, tmp_path: Path) -> None:
    label = scene(1)[1]
    answer = site.paint(1, label)
    with Image.open(tmp_path / "masks" / "p1.png") as stored:
        np.testing.assert_array_equal(np.array(stored), label)
    read = site.ask("/images/1/mask")
    assert read.content == label.tobytes()
    assert read.headers["x-revision"] == answer.json["revision"]


def test_a_stroke_that_cannot_be_written_is_an_error(
    site: LabelSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_):
        raise DataError("the disk is full")

    monkeypatch.setattr(labelled_folder, "encode_mask", full)
    assert site.paint(0, np.ones((4, 4))).status == 400
    assert site.revision(0) == "0"
    monkeypatch.undo()
    assert site.paint(0, np.ones((4, 4))).status == 200


def test_a_folder_that_is_open_is_not_opened_again(site: LabelSite, tmp_path: Path) -> None:
    options = LabelOptions(tmp_path / "images")
    with pytest.raises(MachineError, match="another useg label uses"), open_session(options):
        pass


def test_masks_and_coco_are_exported(site: LabelSite) -> None:
    for k in (0, 2):
        site.paint(k, scene(k)[1])
    with zipfile.ZipFile(io.BytesIO(site.ask("/masks.zip").content)) as archive:
        assert archive.namelist() == ["classes.toml", "masks/p0.png", "masks/p2.png"]
        with archive.open("masks/p2.png") as file, Image.open(file) as mask:
            np.testing.assert_array_equal(np.array(mask), scene(2)[1])
    coco = site.ask("/coco.json").json
    assert [image["file_name"] for image in coco["images"]] == ["p0.png", "p2.png"]
    areas = {each["category_id"]: each["area"] for each in coco["annotations"]}
    assert areas == {k: int((scene(2)[1] == k).sum()) for k in (0, 1)}


def test_a_click_proposes_the_object_under_it(site: LabelSite) -> None:
    label = scene(0)[1]
    rows, columns = np.nonzero(label)
    click = [int(columns.mean()), int(rows.mean())]
    wanted = {"view": [0, 0, 64, 48], "kind": "object", "inside": [click], "outside": []}
    answer = site.ask("/images/0/region", json.dumps(wanted).encode())
    x, y, width, height = (int(answer.headers[f"x-{n}"]) for n in ("x", "y", "width", "height"))
    found = np.zeros((48, 64), bool)
    part = np.frombuffer(answer.content, np.uint8).reshape(height, width)
    found[y : y + height, x : x + width] = part
    overlap = (found & (label == 1)).sum() / (found | (label == 1)).sum()
    assert overlap > 0.9


def test_images_that_browsers_cannot_show_are_converted(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    deep = scene(0)[0].astype(np.uint16)[..., 0] * 200
    Image.fromarray(deep).save(images / "deep.png")
    Image.fromarray(scene(1)[0]).save(images / "plain.jpg")
    with labelling(images) as site:
        shown = site.ask("/images/0")
        with Image.open(io.BytesIO(shown.content)) as image:
            assert (image.mode, image.size) == ("RGB", (64, 48))
        assert site.ask("/images/1").content == (images / "plain.jpg").read_bytes()
        with Image.open(io.BytesIO(site.ask("/images/0/thumbnail").content)) as image:
            assert image.format == "JPEG"


def test_classes_can_be_named_in_the_page(tmp_path: Path) -> None:
    with labelling(write_images(tmp_path), ()) as site:
        site.join()
        assert site.ask("/folder").json["classes"] == []
        assert "define at least one" in site.paint(0, np.ones((1, 1))).json["error"]
        named = {"classes": [{"name": "ground", "color": "#102030"}]}
        answer = site.ask("/classes", json.dumps(named).encode())
        assert answer.json["classes"] == [{"id": 0, "name": "ground", "color": "#102030"}]
        assert site.paint(0, np.zeros((1, 1))).status == 200


def test_an_image_that_becomes_a_pipe_or_another_file_is_refused_and_not_waited_for(
    site: LabelSite, tmp_path: Path
) -> None:
    image = tmp_path / "images" / "p0.png"
    image.unlink()
    (tmp_path / "secret.txt").write_text("secret")
    image.symlink_to(tmp_path / "secret.txt")
    assert site.ask("/images/0").status == 400
    image.unlink()
    os.mkfifo(image)
    assert site.ask("/images/0").status == 400


def test_bodies_together_are_bounded_and_room_comes_back(
    site: LabelSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "buffered_bytes", 1000)
    stroke = np.ones((20, 40), np.uint8)
    # Whole, and more than once: a body counts only until its response.
    for _ in range(3):
        assert site.paint(0, stroke).status == 200
    answer = site.paint(0, np.ones((30, 40), np.uint8))
    assert answer.status == 503
    assert "too many uploads are in memory" in answer.json["error"]
    assert site.paint(0, stroke).status == 200
