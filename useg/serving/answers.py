"""A picture file and the form asked for -> the answer's bytes."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import ClassTable, Label
from useg.data.images import Image, decode_image, encode_label, encode_picture
from useg.inference.polygons import to_geojson, to_polygons
from useg.inference.predictor import Predictor
from useg.pictures import overlay, to_picture
from useg.scoring.answers import confidence, most_probable
from useg.serving.limits import Limits, RefusalError
from useg.serving.uploads import Upload


class Form(StrEnum):
    """What can be asked for."""

    LABELS = "labels"
    OVERLAY = "overlay"
    JSON = "json"
    POLYGONS = "polygons"
    PROBABILITIES = "probabilities"
    PLANES = "planes"


MEDIA = {
    Form.LABELS: "image/png",
    Form.OVERLAY: "image/png",
    Form.JSON: "application/json",
    Form.POLYGONS: "application/geo+json",
    Form.PROBABILITIES: "application/x-npz",
    Form.PLANES: "application/vnd.useg.planes",
}
_ACCEPTED = (
    Form.JSON,
    Form.LABELS,
    Form.POLYGONS,
    Form.PROBABILITIES,
    Form.PLANES,
)  # of equally welcome ones the first; an overlay has to be asked for by name
_SUFFIXES = {Form.LABELS: ".png", Form.OVERLAY: ".png", Form.PROBABILITIES: ".npz", Form.PLANES: ".planes"}


@dataclass(frozen=True)
class Answer:
    """Bytes to send, what they are, and further headers."""

    content: bytes
    media: str
    headers: dict[str, str] = field(default_factory=dict)


def negotiated(form: Form | None, accept: str) -> Form:
    """Return the form asked for by name, or else the one that the header ``Accept`` likes best.

    >>> str(negotiated(None, "image/png"))
    'labels'

    Raises:
        RefusalError: 406, it accepts none.
    """
    if form is not None:
        return form
    liked = [(_quality(MEDIA[each], accept), -k, each) for k, each in enumerate(_ACCEPTED)]
    quality, _, best = max(liked)
    if quality <= 0:
        kinds = ", ".join(MEDIA[each] for each in _ACCEPTED)
        raise RefusalError(406, f"nothing is answered as {accept[:80]!r}; accept one of {kinds}, or ask with ?format={'|'.join(Form)}")
    return best


def _quality(media: str, accept: str) -> float:
    """Return how welcome a media type is, 0 to 1, to a header ``Accept`` (RFC 9110, 12.5.1): the most specific range that fits decides."""
    found = {}
    for part in (accept or "*/*").split(","):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if kind in (media, media.partition("/")[0] + "/*", "*/*"):
            weight = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
            found[kind == media, kind != "*/*"] = float(weight) if weight.replace(".", "", 1).isdecimal() and weight.isascii() else 0.0
    return found[max(found)] if found else 0.0


def answer(predictor: Predictor, upload: Upload, form: Form, limits: Limits, compress: bool = False) -> Answer:
    """Predict a picture file.

    Args:
        predictor: the model.
        upload: the file.
        form: of the answer.
        limits: of pixels and of the answer's bytes.
        compress: whether an answer that is not compressed in itself may be, with gzip.

    Raises:
        UsageError: no picture, or one that does not fit the model.
        RefusalError: 413, the answer would be too large.
    """
    image = decode_image(upload.content, upload.name, limits.pixels)
    return _FORMS[form](predictor, image, limits, compress)


def _labels(predictor: Predictor, image: Image, limits: Limits, compress: bool) -> Answer:
    return Answer(encode_label(predictor(image), predictor.classes), MEDIA[Form.LABELS])


def _overlay(predictor: Predictor, image: Image, limits: Limits, compress: bool) -> Answer:
    return Answer(encode_picture(overlay(to_picture(image), predictor(image), predictor.classes)), MEDIA[Form.OVERLAY])


def _json(predictor: Predictor, image: Image, limits: Limits, compress: bool) -> Answer:
    return Answer(json.dumps(described(predictor(image), predictor.classes)).encode(), MEDIA[Form.JSON])


def _polygons(predictor: Predictor, image: Image, limits: Limits, compress: bool) -> Answer:
    label = predictor(image)
    content = to_geojson(to_polygons(label), predictor.classes) | described(label, predictor.classes)
    return Answer(json.dumps(content).encode(), MEDIA[Form.POLYGONS])


def described(label: Label, table: ClassTable) -> dict[str, Any]:
    """Say in JSON what a label map shows: the size, and every class with its share of the pixels."""
    counts = np.bincount(label.ravel(), minlength=len(table))
    classes = [
        {"id": k, "name": name, "color": hex_color(table, k), "pixels": int(counts[k]), "share": float(counts[k] / label.size)}
        for k, name in enumerate(table.names)
    ]
    return {"width": label.shape[1], "height": label.shape[0], "classes": classes}


def hex_color(table: ClassTable, k: int) -> str:
    """Return a class's colour as a page writes it.

    >>> hex_color(ClassTable(("sky",), ((0, 128, 255),)), 0)
    '#0080ff'
    """
    return "#{:02x}{:02x}{:02x}".format(*table.colors[k])


def _probabilities(predictor: Predictor, image: Image, limits: Limits, compress: bool) -> Answer:
    size = 4 * len(predictor.classes) * image.shape[0] * image.shape[1]
    if size > limits.answer:
        raise RefusalError(
            413, f"the probabilities are {size:,} bytes, but an answer has at most {limits.answer:,}; send a smaller picture, or ask for labels"
        )
    target = io.BytesIO()
    np.savez(target, probabilities=predictor.probabilities(image), names=np.array(predictor.classes.names))
    return Answer(target.getvalue(), MEDIA[Form.PROBABILITIES])


def _planes(predictor: Predictor, image: Image, limits: Limits, compress: bool) -> Answer:
    """Send what the page draws from: the label map's bytes row by row, then each pixel's confidence, 0 to 255."""
    logits = predictor.logits(image)
    sure = confidence(logits, predictor.temperature)
    planes: NDArray[np.uint8] = np.stack([most_probable(logits), np.rint(255 * sure).astype(np.uint8)])
    headers = {"x-width": str(planes.shape[2]), "x-height": str(planes.shape[1])}
    content = planes.tobytes()
    if compress:
        gzip = zlib.compressobj(1, zlib.DEFLATED, 31)
        content, headers["content-encoding"] = gzip.compress(content) + gzip.flush(), "gzip"
    return Answer(content, MEDIA[Form.PLANES], headers)


def bundled(answers: Sequence[Answer], form: Form) -> Answer:
    """Join the answers to several pictures, in their order: a list in JSON, or a zip of ``0.png``, ``1.png``, ..."""
    if form in (Form.JSON, Form.POLYGONS):
        return Answer(b'{"pictures": [' + b", ".join(each.content for each in answers) + b"]}", MEDIA[Form.JSON])
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for k, each in enumerate(answers):
            archive.writestr(f"{k}{_SUFFIXES[form]}", each.content)
    return Answer(target.getvalue(), "application/zip")


_FORMS: dict[Form, Callable[[Predictor, Image, Limits, bool], Answer]] = {
    Form.LABELS: _labels,
    Form.OVERLAY: _overlay,
    Form.JSON: _json,
    Form.POLYGONS: _polygons,
    Form.PROBABILITIES: _probabilities,
    Form.PLANES: _planes,
}
