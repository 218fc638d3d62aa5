"""The Open Inference Protocol, version 2: tensors in, tensors out.

The clients of KServe and Triton speak it. Its tensors are written in JSON or, with the binary
tensor data extension, as bytes after the JSON. A useg model has one input, ``image``
(N, H, W, C), and two outputs, ``label_map`` (N, H, W) and ``probabilities`` (N, K, H, W). Where a
request names no outputs, it gets the label map.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from useg.errors import DataError, UsageError, choose
from useg.inference.predictor import Predictor
from useg.models.description import ModelDescription
from useg.serving.request_queue import check_cancelled
from useg.serving.responses import EncodedPrediction, Piece

# Maximum count of numbers that a response writes as JSON.
MAX_JSON_VALUES = 4_000_000
JSON_VALUES_AT_A_TIME = 50_000

# Parsing JSON takes many times its size in memory, and all other threads wait meanwhile. So its
# size and the number of its lists and names are limited; large images come as binary data.
MAX_JSON_BYTES = 2_000_000
MAX_JSON_LISTS = 200_000
MAX_JSON_NAMES = 1000
JSON_EXPANSION = 30
MAX_TENSOR_IMAGES = 1000

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


class ServerMetadata(BaseModel):
    """Open Inference Protocol: the server and its extensions of the protocol."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(BaseModel):
    """Open Inference Protocol: whether the server is live."""

    live: bool


class ServerReady(BaseModel):
    """Open Inference Protocol: whether the server is ready."""

    ready: bool


class TensorMetadata(BaseModel):
    """Open Inference Protocol: a tensor; -1 stands for any length."""

    name: str
    datatype: str
    shape: list[int]


class ServedModelMetadata(BaseModel):
    """Open Inference Protocol: the model's inputs and outputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServedModelReady(BaseModel):
    """Open Inference Protocol: whether the model is ready."""

    name: str
    ready: bool


class OutputTensor(TensorMetadata):
    """Open Inference Protocol: an output, with its data unless they follow as binary data."""

    data: list[float] | None = None
    parameters: dict[str, Any] | None = None


class InferenceResponse(BaseModel):
    """Open Inference Protocol: the requested outputs."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


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


def check_json_length(length: int) -> None:
    """Refuse JSON that takes too much time and memory to parse.

    Raises:
        HTTPException: 413.
    """
    if length > MAX_JSON_BYTES:
        raise HTTPException(
            413,
            f"the request has {length:,} bytes of JSON, more than the allowed "
            f"{MAX_JSON_BYTES:,}; send the image as binary data, or a smaller one",
        )


def parse_inference_request(body: bytes, json_length: int | None) -> InferenceRequest:
    """Parse the body of an inference request.

    Args:
        body: of the HTTP request.
        json_length: bytes of the JSON, after which binary data follow; None: all is JSON.

    Raises:
        UsageError: it does not follow the protocol.
        HTTPException: 413, it has too much JSON.
    """
    text = body[:json_length]
    check_json_length(len(text))
    if text.count(b"[") > MAX_JSON_LISTS or text.count(b'"') + text.count(b"{") > MAX_JSON_NAMES:
        raise HTTPException(
            413,
            f"the JSON has more than {MAX_JSON_LISTS:,} lists or {MAX_JSON_NAMES:,} names; send "
            "the image's data as one flat list, or as binary data",
        )
    try:
        content = json.loads(text)
        binary_data = memoryview(b"" if json_length is None else body)[json_length or 0 :]
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


def _parse_input(tensor: Mapping[str, Any], binary_data: memoryview) -> NDArray[Any]:
    choose("the input", tensor["name"], {INPUT_TENSOR: None})
    dtype = choose("the datatype", tensor["datatype"], DATATYPES)
    shape = tuple(operator.index(length) for length in tensor["shape"])
    if len(shape) != 4 or min(shape) < 1:
        raise DataError(
            f"the input has the shape {str(list(shape[:8]))[:80]}; give [images, height, width, "
            "bands]"
        )
    if shape[0] > MAX_TENSOR_IMAGES:
        raise DataError(f"the input has more than {MAX_TENSOR_IMAGES:,} images; send fewer")
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


def run_inference(predictor: Predictor, name: str, request: InferenceRequest) -> EncodedPrediction:
    """Predict the images of a request; returns the response.

    Raises:
        UsageError: the images do not fit the model.
    """
    N, H, W, _ = request.images.shape
    K = len(predictor.classes)
    tensors: dict[str, NDArray[Any]] = {}
    for output in request.outputs:
        is_label_map = output == LABEL_MAP_TENSOR
        predict = predictor if is_label_map else predictor.probabilities
        shape, dtype = ((N, H, W), np.uint8) if is_label_map else ((N, K, H, W), np.float32)
        tensors[output] = np.empty(shape, dtype)
        for k, image in enumerate(request.images):
            tensors[output][k] = predict(image)
            check_cancelled()
    return encode_inference_response(name, request, tensors)


def inference_response_size(request: InferenceRequest, num_classes: int) -> int:
    """Return about how many bytes the response has.

    Raises:
        HTTPException: 413, it would have too much JSON.
    """
    pixels, size, num_json_values = request.images[..., 0].size, 0, 0
    for output, binary in request.outputs.items():
        is_label_map = output == LABEL_MAP_TENSOR
        num_values = pixels if is_label_map else pixels * num_classes
        if binary:
            size += num_values if is_label_map else 4 * num_values
        else:
            num_json_values += num_values
            # A number and what separates it from the next one.
            size += num_values * (5 if is_label_map else 25)
    if num_json_values > MAX_JSON_VALUES:
        raise HTTPException(
            413,
            f"the outputs have {num_json_values:,} values, too many for JSON; ask for binary data, "
            "or send fewer or smaller images",
        )
    return size


def encode_inference_response(
    name: str, request: InferenceRequest, tensors: Mapping[str, NDArray[Any]]
) -> EncodedPrediction:
    """Return the response to a request.

    Args:
        name: of the model.
        request: what it responds to.
        tensors: the requested outputs.
    """
    content: dict[str, Any] = {"model_name": name, "model_version": "1"}
    if request.id:
        content["id"] = request.id
    pieces: list[Piece] = [json.dumps(content)[:-1].encode() + b', "outputs": [']
    binary_data: list[Piece] = []
    for k, (output, binary) in enumerate(request.outputs.items()):
        array = tensors[output]
        entry: dict[str, Any] = {
            "name": output,
            "datatype": _datatype(array.dtype),
            "shape": list(array.shape),
        }
        if binary:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            binary_data.append(array.data.cast("B"))
        head = (b", " if k else b"") + json.dumps(entry)[:-1].encode()
        pieces += [head, b"}"] if binary else [head + b', "data": [', *_json_values(array), b"]}"]
    pieces.append(b"]}")
    if not binary_data:
        return EncodedPrediction(pieces, "application/json")
    headers = {JSON_LENGTH_HEADER: str(sum(map(len, pieces)))}
    return EncodedPrediction([*pieces, *binary_data], "application/octet-stream", headers)


def _json_values(array: NDArray[Any]) -> Iterator[bytes]:
    """Yield the values of an array as JSON in small parts, so that other threads can run.

    During one call of ``json.dumps`` for all values they would wait.
    """
    values = array.reshape(-1)
    for start in range(0, len(values), JSON_VALUES_AT_A_TIME):
        check_cancelled()
        part = values[start : start + JSON_VALUES_AT_A_TIME].tolist()
        yield (", " if start else "").encode() + json.dumps(part)[1:-1].encode()


def _datatype(dtype: np.dtype[Any]) -> str:
    return next(name for name, each in DATATYPES.items() if each == dtype)
