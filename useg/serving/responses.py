"""Uploads and tensors in, response bodies out: formats of a prediction, KServe's tensor protocol.

The Open Inference Protocol, version 2, is what the clients of KServe and Triton speak. Its tensors
are written in JSON or, with the binary tensor data extension, as bytes after the JSON. A useg model
has one input, ``image`` (N, H, W, C), and two outputs, ``label_map`` (N, H, W) and
``probabilities`` (N, K, H, W). Where a request names no outputs, it gets the label map.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

from useg.classes import ClassTable, Label, confidence, hex_color, most_probable
from useg.errors import DataError, UsageError, choose
from useg.images.files import Image, decode_image, encode_label, encode_picture
from useg.inference.polygons import to_geojson, to_polygons
from useg.inference.predictor import Predictor
from useg.models.segmenter import ModelDescription
from useg.pictures import overlay, to_picture
from useg.serving.middleware import Limits, Upload

# Most numbers that a response writes in JSON.
MAX_JSON_VALUES = 4_000_000

# Names of the protocol: its datatypes, its header for the length of the JSON before binary data.
DATATYPES: dict[str, np.dtype[Any]] = {
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "FP32": np.dtype("<f4"),
}
JSON_LENGTH_HEADER = "inference-header-content-length"

INPUT_TENSOR = "image"
LABEL_MAP_TENSOR = "label_map"
PROBABILITIES_TENSOR = "probabilities"


class ResponseFormat(StrEnum):
    """Formats in which a prediction is returned."""

    LABELS = "labels"
    OVERLAY = "overlay"
    JSON = "json"
    POLYGONS = "polygons"
    PROBABILITIES = "probabilities"
    PLANES = "planes"


MEDIA_TYPES = {
    ResponseFormat.LABELS: "image/png",
    ResponseFormat.OVERLAY: "image/png",
    ResponseFormat.JSON: "application/json",
    ResponseFormat.POLYGONS: "application/geo+json",
    ResponseFormat.PROBABILITIES: "application/x-npz",
    ResponseFormat.PLANES: "application/vnd.useg.planes",
}

# What the header Accept can select; of equal weights the first. An overlay is asked for by name.
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


@dataclass(frozen=True)
class EncodedPrediction:
    """A response's body, its media type, further headers."""

    content: bytes
    media_type: str
    headers: dict[str, str] = field(default_factory=dict)


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
    image = decode_image(upload.content, upload.name, limits.pixels)
    return _ENCODERS[response_format](predictor, image, limits, gzip_allowed)


def _encode_labels(
    predictor: Predictor, image: Image, limits: Limits, gzip_allowed: bool
) -> EncodedPrediction:
    content = encode_label(predictor(image), predictor.classes)
    return EncodedPrediction(content, MEDIA_TYPES[ResponseFormat.LABELS])


def _encode_overlay(
    predictor: Predictor, image: Image, limits: Limits, gzip_allowed: bool
) -> EncodedPrediction:
    picture = overlay(to_picture(image), predictor(image), predictor.classes)
    return EncodedPrediction(encode_picture(picture), MEDIA_TYPES[ResponseFormat.OVERLAY])


def _encode_json(
    predictor: Predictor, image: Image, limits: Limits, gzip_allowed: bool
) -> EncodedPrediction:
    content = label_as_json(predictor(image), predictor.classes)
    return EncodedPrediction(json.dumps(content).encode(), MEDIA_TYPES[ResponseFormat.JSON])


def _encode_polygons(
    predictor: Predictor, image: Image, limits: Limits, gzip_allowed: bool
) -> EncodedPrediction:
    label, classes = predictor(image), predictor.classes
    content = to_geojson(to_polygons(label), classes) | label_as_json(label, classes)
    return EncodedPrediction(json.dumps(content).encode(), MEDIA_TYPES[ResponseFormat.POLYGONS])


def label_as_json(label: Label, table: ClassTable) -> dict[str, Any]:
    """Summarise a label map: its size, and each class's number and share of pixels."""
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


def _encode_probabilities(
    predictor: Predictor, image: Image, limits: Limits, gzip_allowed: bool
) -> EncodedPrediction:
    size = 4 * len(predictor.classes) * image.shape[0] * image.shape[1]
    if size > limits.response_bytes:
        raise HTTPException(
            413,
            f"the probabilities have {size:,} bytes, more than the allowed "
            f"{limits.response_bytes:,}; send a smaller image, or ask for labels",
        )
    target = io.BytesIO()
    np.savez(
        target,
        probabilities=predictor.probabilities(image),
        names=np.array(predictor.classes.names),
    )
    return EncodedPrediction(target.getvalue(), MEDIA_TYPES[ResponseFormat.PROBABILITIES])


def _encode_planes(
    predictor: Predictor, image: Image, limits: Limits, gzip_allowed: bool
) -> EncodedPrediction:
    """Return what the page draws: the label map row by row, then each pixel's confidence, 0-255."""
    logits = predictor.logits(image)
    confidences = np.rint(255 * confidence(logits, predictor.temperature)).astype(np.uint8)
    planes: NDArray[np.uint8] = np.stack([most_probable(logits), confidences])
    headers = {"x-width": str(planes.shape[2]), "x-height": str(planes.shape[1])}
    content = planes.tobytes()
    if gzip_allowed:
        gzip = zlib.compressobj(1, zlib.DEFLATED, 31)
        content, headers["content-encoding"] = gzip.compress(content) + gzip.flush(), "gzip"
    return EncodedPrediction(content, MEDIA_TYPES[ResponseFormat.PLANES], headers)


_ENCODERS: dict[ResponseFormat, Callable[[Predictor, Image, Limits, bool], EncodedPrediction]] = {
    ResponseFormat.LABELS: _encode_labels,
    ResponseFormat.OVERLAY: _encode_overlay,
    ResponseFormat.JSON: _encode_json,
    ResponseFormat.POLYGONS: _encode_polygons,
    ResponseFormat.PROBABILITIES: _encode_probabilities,
    ResponseFormat.PLANES: _encode_planes,
}


def bundle_predictions(
    predictions: Sequence[EncodedPrediction], response_format: ResponseFormat
) -> EncodedPrediction:
    """Join the predictions of a batch, in order: a JSON list, or a zip (``0.png``, ``1.png``)."""
    if response_format in (ResponseFormat.JSON, ResponseFormat.POLYGONS):
        content = b'{"pictures": [' + b", ".join(each.content for each in predictions) + b"]}"
        return EncodedPrediction(content, MEDIA_TYPES[ResponseFormat.JSON])
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for k, each in enumerate(predictions):
            archive.writestr(f"{k}{_SUFFIXES[response_format]}", each.content)
    return EncodedPrediction(target.getvalue(), "application/zip")


@dataclass(frozen=True)
class InferenceRequest:
    """A request of the Open Inference Protocol.

    Args:
        id: identifies the request; the response repeats it.
        images: the input tensor ``(N, H, W, C)``.
        outputs: name of each requested output tensor -> whether to send it as binary data.
    """

    id: str
    images: NDArray[Any]
    outputs: dict[str, bool]


def model_metadata(name: str, description: ModelDescription) -> dict[str, Any]:
    """Return the metadata of a model."""
    K = len(description.classes)
    pixels = _datatype(np.dtype(description.pixels))
    image = {"name": INPUT_TENSOR, "datatype": pixels, "shape": [-1, -1, -1, description.channels]}
    label_map = {"name": LABEL_MAP_TENSOR, "datatype": "UINT8", "shape": [-1, -1, -1]}
    probabilities = {"name": PROBABILITIES_TENSOR, "datatype": "FP32", "shape": [-1, K, -1, -1]}
    return {
        "name": name,
        "versions": ["1"],
        "platform": "useg",
        "inputs": [image],
        "outputs": [label_map, probabilities],
    }


def parse_inference_request(body: bytes, json_length: int | None) -> InferenceRequest:
    """Parse the body of an inference request.

    Args:
        body: of the HTTP request.
        json_length: bytes of the JSON, after which binary data follow; None: all is JSON.

    Raises:
        UsageError: it does not follow the protocol.
    """
    try:
        content = json.loads(body[:json_length])
        binary_data = b"" if json_length is None else body[json_length:]
        (tensor,) = content["inputs"]
        images = _parse_input(tensor, binary_data)
        outputs = content.get("outputs") or [
            {"name": LABEL_MAP_TENSOR, "parameters": content.get("parameters", {})}
        ]
        return InferenceRequest(
            str(content.get("id", ""))[:200],
            images,
            {_output_name(output): _is_binary(output, content) for output in outputs},
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
        raise DataError(
            "the request does not follow the Open Inference Protocol "
            f"({type(error).__name__}); see GET /v2/models/NAME"
        ) from error


def _parse_input(tensor: Mapping[str, Any], binary_data: bytes) -> NDArray[Any]:
    choose("the input", tensor["name"], {INPUT_TENSOR: None})
    dtype = choose("the datatype", tensor["datatype"], DATATYPES)
    shape = tuple(int(length) for length in tensor["shape"])
    if len(shape) != 4 or min(shape) < 1:
        raise DataError(
            f"the input has the shape {list(shape)[:8]}; give [images, height, width, bands]"
        )
    count = math.prod(shape)
    binary_size = (tensor.get("parameters") or {}).get("binary_data_size")
    if binary_size is None:
        return _parse_json_data(tensor["data"], dtype, count).reshape(shape)
    needed = count * dtype.itemsize
    if int(binary_size) != len(binary_data) or len(binary_data) != needed:
        raise DataError(
            f"the input's shape needs {needed:,} bytes, but {len(binary_data):,} follow the JSON; "
            "send as many bytes as the shape needs"
        )
    return np.frombuffer(binary_data, dtype).reshape(shape)


def _parse_json_data(data: Any, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    given = np.asarray(data)
    if given.dtype.kind not in "iuf":
        raise DataError("the input's data are not numbers; send numbers")
    if given.size != count:
        raise DataError(
            f"the input's shape needs {count:,} numbers, but its data have {given.size:,}; send as "
            "many numbers as the shape needs"
        )
    values = given.reshape(-1).astype(dtype)
    if dtype.kind == "u" and not np.array_equal(values, given.reshape(-1)):
        raise DataError(
            f"the input has numbers that {dtype} cannot represent; send integers from 0 to "
            f"{np.iinfo(dtype).max}"
        )
    return values


def _output_name(output: Mapping[str, Any]) -> str:
    name = str(output["name"])
    choose("the output", name, {LABEL_MAP_TENSOR: None, PROBABILITIES_TENSOR: None})
    return name


def _is_binary(output: Mapping[str, Any], content: Mapping[str, Any]) -> bool:
    default = bool((content.get("parameters") or {}).get("binary_data_output", False))
    return bool((output.get("parameters") or {}).get("binary_data", default))


def run_inference(
    predictor: Predictor, name: str, request: InferenceRequest, limits: Limits
) -> tuple[bytes, dict[str, str]]:
    """Predict the images of a request; returns the response's body and headers.

    Raises:
        UsageError: the images do not fit the model.
        HTTPException: 413, the response would be too large.
    """
    pixels = request.images[..., 0].size
    num_values = {LABEL_MAP_TENSOR: pixels, PROBABILITIES_TENSOR: pixels * len(predictor.classes)}
    for output, binary in request.outputs.items():
        if num_values[output] > (limits.response_bytes // 4 if binary else MAX_JSON_VALUES):
            raise HTTPException(
                413,
                f"the output {output!r} has {num_values[output]:,} values, too many for one "
                "response; ask for binary data, or send fewer or smaller images",
            )
    functions: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
        LABEL_MAP_TENSOR: predictor,
        PROBABILITIES_TENSOR: predictor.probabilities,
    }
    tensors = {
        output: np.stack([functions[output](image) for image in request.images])
        for output in request.outputs
    }
    return encode_inference_response(name, request, tensors)


def encode_inference_response(
    name: str, request: InferenceRequest, tensors: Mapping[str, NDArray[Any]]
) -> tuple[bytes, dict[str, str]]:
    """Return the body and headers of a response.

    Args:
        name: of the model.
        request: what it responds to.
        tensors: the requested outputs.
    """
    outputs, binary_data = [], b""
    for output, binary in request.outputs.items():
        array = np.ascontiguousarray(tensors[output])
        entry: dict[str, Any] = {
            "name": output,
            "datatype": _datatype(array.dtype),
            "shape": list(array.shape),
        }
        if binary:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            binary_data += array.tobytes()
        else:
            entry["data"] = array.ravel().tolist()
        outputs.append(entry)
    content = {"model_name": name, "model_version": "1", "outputs": outputs}
    if request.id:
        content["id"] = request.id
    text = json.dumps(content).encode()
    if not any(request.outputs.values()):
        return text, {"content-type": "application/json"}
    headers = {"content-type": "application/octet-stream", JSON_LENGTH_HEADER: str(len(text))}
    return text + binary_data, headers


def _datatype(dtype: np.dtype[Any]) -> str:
    return next(name for name, each in DATATYPES.items() if each == dtype)
