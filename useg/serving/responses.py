"""A picture file and the form asked for -> the answer's bytes."""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import ClassTable, Label, confidence, most_probable
from useg.errors import UsageError, choose
from useg.images.files import Image, decode_image, encode_label, encode_picture
from useg.inference.polygons import to_geojson, to_polygons
from useg.inference.predictor import Predictor
from useg.models.segmenter import ModelDescription
from useg.pictures import overlay, to_picture
from useg.serving.middleware import Limits, RefusalError, Upload


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


_SUFFIXES = {
    Form.LABELS: ".png",
    Form.OVERLAY: ".png",
    Form.PROBABILITIES: ".npz",
    Form.PLANES: ".planes",
}


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
        raise RefusalError(
            406,
            f"nothing is answered as {accept[:80]!r}; accept one of {kinds}, or ask with ?format={'|'.join(Form)}",
        )
    return best


def _quality(media: str, accept: str) -> float:
    """Return how welcome a media type is, 0 to 1, to a header ``Accept`` (RFC 9110, 12.5.1): the most specific range that fits decides."""
    found = {}
    for part in (accept or "*/*").split(","):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if kind in (media, media.partition("/")[0] + "/*", "*/*"):
            weight = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
            found[kind == media, kind != "*/*"] = (
                float(weight)
                if weight.replace(".", "", 1).isdecimal() and weight.isascii()
                else 0.0
            )
    return found[max(found)] if found else 0.0


def respond(
    predictor: Predictor, upload: Upload, form: Form, limits: Limits, compress: bool = False
) -> Answer:
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
    return Answer(
        encode_picture(overlay(to_picture(image), predictor(image), predictor.classes)),
        MEDIA[Form.OVERLAY],
    )


def _json(predictor: Predictor, image: Image, limits: Limits, compress: bool) -> Answer:
    return Answer(
        json.dumps(label_as_json(predictor(image), predictor.classes)).encode(), MEDIA[Form.JSON]
    )


def _polygons(predictor: Predictor, image: Image, limits: Limits, compress: bool) -> Answer:
    label = predictor(image)
    content = to_geojson(to_polygons(label), predictor.classes) | label_as_json(
        label, predictor.classes
    )
    return Answer(json.dumps(content).encode(), MEDIA[Form.POLYGONS])


def label_as_json(label: Label, table: ClassTable) -> dict[str, Any]:
    """Say in JSON what a label map shows: the size, and every class with its share of the pixels."""
    counts = np.bincount(label.ravel(), minlength=len(table))
    classes = [
        {
            "id": k,
            "name": name,
            "color": hex_color(table, k),
            "pixels": int(counts[k]),
            "share": float(counts[k] / label.size),
        }
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
            413,
            f"the probabilities are {size:,} bytes, but an answer has at most {limits.answer:,}; send a smaller picture, or ask for labels",
        )
    target = io.BytesIO()
    np.savez(
        target,
        probabilities=predictor.probabilities(image),
        names=np.array(predictor.classes.names),
    )
    return Answer(target.getvalue(), MEDIA[Form.PROBABILITIES])


def _planes(predictor: Predictor, image: Image, limits: Limits, compress: bool) -> Answer:
    """Send what the page draws from: the label map's bytes row by row, then each pixel's confidence, 0 to 255."""
    logits = predictor.logits(image)
    sure = confidence(logits, predictor.temperature)
    planes: NDArray[np.uint8] = np.stack(
        [most_probable(logits), np.rint(255 * sure).astype(np.uint8)]
    )
    headers = {"x-width": str(planes.shape[2]), "x-height": str(planes.shape[1])}
    content = planes.tobytes()
    if compress:
        gzip = zlib.compressobj(1, zlib.DEFLATED, 31)
        content, headers["content-encoding"] = gzip.compress(content) + gzip.flush(), "gzip"
    return Answer(content, MEDIA[Form.PLANES], headers)


def bundled(answers: Sequence[Answer], form: Form) -> Answer:
    """Join the answers to several pictures, in their order: a list in JSON, or a zip of ``0.png``, ``1.png``, ..."""
    if form in (Form.JSON, Form.POLYGONS):
        return Answer(
            b'{"pictures": [' + b", ".join(each.content for each in answers) + b"]}",
            MEDIA[Form.JSON],
        )
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


TYPES: dict[str, np.dtype[Any]] = {
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "FP32": np.dtype("<f4"),
}


TENSOR_INPUT, TENSOR_LABELS, TENSOR_PROBABILITIES = "image", "label_map", "probabilities"


_JSON_VALUES = 4_000_000  # that an answer writes as numbers


LENGTH = "inference-header-content-length"  # of the JSON, when bytes follow


@dataclass(frozen=True)
class InferenceRequest:
    """What a request asks for.

    Args:
        id: of the request, sent back.
        images: ``(N, H, W, C)``.
        outputs: names, and whether each is to be sent as bytes.
    """

    id: str
    images: NDArray[Any]
    outputs: dict[str, bool]


def name_of(source: Path) -> str:
    """Return the name of a model: its run folder's, or an exported file's.

    >>> name_of(Path("runs/street/model.safetensors")), name_of(Path("street.onnx"))
    ('street', 'street')
    """
    path = source.resolve() if not source.name else source
    return (
        path.parent.resolve().name
        if path.name == "model.safetensors"
        else path.stem
        if path.suffix in (".onnx", ".xml")
        else path.name
    )


def model_metadata(name: str, card: ModelDescription) -> dict[str, Any]:
    """Return a model's metadata."""
    return {
        "name": name,
        "versions": ["1"],
        "platform": "useg",
        "inputs": [
            {
                "name": TENSOR_INPUT,
                "datatype": _type_of(np.dtype(card.pixels)),
                "shape": [-1, -1, -1, card.channels],
            }
        ],
        "outputs": [
            {"name": TENSOR_LABELS, "datatype": "UINT8", "shape": [-1, -1, -1]},
            {
                "name": TENSOR_PROBABILITIES,
                "datatype": "FP32",
                "shape": [-1, len(card.classes), -1, -1],
            },
        ],
    }


def read_request(body: bytes, json_bytes: int | None) -> InferenceRequest:
    """Read a request.

    Args:
        body: of the HTTP request.
        json_bytes: how many of its bytes are JSON; None: all.

    Raises:
        UsageError: it does not follow the protocol.
    """
    try:
        content = json.loads(body[:json_bytes])
        (tensor,) = content["inputs"]
        choose("the input", tensor["name"], {TENSOR_INPUT: None})
        kind = choose("the datatype", tensor["datatype"], TYPES)
        shape = tuple(int(length) for length in tensor["shape"])
        if len(shape) != 4 or min(shape) < 1:
            raise UsageError(
                f"the input has the shape {list(shape)[:8]}; give [pictures, height, width, bands]"
            )
        images = _values(
            tensor, body[len(body) if json_bytes is None else json_bytes :], kind, math.prod(shape)
        ).reshape(shape)
        asked = content.get("outputs") or [
            {"name": TENSOR_LABELS, "parameters": content.get("parameters", {})}
        ]
        return InferenceRequest(
            str(content.get("id", ""))[:200],
            images,
            {_output(each): _as_bytes(each, content) for each in asked},
        )
    except UsageError:
        raise
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise UsageError(
            f"the request does not follow the Open Inference Protocol ({type(error).__name__}); see GET /v2/models/NAME"
        ) from error


def _values(
    tensor: Mapping[str, Any], behind: bytes, kind: np.dtype[Any], count: int
) -> NDArray[Any]:
    size = (tensor.get("parameters") or {}).get("binary_data_size")
    if size is not None:
        if int(size) != len(behind) or len(behind) != count * kind.itemsize:
            raise UsageError(
                f"the input's shape needs {count * kind.itemsize:,} bytes, but {len(behind):,} follow the JSON; send as many as it needs"
            )
        return np.frombuffer(behind, kind)
    given = np.asarray(tensor["data"])
    if given.size != count or given.dtype.kind not in "iuf":
        raise UsageError(
            f"the input's shape needs {count:,} numbers, but its data are {given.size:,}; send as many as it needs"
        )
    values = given.reshape(-1).astype(kind)
    if kind.kind == "u" and not np.array_equal(values, given.reshape(-1)):
        raise UsageError(
            f"the input has numbers that {kind} cannot hold; send whole numbers from 0 to {np.iinfo(kind).max}"
        )
    return values


def _output(each: Mapping[str, Any]) -> str:
    name = str(each["name"])
    choose("the output", name, {TENSOR_LABELS: None, TENSOR_PROBABILITIES: None})
    return name


def _as_bytes(each: Mapping[str, Any], content: Mapping[str, Any]) -> bool:
    usual = bool((content.get("parameters") or {}).get("binary_data_output", False))
    return bool((each.get("parameters") or {}).get("binary_data", usual))


def infer(
    predictor: Predictor, name: str, wanted: InferenceRequest, limits: Limits
) -> tuple[bytes, dict[str, str]]:
    """Predict the images of a request; returns the answer's body and headers.

    Raises:
        UsageError: the images do not fit the model.
        RefusalError: 413, the answer would be too large.
    """
    pixels = wanted.images[..., 0].size
    values = {TENSOR_LABELS: pixels, TENSOR_PROBABILITIES: pixels * len(predictor.classes)}
    for output, as_bytes in wanted.outputs.items():
        if values[output] > (limits.answer // 4 if as_bytes else _JSON_VALUES):
            raise RefusalError(
                413,
                f"the output {output!r} has {values[output]:,} values, too many to send; ask for binary data, or send less at a time",
            )
    answers: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
        TENSOR_LABELS: predictor,
        TENSOR_PROBABILITIES: predictor.probabilities,
    }
    found = {
        output: np.stack([answers[output](image) for image in wanted.images])
        for output in wanted.outputs
    }
    return write_answer(name, wanted, found)


def write_answer(
    name: str, wanted: InferenceRequest, found: Mapping[str, NDArray[Any]]
) -> tuple[bytes, dict[str, str]]:
    """Return the answer's body and headers.

    Args:
        name: of the model.
        wanted: the request.
        found: the outputs asked for.
    """
    outputs, behind = [], b""
    for output, as_bytes in wanted.outputs.items():
        array = np.ascontiguousarray(found[output])
        entry: dict[str, Any] = {
            "name": output,
            "datatype": _type_of(array.dtype),
            "shape": list(array.shape),
        }
        if as_bytes:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            behind += array.tobytes()
        else:
            entry["data"] = array.ravel().tolist()
        outputs.append(entry)
    content = {
        "model_name": name,
        "model_version": "1",
        **({"id": wanted.id} if wanted.id else {}),
        "outputs": outputs,
    }
    text = json.dumps(content).encode()
    if not any(wanted.outputs.values()):
        return text, {"content-type": "application/json"}
    return text + behind, {"content-type": "application/octet-stream", LENGTH: str(len(text))}


def _type_of(kind: np.dtype[Any]) -> str:
    return next(name for name, each in TYPES.items() if each == kind)
