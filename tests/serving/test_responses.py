"""The format of a response, and the limits of its size."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from served import SMALL, Site, encoded, form, picture, served, tiny
from starlette.exceptions import HTTPException
from waiting import eventually

from useg.serving import responses
from useg.serving.responses import ResponseFormat, negotiate_format


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", ResponseFormat.JSON),
        ("*/*", ResponseFormat.JSON),
        ("image/png", ResponseFormat.LABELS),
        ("image/*", ResponseFormat.LABELS),
        ("text/html, image/png;q=0.5, application/json;q=0.4", ResponseFormat.LABELS),
        ("image/png;q=0.2, */*;q=0.1", ResponseFormat.LABELS),
        ("image/png;q=0, */*", ResponseFormat.JSON),
        ("application/json;q=0, application/*", ResponseFormat.POLYGONS),
        ("application/geo+json", ResponseFormat.POLYGONS),
        ("APPLICATION/X-NPZ", ResponseFormat.PROBABILITIES),
    ],
)
def test_the_format_follows_the_query_or_the_accept_header(
    accept: str, expected: ResponseFormat
) -> None:
    assert negotiate_format(None, accept) is expected
    assert negotiate_format(ResponseFormat.OVERLAY, accept) is ResponseFormat.OVERLAY


@pytest.mark.parametrize(
    "accept",
    ["text/html", "image/jpeg", "*/*;q=0", "application/json;q=nan", "image/png;q=-1", ";;;,,"],
)
def test_no_acceptable_media_type_is_refused(accept: str) -> None:
    with pytest.raises(HTTPException, match="no response has the media type"):
        negotiate_format(None, accept)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with served() as running:
        yield running


@pytest.mark.parametrize("response_format", list(ResponseFormat))
def test_the_limit_of_a_response_is_the_limit_of_a_batch(
    site: Site, response_format: ResponseFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = encoded(picture(40, 30))
    alone = site.ask(f"/predict?format={response_format}", image)
    assert alone.status == 200
    # One of them fits, two do not.
    limits = replace(SMALL, response_bytes=len(alone.content) * 3 // 2)
    monkeypatch.setattr(site.service.uploads, "limits", limits)
    assert site.ask(f"/predict?format={response_format}", image).status == 200
    two, kind = form(image, image)
    answer = site.ask(f"/predict/batch?format={response_format}", two, content_type=kind)
    assert answer.status == 413
    assert answer.json["error"].endswith("send a smaller image, or fewer, or ask for labels")
    eventually(lambda: site.service.uploads.response_bytes == 0)


def test_a_batch_of_probabilities_is_an_archive_of_archives(site: Site) -> None:
    images = [picture(30 + k, 20, k) for k in range(3)]
    body, kind = form(*map(encoded, images))
    answer = site.ask("/predict/batch?format=probabilities", body, content_type=kind)
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        for k, image in enumerate(images):
            with np.load(io.BytesIO(archive.read(f"{k}.npz"))) as content:
                assert (content["probabilities"] == tiny().probabilities(image)).all()


def test_polygons_with_too_many_corners_are_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace(*arguments: object) -> None:
        raise AssertionError("the polygons were traced")

    monkeypatch.setattr(responses, "MAX_CORNERS", 3)
    monkeypatch.setattr(responses, "to_polygons", trace)
    answer = site.ask("/predict?format=polygons", encoded(picture()))
    assert answer.status == 413
    assert answer.json["error"].startswith("the polygons have ")
    assert (
        "corners, more than the allowed 3; send a smaller image, or ask for lab"
        in (answer.json["error"])
    )


def test_an_image_that_takes_more_memory_than_allowed_is_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site.service, "limits", replace(SMALL, work_bytes=100_000))
    assert site.ask("/predict", encoded(picture(40, 30))).status == 200
    answer = site.ask("/predict", encoded(picture(60, 40)))
    assert answer.status == 413
    assert answer.json["error"].startswith("an image of 60x40 pixels needs 0 MB of memory for 4 cl")
