"""A trained model -> ONNX file -> a function on numpy arrays, computed by ONNX Runtime.

The file is an ONNX model like any other: what useg adds are two entries of its metadata, the card and a SHA-256 of all that comes
before. A protocol buffer is read the same when fields are appended, so both are simply the file's last bytes.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from useg.errors import UsageError, need
from useg.inference.tiles import Network
from useg.models.segmenter import Segmenter

EXTRA = "onnx"
INPUT, OUTPUT = "pixels", "logits"


def convert(model: Segmenter) -> bytes:
    """Turn a model into an ONNX graph: raw pixels of the model's number type in, logits out, any batch, height and width that it takes.

    Raises:
        UsageError: a package is missing.
    """
    need("onnx", EXTRA)
    need("onnxscript", EXTRA)
    smallest, stride = model.valid_size(1), model.stride
    side = smallest + 2 * stride  # an example of two unequal sides above 1, so that no size looks like a constant
    x = torch.zeros(2, model.channels, side, side + stride, dtype=getattr(torch, model.pixels), device=model.mean.device)
    rows, columns = (stride * torch.export.Dim(name) for name in ("rows", "columns"))
    if offset := smallest % stride:
        rows, columns = rows + offset, columns + offset
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of its own parts
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch"), 2: rows, 3: columns},))
        exported = torch.onnx.export(program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], external_data=False, verbose=False)
    assert exported is not None
    proto = exported.model_proto
    for part in (*proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del part.metadata_props[:]  # where in whose source code it was made
    for value, names in ((proto.graph.input[0], ("height", "width")), (proto.graph.output[0], ("out_height", "out_width"))):
        for place, name in ((0, "batch"), (2, names[0]), (3, names[1])):
            value.type.tensor_type.shape.dim[place].dim_param = name
    content: bytes = proto.SerializeToString()
    return content


def network(content: bytes, source: Path) -> Network:
    """Compute an ONNX graph on as many threads as PyTorch has.

    Raises:
        UsageError: ONNX Runtime is not installed, or cannot run the graph.
    """
    runtime = need("onnxruntime", EXTRA)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # what goes wrong is raised, too
    try:
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # they have no common class
        raise UsageError(f"ONNX Runtime cannot run {source} ({_first_line(error)}); export it again") from error

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        try:
            logits: NDArray[np.float32] = session.run([OUTPUT], {INPUT: np.ascontiguousarray(x)})[0]
        except Exception as error:
            raise UsageError(f"ONNX Runtime failed on {source} ({_first_line(error)}); try --runtime torch or openvino") from error
        return logits

    return run


def write(path: Path, content: bytes, text: str) -> list[Path]:
    """Write a graph and its card; returns the file in a list."""
    body = content + _entry("useg", text)
    path.write_bytes(body + _entry("sha256", hashlib.sha256(body).hexdigest()))
    return [path]


def read(path: Path) -> tuple[bytes, str]:
    """Read what ``write`` wrote: the file's content, which is the graph, and its card.

    Raises:
        UsageError: not such a file, or it has changed.
    """
    content = path.read_bytes()
    last = len(_entry("sha256", "0" * 64))
    body, seal = content[:-last], content[-last:]
    if seal != _entry("sha256", hashlib.sha256(body).hexdigest()):
        raise UsageError(f"{path} is damaged, or not an ONNX file that useg export wrote; export or copy it again")
    text = body[body.rfind(b"\n\x04useg\x12") :]
    return content, text[text.index(b"{") :].decode()


def _entry(key: str, value: str) -> bytes:
    """Encode an entry of ``metadata_props``, field 14 of ONNX's ModelProto: a message of two strings, key and value."""
    return _field(14, _field(1, key.encode()) + _field(2, value.encode()))


def _field(number: int, content: bytes) -> bytes:
    length, rest = b"", len(content)
    while rest > 127:
        length, rest = length + bytes([rest % 128 + 128]), rest // 128
    return bytes([number * 8 + 2]) + length + bytes([rest]) + content


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:200]
