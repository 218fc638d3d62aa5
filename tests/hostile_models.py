"""Model files with a valid checksum that useg did not write: forged descriptions and graphs.

A forger computes the checksum anew, so it proves nothing. Used by tests of the readers and by the
fuzzer of model files.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from made_inference import make_model_of
from torch import Tensor

from useg.inference import exported
from useg.models.description import description_to_json, model_fields_to_json
from useg.models.segmenter import Segmenter, _digest, describe_model

# What a field of a description may be instead: other types, sizes, numbers and texts.
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 7, 255, 256, 65536, 10**6, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-300),
    *(1e300, "", "a", "3", "\x1b[31m", "../../x", "x" * 5000, [], [1], [[1]], [1, 2], {}, {"a": 1}),
)


def seal_model(path: Path, text: str, tensors: Mapping[str, Tensor]) -> Path:
    """Write a model file with its checksum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    entry = f"{_digest(text, tensors)} {text}"
    path.write_bytes(safetensors.torch.save(tensors, {"useg": entry}))
    return path


def seal_onnx(path: Path, graph: bytes, text: str) -> Path:
    """Write an ONNX file with its checksum."""
    return exported.write_onnx(path, graph, text)[0]


def seal_openvino(path: Path, content: bytes, weights: bytes) -> Path:
    """Write the two files of an OpenVINO model with their checksum."""
    path.with_suffix(".bin").write_bytes(weights)
    path.write_bytes(exported._with_digest(content, weights))
    return path


def parts_of(model: Segmenter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a model file."""
    description = json.loads(model_fields_to_json(describe_model(model)))
    return description, {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def tiny_model() -> Segmenter:
    """A model with all kinds of tensors, whose file has 14 kB."""
    return make_model_of("same")


def places(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in nested lists and mappings, outer ones first."""
    yield at
    items = content.items() if isinstance(content, dict) else ()
    items = enumerate(content) if isinstance(content, list) else items
    for key, value in items:
        yield from places(value, (*at, key))


def changed(content: Any, at: tuple[Any, ...], value: Any) -> Any:
    """A copy in which the value at a place is another one."""
    if not at:
        return value
    content = copy.deepcopy(content)
    parent = content
    for key in at[:-1]:
        parent = parent[key]
    parent[at[-1]] = value
    return content


# Changes of tensors that make a model unusable, by name.
Tensors = dict[str, Tensor]
WEIGHT = "network.down.0.0.weight"
TENSOR_CHANGES: dict[str, Callable[[Tensors], Tensors]] = {
    "a tensor is missing": lambda t: {k: v for k, v in t.items() if k != WEIGHT},
    "no mean": lambda t: {k: v for k, v in t.items() if k != "mean"},
    "one more tensor": lambda t: {**t, "zz": torch.zeros(1)},
    "other numbers": lambda t: {**t, WEIGHT: t[WEIGHT].double()},
    "no numbers": lambda t: {**t, WEIGHT: torch.zeros(0)},
    "another shape": lambda t: {**t, WEIGHT: t[WEIGHT].flatten()},
    "mean of one axis": lambda t: {**t, "mean": t["mean"].flatten()},
    "NaN": lambda t: {**t, WEIGHT: torch.full_like(t[WEIGHT], torch.nan)},
    "infinity": lambda t: {**t, WEIGHT: torch.full_like(t[WEIGHT], torch.inf)},
    "deviation 0": lambda t: {**t, "std": torch.zeros_like(t["std"])},
    "negative variance": lambda t: {
        k: -v - 1 if k.endswith("running_var") else v for k, v in t.items()
    },
}


def whole_description(model: Segmenter) -> dict[str, Any]:
    """The description of an exported file."""
    return json.loads(description_to_json(describe_model(model)))
