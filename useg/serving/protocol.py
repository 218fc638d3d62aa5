"""The Open Inference Protocol, version 2, which the clients of KServe and Triton speak: tensors in JSON or behind it <-> arrays.

One input, ``image`` (N, H, W, C); two outputs, ``label_map`` (N, H, W) and ``probabilities`` (N, K, H, W), of which the first is sent unless
others are asked for. With the binary extension a tensor's bytes follow the JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.errors import UsageError, choose
from useg.inference.card import Card
from useg.inference.predictor import Predictor
from useg.serving.limits import Limits, RefusalError

TYPES: dict[str, np.dtype[Any]] = {"UINT8": np.dtype(np.uint8), "UINT16": np.dtype("<u2"), "FP32": np.dtype("<f4")}
INPUT, LABELS, PROBABILITIES = "image", "label_map", "probabilities"
_JSON_VALUES = 4_000_000  # that an answer writes as numbers
LENGTH = "inference-header-content-length"  # of the JSON, when bytes follow


@dataclass(frozen=True)
class Wanted:
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
    return path.parent.resolve().name if path.name == "model.safetensors" else path.stem if path.suffix in (".onnx", ".xml") else path.name


def described(name: str, card: Card) -> dict[str, Any]:
    """Return a model's metadata."""
    return {
        "name": name,
        "versions": ["1"],
        "platform": "useg",
        "inputs": [{"name": INPUT, "datatype": _type_of(np.dtype(card.pixels)), "shape": [-1, -1, -1, card.channels]}],
        "outputs": [
            {"name": LABELS, "datatype": "UINT8", "shape": [-1, -1, -1]},
            {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, len(card.classes), -1, -1]},
        ],
    }


def read_request(body: bytes, json_bytes: int | None) -> Wanted:
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
        choose("the input", tensor["name"], {INPUT: None})
        kind = choose("the datatype", tensor["datatype"], TYPES)
        shape = tuple(int(length) for length in tensor["shape"])
        if len(shape) != 4 or min(shape) < 1:
            raise UsageError(f"the input has the shape {list(shape)[:8]}; give [pictures, height, width, bands]")
        images = _values(tensor, body[len(body) if json_bytes is None else json_bytes :], kind, math.prod(shape)).reshape(shape)
        asked = content.get("outputs") or [{"name": LABELS, "parameters": content.get("parameters", {})}]
        return Wanted(str(content.get("id", ""))[:200], images, {_output(each): _as_bytes(each, content) for each in asked})
    except UsageError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise UsageError(f"the request does not follow the Open Inference Protocol ({type(error).__name__}); see GET /v2/models/NAME") from error


def _values(tensor: Mapping[str, Any], behind: bytes, kind: np.dtype[Any], count: int) -> NDArray[Any]:
    size = (tensor.get("parameters") or {}).get("binary_data_size")
    if size is not None:
        if int(size) != len(behind) or len(behind) != count * kind.itemsize:
            raise UsageError(
                f"the input's shape needs {count * kind.itemsize:,} bytes, but {len(behind):,} follow the JSON; send as many as it needs"
            )
        return np.frombuffer(behind, kind)
    given = np.asarray(tensor["data"])
    if given.size != count or given.dtype.kind not in "iuf":
        raise UsageError(f"the input's shape needs {count:,} numbers, but its data are {given.size:,}; send as many as it needs")
    values = given.reshape(-1).astype(kind)
    if kind.kind == "u" and not np.array_equal(values, given.reshape(-1)):
        raise UsageError(f"the input has numbers that {kind} cannot hold; send whole numbers from 0 to {np.iinfo(kind).max}")
    return values


def _output(each: Mapping[str, Any]) -> str:
    name = str(each["name"])
    choose("the output", name, {LABELS: None, PROBABILITIES: None})
    return name


def _as_bytes(each: Mapping[str, Any], content: Mapping[str, Any]) -> bool:
    usual = bool((content.get("parameters") or {}).get("binary_data_output", False))
    return bool((each.get("parameters") or {}).get("binary_data", usual))


def infer(predictor: Predictor, name: str, wanted: Wanted, limits: Limits) -> tuple[bytes, dict[str, str]]:
    """Predict the images of a request; returns the answer's body and headers.

    Raises:
        UsageError: the images do not fit the model.
        RefusalError: 413, the answer would be too large.
    """
    pixels = wanted.images[..., 0].size
    values = {LABELS: pixels, PROBABILITIES: pixels * len(predictor.classes)}
    for output, as_bytes in wanted.outputs.items():
        if values[output] > (limits.answer // 4 if as_bytes else _JSON_VALUES):
            raise RefusalError(
                413, f"the output {output!r} has {values[output]:,} values, too many to send; ask for binary data, or send less at a time"
            )
    answers: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {LABELS: predictor, PROBABILITIES: predictor.probabilities}
    found = {output: np.stack([answers[output](image) for image in wanted.images]) for output in wanted.outputs}
    return write_answer(name, wanted, found)


def write_answer(name: str, wanted: Wanted, found: Mapping[str, NDArray[Any]]) -> tuple[bytes, dict[str, str]]:
    """Return the answer's body and headers.

    Args:
        name: of the model.
        wanted: the request.
        found: the outputs asked for.
    """
    outputs, behind = [], b""
    for output, as_bytes in wanted.outputs.items():
        array = np.ascontiguousarray(found[output])
        entry: dict[str, Any] = {"name": output, "datatype": _type_of(array.dtype), "shape": list(array.shape)}
        if as_bytes:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            behind += array.tobytes()
        else:
            entry["data"] = array.ravel().tolist()
        outputs.append(entry)
    content = {"model_name": name, "model_version": "1", **({"id": wanted.id} if wanted.id else {}), "outputs": outputs}
    text = json.dumps(content).encode()
    if not any(wanted.outputs.values()):
        return text, {"content-type": "application/json"}
    return text + behind, {"content-type": "application/octet-stream", LENGTH: str(len(text))}


def _type_of(kind: np.dtype[Any]) -> str:
    return next(name for name, each in TYPES.items() if each == kind)
