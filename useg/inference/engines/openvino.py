"""A trained model -> OpenVINO's two files -> a function on numpy arrays, computed by OpenVINO.

``model.xml`` is the graph, ``model.bin`` its numbers. The card and a SHA-256 of both files stand among the graph's ``rt_info``; the digest
is taken with zeros in its own place.
"""

from __future__ import annotations

import hashlib
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
from useg.inference.probe import seconds_of
from useg.inference.tiles import Network
from useg.models.segmenter import Segmenter

EXTRA = "openvino"
_DIGEST = re.compile(rb'(<sha256 value=")([0-9a-f]{64})(")')


def package() -> ModuleType:
    """Import OpenVINO.

    Raises:
        UsageError: it is not installed.
    """
    silence()
    return need("openvino", EXTRA)


def silence() -> None:
    """Keep OpenVINO and NNCF from telling Google Analytics of every conversion: they do without this package of theirs."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def convert(model: Segmenter) -> Any:
    """Turn a model into an OpenVINO graph: raw pixels of the model's number type in, logits out, any batch, height and width that it takes."""
    openvino = package()
    side = model.valid_size(1) + 2 * model.stride
    x = torch.zeros(2, model.channels, side, side + model.stride)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the check of the size, which is not part of the graph
        graph = openvino.convert_model(model, example_input=x)
    graph.reshape([-1, model.channels, -1, -1])
    pixels = openvino.preprocess.PrePostProcessor(graph)
    pixels.input().tensor().set_element_type(openvino.Type(np.dtype(model.pixels)))
    return _named(pixels.build())


def _named(graph: Any) -> Any:
    graph.inputs[0].set_names({"pixels"})
    graph.outputs[0].set_names({"logits"})
    return graph


def from_onnx(content: bytes) -> Any:
    """Read an ONNX graph."""
    return _named(package().Core().read_model(content))


@cache
def has_bf16() -> bool:
    """Whether this processor computes in bf16 itself."""
    return "BF16" in package().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def network(graph: Any) -> Network:
    """Compute a graph in fp32 (and int8, where it says so)."""
    return _network(graph, "f32")


def network_bf16(graph: Any) -> Network:
    """Compute a graph in bf16 (and int8, where it says so).

    Raises:
        UsageError: the processor cannot.
    """
    if not has_bf16():
        raise UsageError("this processor does not compute in bf16; choose --runtime openvino")
    return _network(graph, "bf16")


def _network(graph: Any, precision: str) -> Network:
    """Compile for any size: on the measured networks at most 2 % slower than for one size, and no size is ever compiled anew.

    One picture is computed by all threads together. A batch is either, too, or is spread: as many pictures at a time as there are threads,
    one thread each. A trial on the first batch decides. Where torch's number of threads has been set to one since, the caller is one of several
    threads with a picture and a core each.
    """
    core, threads = package().Core(), torch.get_num_threads()
    # OpenVINO's binding meets numpy when a tensor's data is first asked for: two threads that did so at once would wait for each other for ever.
    _ = package().Tensor(np.zeros(1, np.float32)).data

    def compiled(streams: int) -> Any:  # left alone, OpenVINO would choose bf16
        return core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": threads})

    together = _together(compiled(1))
    if threads == 1:
        return together
    chosen: list[Network] = []
    apart: list[Network] = []
    compiling = threading.Lock()

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        if torch.get_num_threads() == 1:
            with compiling:
                if not apart:
                    apart.append(_together(compiled(threads)))
            return apart[0](x)
        if len(x) == 1:
            return together(x)
        if not chosen:
            chosen.append(min((together, _spread(compiled(threads), threads)), key=lambda network: seconds_of(network, x)))
        return chosen[0](x)

    return run


def _together(compiled: Any) -> Network:
    requests: dict[int, Any] = {}  # one serves one thread at a time

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        thread = threading.get_ident()
        request = requests.get(thread) or requests.setdefault(thread, compiled.create_infer_request())
        logits: NDArray[np.float32] = request.infer([np.ascontiguousarray(x)])[0]
        return logits

    return run


def _spread(compiled: Any, requests: int) -> Network:
    queue = package().AsyncInferQueue(compiled, requests)

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        answers: dict[int, NDArray[np.float32]] = {}
        queue.set_callback(lambda request, k: answers.update({k: request.get_output_tensor().data.copy()}))
        for k in range(len(x)):
            queue.start_async([np.ascontiguousarray(x[k : k + 1])], k)
        queue.wait_all()
        return np.concatenate([answers[k] for k in range(len(x))])

    return run


def write(path: Path, graph: Any, text: str) -> list[Path]:
    """Write a graph and its card; returns the two files."""
    graph.set_rt_info(text, ["useg", "card"])
    graph.set_rt_info("0" * 64, ["useg", "sha256"])
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "model.xml"
        package().save_model(graph, plain, compress_to_fp16=False)
        content, numbers = plain.read_bytes(), plain.with_suffix(".bin").read_bytes()
    path.with_suffix(".bin").write_bytes(numbers)
    path.write_bytes(_sealed(content, numbers))
    return [path, path.with_suffix(".bin")]


def read(path: Path) -> tuple[Any, str]:
    """Read what ``write`` wrote: the graph and its card.

    Raises:
        UsageError: not such a file, or one of the two has changed or is missing.
    """
    beside = path.with_suffix(".bin")
    if not beside.is_file():
        raise UsageError(f"{beside} is missing, which holds the numbers of {path}; copy both files")
    content, numbers = path.read_bytes(), beside.read_bytes()
    if not _DIGEST.search(content) or _sealed(content, numbers) != content:
        raise UsageError(f"{path} and {beside} are damaged, or not an OpenVINO model that useg export wrote; export or copy both again")
    graph = package().Core().read_model(content, numbers)
    return graph, graph.get_rt_info(["useg", "card"]).astype(str)


def _sealed(content: bytes, numbers: bytes) -> bytes:
    """Put into ``content`` the digest of both, taken with zeros in its own place."""
    digest = hashlib.sha256(_DIGEST.sub(rb"\g<1>" + b"0" * 64 + rb"\3", content) + numbers).hexdigest()
    return _DIGEST.sub(rb"\g<1>" + digest.encode() + rb"\3", content)
