"""A trained model -> ONNX file -> a function on numpy arrays, computed by ONNX Runtime.

The file is an ONNX model like any other: what useg adds are two entries of its metadata, the description and a SHA-256 of all that comes
before. A protocol buffer is read the same when fields are appended, so both are simply the file's last bytes.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
import tempfile
import threading
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from useg.errors import UsageError, need
from useg.inference.tiles import LogitsFunction
from useg.machine import measure_seconds
from useg.models.segmenter import Segmenter

ONNX_EXTRA = "onnx"


INPUT_NAME, OUTPUT_NAME = "pixels", "logits"

REGISTRATION_LOGGER = "torch.onnx._internal.exporter._registration"


def to_onnx(model: Segmenter) -> bytes:
    """Turn a model into an ONNX graph: raw pixels of the model's number type in, logits out, any batch, height and width that it takes.

    Raises:
        UsageError: a package is missing.
    """
    need("onnx", ONNX_EXTRA)
    need("onnxscript", ONNX_EXTRA)
    smallest, stride = model.valid_size(1), model.stride
    side = (
        smallest + 2 * stride
    )  # an example of two unequal sides above 1, so that no size looks like a constant
    x = torch.zeros(
        2,
        model.channels,
        side,
        side + stride,
        dtype=getattr(torch, model.pixels),
        device=model.mean.device,
    )
    rows, columns = (stride * torch.export.Dim(name) for name in ("rows", "columns"))
    if offset := smallest % stride:
        rows, columns = rows + offset, columns + offset
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of its own parts
        program = torch.export.export(
            model, (x,), dynamic_shapes=({0: torch.export.Dim("batch"), 2: rows, 3: columns},)
        )
        # On import it logs a line for each operator of torchvision, which is not needed here.
        logging.getLogger(REGISTRATION_LOGGER).addFilter(_is_not_about_torchvision)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            external_data=False,
            verbose=False,
        )
    assert exported is not None
    proto = exported.model_proto
    for part in (
        *proto.graph.node,
        *proto.graph.value_info,
        *proto.graph.input,
        *proto.graph.output,
        *proto.graph.initializer,
    ):
        del part.metadata_props[:]  # where in whose source code it was made
    for value, names in (
        (proto.graph.input[0], ("height", "width")),
        (proto.graph.output[0], ("out_height", "out_width")),
    ):
        for place, name in ((0, "batch"), (2, names[0]), (3, names[1])):
            value.type.tensor_type.shape.dim[place].dim_param = name
    content: bytes = proto.SerializeToString()
    return content


def _is_not_about_torchvision(record: logging.LogRecord) -> bool:
    return "torchvision is not installed" not in record.getMessage()


def onnx_function(content: bytes, source: Path) -> LogitsFunction:
    """Compute an ONNX graph on as many threads as PyTorch has.

    Raises:
        UsageError: ONNX Runtime is not installed, or cannot run the graph.
    """
    runtime = need("onnxruntime", ONNX_EXTRA)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # what goes wrong is raised, too
    try:
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # they have no common class
        raise UsageError(
            f"ONNX Runtime cannot run {source} ({_first_line(error)}); export it again"
        ) from error

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        try:
            logits: NDArray[np.float32] = session.run(
                [OUTPUT_NAME], {INPUT_NAME: np.ascontiguousarray(x)}
            )[0]
        except Exception as error:
            raise UsageError(
                f"ONNX Runtime failed on {source} ({_first_line(error)}); try --runtime torch or openvino"
            ) from error
        return logits

    return run


def write_onnx(path: Path, content: bytes, text: str) -> list[Path]:
    """Write a graph and its description; returns the file in a list."""
    body = content + _metadata_entry("useg", text)
    path.write_bytes(body + _metadata_entry("sha256", hashlib.sha256(body).hexdigest()))
    return [path]


def read_onnx(path: Path) -> tuple[bytes, str]:
    """Read what ``write`` wrote: the file's content, which is the graph, and its description.

    Raises:
        UsageError: not such a file, or it has changed.
    """
    content = path.read_bytes()
    last = len(_metadata_entry("sha256", "0" * 64))
    body, seal = content[:-last], content[-last:]
    if seal != _metadata_entry("sha256", hashlib.sha256(body).hexdigest()):
        raise UsageError(
            f"{path} is damaged, or not an ONNX file that useg export wrote; export or copy it again"
        )
    text = body[body.rfind(b"\n\x04useg\x12") :]
    return content, text[text.index(b"{") :].decode()


def _metadata_entry(key: str, value: str) -> bytes:
    """Encode an entry of ``metadata_props``, field 14 of ONNX's ModelProto: a message of two strings, key and value."""
    return _protobuf_field(
        14, _protobuf_field(1, key.encode()) + _protobuf_field(2, value.encode())
    )


def _protobuf_field(number: int, content: bytes) -> bytes:
    length, rest = b"", len(content)
    while rest > 127:
        length, rest = length + bytes([rest % 128 + 128]), rest // 128
    return bytes([number * 8 + 2]) + length + bytes([rest]) + content


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:200]


OPENVINO_EXTRA = "openvino"


_DIGEST = re.compile(rb'(<sha256 value=")([0-9a-f]{64})(")')


def import_openvino() -> ModuleType:
    """Import OpenVINO.

    Raises:
        UsageError: it is not installed.
    """
    silence_telemetry()
    return need("openvino", OPENVINO_EXTRA)


def silence_telemetry() -> None:
    """Keep OpenVINO and NNCF from telling Google Analytics of every conversion: they do without this package of theirs."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def to_openvino(model: Segmenter) -> Any:
    """Turn a model into an OpenVINO graph: raw pixels of the model's number type in, logits out, any batch, height and width that it takes."""
    openvino = import_openvino()
    side = model.valid_size(1) + 2 * model.stride
    x = torch.zeros(2, model.channels, side, side + model.stride)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch warns of the check of the size, which is not part of the graph
        graph = openvino.convert_model(model, example_input=x)
    graph.reshape([-1, model.channels, -1, -1])
    pixels = openvino.preprocess.PrePostProcessor(graph)
    pixels.input().tensor().set_element_type(openvino.Type(np.dtype(model.pixels)))
    return _with_tensor_names(pixels.build())


def _with_tensor_names(graph: Any) -> Any:
    graph.inputs[0].set_names({"pixels"})
    graph.outputs[0].set_names({"logits"})
    return graph


def openvino_from_onnx(content: bytes) -> Any:
    """Read an ONNX graph."""
    return _with_tensor_names(import_openvino().Core().read_model(content))


@cache
def has_bf16() -> bool:
    """Whether this processor computes in bf16 itself."""
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def openvino_function(graph: Any) -> LogitsFunction:
    """Compute a graph in fp32 (and int8, where it says so)."""
    return _compile_graph(graph, "f32")


def openvino_bf16_function(graph: Any) -> LogitsFunction:
    """Compute a graph in bf16 (and int8, where it says so).

    Raises:
        UsageError: the processor cannot.
    """
    if not has_bf16():
        raise UsageError("this processor does not compute in bf16; choose --runtime openvino")
    return _compile_graph(graph, "bf16")


def _compile_graph(graph: Any, precision: str) -> LogitsFunction:
    """Compile for any size: on the measured networks at most 2 % slower than for one size, and no size is ever compiled anew.

    One picture is computed by all threads together. A batch is either, too, or is spread: as many pictures at a time as there are threads,
    one thread each. A trial on the first batch decides. Where torch's number of threads has been set to one since, the caller is one of several
    threads with a picture and a core each.
    """
    core, threads = import_openvino().Core(), torch.get_num_threads()
    # OpenVINO's binding meets numpy when a tensor's data is first asked for: two threads that did so at once would wait for each other for ever.
    _ = import_openvino().Tensor(np.zeros(1, np.float32)).data

    def compiled(streams: int) -> Any:  # left alone, OpenVINO would choose bf16
        return core.compile_model(
            graph,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": precision,
                "NUM_STREAMS": streams,
                "INFERENCE_NUM_THREADS": threads,
            },
        )

    together = _one_request_per_thread(compiled(1))
    if threads == 1:
        return together
    chosen: list[LogitsFunction] = []
    apart: list[LogitsFunction] = []
    compiling = threading.Lock()

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        if torch.get_num_threads() == 1:
            with compiling:
                if not apart:
                    apart.append(_one_request_per_thread(compiled(threads)))
            return apart[0](x)
        if len(x) == 1:
            return together(x)
        if not chosen:
            chosen.append(
                min(
                    (together, _one_image_per_request(compiled(threads), threads)),
                    key=lambda network: measure_seconds(network, x),
                )
            )
        return chosen[0](x)

    return run


def _one_request_per_thread(compiled: Any) -> LogitsFunction:
    requests: dict[int, Any] = {}  # one serves one thread at a time

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        thread = threading.get_ident()
        request = requests.get(thread) or requests.setdefault(
            thread, compiled.create_infer_request()
        )
        logits: NDArray[np.float32] = request.infer([np.ascontiguousarray(x)])[0]
        return logits

    return run


def _one_image_per_request(compiled: Any, requests: int) -> LogitsFunction:
    queue = import_openvino().AsyncInferQueue(compiled, requests)

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        answers: dict[int, NDArray[np.float32]] = {}
        queue.set_callback(
            lambda request, k: answers.update({k: request.get_output_tensor().data.copy()})
        )
        for k in range(len(x)):
            queue.start_async([np.ascontiguousarray(x[k : k + 1])], k)
        queue.wait_all()
        return np.concatenate([answers[k] for k in range(len(x))])

    return run


def write_openvino(path: Path, graph: Any, text: str) -> list[Path]:
    """Write a graph and its description; returns the two files."""
    graph.set_rt_info(text, ["useg", "card"])
    graph.set_rt_info("0" * 64, ["useg", "sha256"])
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "model.xml"
        import_openvino().save_model(graph, plain, compress_to_fp16=False)
        content, numbers = plain.read_bytes(), plain.with_suffix(".bin").read_bytes()
    path.with_suffix(".bin").write_bytes(numbers)
    path.write_bytes(_with_digest(content, numbers))
    return [path, path.with_suffix(".bin")]


def read_openvino(path: Path) -> tuple[Any, str]:
    """Read what ``write`` wrote: the graph and its description.

    Raises:
        UsageError: not such a file, or one of the two has changed or is missing.
    """
    beside = path.with_suffix(".bin")
    if not beside.is_file():
        raise UsageError(f"{beside} is missing, which holds the numbers of {path}; copy both files")
    content, numbers = path.read_bytes(), beside.read_bytes()
    if not _DIGEST.search(content) or _with_digest(content, numbers) != content:
        raise UsageError(
            f"{path} and {beside} are damaged, or not an OpenVINO model that useg export wrote; export or copy both again"
        )
    graph = import_openvino().Core().read_model(content, numbers)
    return graph, graph.get_rt_info(["useg", "card"]).astype(str)


def _with_digest(content: bytes, numbers: bytes) -> bytes:
    """Put into ``content`` the digest of both, taken with zeros in its own place."""
    digest = hashlib.sha256(
        _DIGEST.sub(rb"\g<1>" + b"0" * 64 + rb"\3", content) + numbers
    ).hexdigest()
    return _DIGEST.sub(rb"\g<1>" + digest.encode() + rb"\3", content)
