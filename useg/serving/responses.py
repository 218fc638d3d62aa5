"""Uploads in, response bodies out: the formats of a prediction."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from useg.classes import (
    IGNORE,
    ClassTable,
    Label,
    confidence,
    count_pixels,
    hex_color,
    most_probable,
)
from useg.images.image_files import Image, decode_image_and_missing, encode_label, encode_picture
from useg.inference.outputs import OutputOptions, label_image
from useg.inference.polygons import count_corners, geojson_features, to_polygons
from useg.inference.predictor import Predictor
from useg.inference.summaries import annotate_regions
from useg.serving.middleware import Limits
from useg.serving.request_queue import check_cancelled
from useg.serving.uploads import Upload
from useg.visualization import overlay, to_picture

# Maximum number of polygon corners in a response: about 30 MB of JSON.
MAX_CORNERS = 1_000_000
BYTES_PER_CORNER = 300

# Most objects of a response, about 30 MB of JSON, and the bytes for each; bytes per pixel to number
# them.
MAX_OBJECTS = 100_000
BYTES_PER_OBJECT, BYTES_PER_NUMBERED_PIXEL = 2000, 80


class ErrorMessage(BaseModel):
    """What was wrong, what is allowed, what to do."""

    error: str


class ModelClass(BaseModel):
    """A class of the model; the colour is CSS's ``#rrggbb``."""

    id: int
    name: str
    color: str


class ClassShare(ModelClass):
    """The pixels of an image that belong to a class, and their share, 0 to 1."""

    pixels: int
    share: float


class LabelSummary(BaseModel):
    """The size of a label map and its classes.

    ``unlike_training`` says whether the image differs from the training images; null for a model
    that does not know them.
    """

    width: int
    height: int
    classes: list[ClassShare]
    unlike_training: bool | None = None


class BatchSummary(BaseModel):
    """The label maps of a batch, in the order of its files."""

    pictures: list[LabelSummary]


class ResponseFormat(StrEnum):
    """Formats in which a prediction is returned."""

    LABELS = "labels"
    OVERLAY = "overlay"
    JSON = "json"
    POLYGONS = "polygons"
    PROBABILITIES = "probabilities"
    PLANES = "planes"
    OBJECTS = "objects"


MEDIA_TYPES = {
    ResponseFormat.LABELS: "image/png",
    ResponseFormat.OVERLAY: "image/png",
    ResponseFormat.JSON: "application/json",
    ResponseFormat.POLYGONS: "application/geo+json",
    ResponseFormat.PROBABILITIES: "application/x-npz",
    ResponseFormat.PLANES: "application/vnd.useg.planes",
    ResponseFormat.OBJECTS: "application/json",
}

# Media types that the header Accept can select; of equal weights the first counts. The other
# formats are requested by name.
_NEGOTIABLE_FORMATS = (
    ResponseFormat.JSON,
    ResponseFormat.LABELS,
    ResponseFormat.POLYGONS,
    ResponseFormat.PROBABILITIES,
    ResponseFormat.PLANES,
)

# File extensions in the zip of a batch.
_SUFFIXES = {
    ResponseFormat.LABELS: ".png",
    ResponseFormat.OVERLAY: ".png",
    ResponseFormat.PROBABILITIES: ".npz",
    ResponseFormat.PLANES: ".planes",
}


Piece = bytes | memoryview


@dataclass(frozen=True)
class EncodedPrediction:
    """A response's body in pieces, its media type, further headers.

    Pieces, because joining them would take as much memory again.
    """

    pieces: Sequence[Piece]
    media_type: str
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return sum(len(piece) for piece in self.pieces)


class PiecesResponse(Response):
    """Sends the pieces one after another, and frees each once it is sent."""

    def __init__(self, encoded: EncodedPrediction, headers: Mapping[str, str]) -> None:
        super().__init__(None, media_type=encoded.media_type, headers=headers)
        self.headers["content-length"] = str(encoded.size)
        self._pieces = list(encoded.pieces)[::-1]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        while self._pieces:
            piece = self._pieces.pop()
            more_body = bool(self._pieces)
            await send({"type": "http.response.body", "body": piece, "more_body": more_body})


class _PieceWriter:
    """A file object that collects what is written as pieces."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self._size = 0

    def write(self, content: Piece) -> int:
        """Keep content, which must not change later."""
        self.pieces.append(content)
        self._size += len(content)
        return len(content)

    def tell(self) -> int:
        """Return how much has been written."""
        return self._size

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    def close(self) -> None:
        """Do nothing: the pieces are still needed."""


def negotiate_format(requested: ResponseFormat | None, accept: str) -> ResponseFormat:
    """Return the requested format, or else the one that the header ``Accept`` prefers.

    >>> str(negotiate_format(None, "image/png"))
    'labels'

    Raises:
        HTTPException: 406, it accepts none.
    """
    if requested is not None:
        return requested
    weights = {each: _accept_weight(MEDIA_TYPES[each], accept) for each in _NEGOTIABLE_FORMATS}
    best = max(weights, key=weights.__getitem__)
    if weights[best] <= 0:
        available = ", ".join(MEDIA_TYPES[each] for each in _NEGOTIABLE_FORMATS)
        raise HTTPException(
            406,
            f"no response has the media type {accept[:80]!r}; accept one of {available}, or choose "
            f"?format={'|'.join(ResponseFormat)}",
        )
    return best


def _accept_weight(media_type: str, accept: str) -> float:
    """Return the weight, 0 to 1, of a media type in a header ``Accept`` (RFC 9110, 12.5.1).

    The most specific matching range decides.
    """
    weights = {}
    for part in (accept or "*/*").split(","):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if kind in (media_type, media_type.partition("/")[0] + "/*", "*/*"):
            text = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
            is_number = text.replace(".", "", 1).isdecimal() and text.isascii()
            weights[kind == media_type, kind != "*/*"] = float(text) if is_number else 0.0
    return weights[max(weights)] if weights else 0.0


@dataclass(frozen=True)
class _Decoded:
    """An uploaded image, and where it has no data ``(H, W)``, or None."""

    pixels: Image
    missing: NDArray[np.bool_] | None


def predict_upload(
    predictor: Predictor,
    upload: Upload,
    response_format: ResponseFormat,
    limits: Limits,
    gzip_allowed: bool = False,
) -> EncodedPrediction:
    """Predict an uploaded image.

    Args:
        predictor: the model.
        upload: the image file.
        response_format: format of the response.
        limits: most pixels of the image and bytes of the response.
        gzip_allowed: whether the client accepts gzip; used for formats that are not compressed.

    Raises:
        UsageError: it is not an image, or does not fit the model.
        HTTPException: 413, the response would be too large.
    """
    image = _Decoded(*decode_image_and_missing(upload.content, upload.name, limits.pixels))
    check_cancelled()
    return _ENCODERS[response_format](predictor, image, limits, gzip_allowed)


def known_size(response_format: ResponseFormat, pixels: int, num_classes: int) -> int:
    """Return the bytes of a response whose size follows from its pixels; otherwise 0."""
    per_pixel = {ResponseFormat.PROBABILITIES: 4 * num_classes, ResponseFormat.PLANES: 2}
    return pixels * per_pixel.get(response_format, 0)


def encoding_bytes(response_format: ResponseFormat, width: int, height: int) -> int:
    """Return the memory that encoding takes in addition to the image and its label map.

    Polygons are traced in Python, which takes seconds for a noisy label map.
    """
    if response_format is ResponseFormat.OBJECTS:
        num_objects = min(MAX_OBJECTS, width * height)
        return BYTES_PER_NUMBERED_PIXEL * width * height + BYTES_PER_OBJECT * num_objects
    if response_format is not ResponseFormat.POLYGONS:
        return 0
    return BYTES_PER_CORNER * min(MAX_CORNERS, 4 * width * height)


def _predict_label(predictor: Predictor, image: _Decoded) -> Label:
    label = label_image(predictor, image.pixels, OutputOptions(), image.missing).label
    check_cancelled()
    return label


def _encode_labels(
    predictor: Predictor, image: _Decoded, limits: Limits, gzip_allowed: bool
) -> EncodedPrediction:
    content = encode_label(_predict_label(predictor, image), predictor.classes)
    return EncodedPrediction([content], MEDIA_TYPES[ResponseFormat.LABELS])


def _encode_overlay(
    predictor: Predictor, image: _Decoded, limits: Limits, gzip_allowed: bool
) -> EncodedPrediction:
    picture = overlay(to_picture(image.pixels), _predict_label(predictor, image), predictor.classes)
    check_cancelled()
    return EncodedPrediction([encode_picture(picture)], MEDIA_TYPES[ResponseFormat.OVERLAY])


def _encode_json(
    predictor: Predictor, image: _Decoded, limits: Limits, gzip_allowed: bool
) -> EncodedPrediction:
    content = label_as_json(_predict_label(predictor, image), predictor.classes)
    distance = predictor.training_distance(image.pixels)
    content["unlike_training"] = None if distance is None else distance > 1
    return EncodedPrediction([json.dumps(content).encode()], MEDIA_TYPES[ResponseFormat.JSON])


def _encode_polygons(
    predictor: Predictor, image: _Decoded, limits: Limits, gzip_allowed: bool
) -> EncodedPrediction:
    label, classes = _predict_label(predictor, image), predictor.classes
    num_corners = count_corners(label)
    if num_corners > MAX_CORNERS:
        raise HTTPException(
            413,
            f"the polygons have {num_corners:,} corners, more than the allowed {MAX_CORNERS:,}; "
            "send a smaller image, or ask for labels",
        )
    features = geojson_features(to_polygons(label), classes)
    pieces = [b'{"type": "FeatureCollection", "features": [']
    for text in _json_parts(features):
        check_cancelled()
        pieces.append(text)
    pieces.append(b"], " + json.dumps(label_as_json(label, classes))[1:].encode())
    return EncodedPrediction(pieces, MEDIA_TYPES[ResponseFormat.POLYGONS])


def _json_parts(items: Iterable[Any]) -> Iterator[bytes]:
    """Yield the JSON of a list of items, without its brackets, in parts of about 64 kB."""
    texts: list[str] = []
    size, comma = 0, ""
    for item in items:
        texts.append(comma + json.dumps(item))
        size, comma = size + len(texts[-1]), ", "
        if size > 65_536:
            yield "".join(texts).encode()
            texts, size = [], 0
    yield "".join(texts).encode()


def label_as_json(label: Label, table: ClassTable) -> dict[str, Any]:
    """Summarise a label map: its size, each class's pixels, and their share of all with a class."""
    counts = count_pixels(label, len(table))
    classes = [
        {
            "id": k,
            "name": name,
            "color": hex_color(table, k),
            "pixels": int(counts[k]),
            "share": float(counts[k] / max(1, counts.sum())),
        }
        for k, name in enumerate(table.names)
    ]
    return {"width": label.shape[1], "height": label.shape[0], "classes": classes}


def _encode_probabilities(
    predictor: Predictor, image: _Decoded, limits: Limits, gzip_allowed: bool
) -> EncodedPrediction:
    target = _PieceWriter()
    probabilities = predictor.probabilities(image.pixels)
    if image.missing is not None:
        probabilities[:, image.missing] = 0
    check_cancelled()
    arrays = {"probabilities": probabilities, "names": np.array(predictor.classes.names)}
    # As np.savez writes it, which refuses files that cannot be read.
    with zipfile.ZipFile(target, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = np.lib.format.header_data_from_array_1_0(array)
                np.lib.format.write_array_header_1_0(member, header)
                member.write(array.reshape(-1).view(np.uint8).data)
    return EncodedPrediction(target.pieces, MEDIA_TYPES[ResponseFormat.PROBABILITIES])


def _encode_planes(
    predictor: Predictor, image: _Decoded, limits: Limits, gzip_allowed: bool
) -> EncodedPrediction:
    """Return what the page draws: the label map row by row, then each pixel's confidence, 0-255."""
    logits = predictor.logits(image.pixels)
    check_cancelled()
    confidences = np.rint(255 * confidence(logits, predictor.temperature)).astype(np.uint8)
    planes: NDArray[np.uint8] = np.stack([most_probable(logits), confidences])
    if image.missing is not None:
        planes[:, image.missing] = [[IGNORE], [0]]
    headers = {"x-width": str(planes.shape[2]), "x-height": str(planes.shape[1])}
    pieces: list[Piece] = [planes.data.cast("B")]
    if gzip_allowed:
        gzip = zlib.compressobj(1, zlib.DEFLATED, 31)
        pieces, headers["content-encoding"] = [gzip.compress(planes.data), gzip.flush()], "gzip"
    return EncodedPrediction(pieces, MEDIA_TYPES[ResponseFormat.PLANES], headers)


def _encode_objects(
    predictor: Predictor, image: _Decoded, limits: Limits, gzip_allowed: bool
) -> EncodedPrediction:
    """Return a row for each object, with its pixels as COCO's run lengths."""
    wanted = OutputOptions(objects=True)
    found = label_image(predictor, image.pixels, wanted, image.missing).objects
    assert found is not None
    check_cancelled()
    if len(found) > MAX_OBJECTS:
        raise HTTPException(
            413,
            f"there are {len(found):,} objects, more than the allowed {MAX_OBJECTS:,}; send a "
            "smaller image, or ask for labels",
        )
    values = np.concatenate([[IGNORE], found.table.class_ids])
    regions = annotate_regions(found.numbers, values)
    check_cancelled()
    rows = [
        {**row, "segmentation": region["segmentation"]}
        for row, region in zip(found.table.rows(predictor.classes), regions, strict=True)
    ]
    height, width = found.numbers.shape
    content = {"width": width, "height": height, "kept_apart": found.kept_apart, "objects": rows}
    media_type = MEDIA_TYPES[ResponseFormat.OBJECTS]
    return EncodedPrediction([json.dumps(content).encode()], media_type)


_ENCODERS: dict[
    ResponseFormat, Callable[[Predictor, _Decoded, Limits, bool], EncodedPrediction]
] = {
    ResponseFormat.LABELS: _encode_labels,
    ResponseFormat.OVERLAY: _encode_overlay,
    ResponseFormat.JSON: _encode_json,
    ResponseFormat.POLYGONS: _encode_polygons,
    ResponseFormat.PROBABILITIES: _encode_probabilities,
    ResponseFormat.PLANES: _encode_planes,
    ResponseFormat.OBJECTS: _encode_objects,
}


def bundle_predictions(
    predictions: Sequence[EncodedPrediction], response_format: ResponseFormat
) -> EncodedPrediction:
    """Join the predictions of a batch, in order: a JSON list, or a zip (``0.png``, ``1.png``)."""
    if response_format in (ResponseFormat.JSON, ResponseFormat.POLYGONS, ResponseFormat.OBJECTS):
        pieces: list[Piece] = [b'{"pictures": [']
        for k, each in enumerate(predictions):
            pieces += [b", " if k else b"", *each.pieces]
        return EncodedPrediction([*pieces, b"]}"], MEDIA_TYPES[ResponseFormat.JSON])
    target = _PieceWriter()
    with zipfile.ZipFile(target, "w") as archive:
        for k, each in enumerate(predictions):
            with archive.open(f"{k}{_SUFFIXES[response_format]}", "w") as member:
                for piece in each.pieces:
                    check_cancelled()
                    member.write(piece)
    return EncodedPrediction(target.pieces, "application/zip")
