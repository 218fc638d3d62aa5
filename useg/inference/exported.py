"""Convert trained models to ONNX and OpenVINO, and compute, write and read these formats.

Both formats are ordinary model files with two additions: the model's description as JSON, and a
SHA-256 digest that shows damage.

- ONNX: both are entries of the metadata. A protocol buffer stays valid when fields are appended,
  so they are simply the last bytes of the file. The digest covers everything before it.
- OpenVINO: ``model.xml`` is the graph, ``model.bin`` its weights. Description and digest stand in
  the graph's ``rt_info``. The digest covers both files, with zeros in its own place.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
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
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d
from torch.nn.utils.fusion import fuse_conv_bn_eval

from useg.errors import MachineError, ModelError, need
from useg.inference.graph_checks import MAX_ONNX_BYTES, MAX_XML_BYTES, check_openvino_files
from useg.inference.tiles import LogitsFunction
from useg.machine import measure_seconds
from useg.models.description import unusable
from useg.models.encoders import EncoderUNet, ExpandingLevel
from useg.models.segmenter import Segmenter
from useg.ownership import is_own_openvino
from useg.parsing import read_limited, shorten

# Extras of useg that install the packages.
ONNX_EXTRA = "onnx"
OPENVINO_EXTRA = "openvino"

INPUT_NAME, OUTPUT_NAME = "pixels", "logits"

REGISTRATION_LOGGER = "torch.onnx._internal.exporter._registration"

_XML_DIGEST = re.compile(rb'(<sha256 value=")([0-9a-f]{64})(")')
_ZERO_DIGEST = "0" * 64


def to_onnx(model: Segmenter) -> bytes:
    """Convert a model to an ONNX file: raw pixels of the model's number type in, logits out.

    Batch, height and width are free, as far as the network allows.

    Raises:
        MissingPackageError: A package is missing.
    """
    need("onnx", ONNX_EXTRA)
    need("onnxscript", ONNX_EXTRA)
    smallest, stride = model.valid_size(1), model.stride
    # The example has two different sides and a batch above 1, so that no size looks constant.
    side = smallest + 2 * stride
    shape, pixels = (2, model.channels, side, side + stride), getattr(torch, model.pixels)
    x = torch.zeros(*shape, dtype=pixels, device=model.mean.device)
    rows, columns = (stride * torch.export.Dim(name) for name in ("rows", "columns"))
    if offset := smallest % stride:
        rows, columns = rows + offset, columns + offset
    with warnings.catch_warnings():
        # PyTorch's exporter warns of its own parts. On import it also logs a line for each
        # operator of torchvision, which is not needed here.
        warnings.simplefilter("ignore")
        logging.getLogger(REGISTRATION_LOGGER).addFilter(_is_not_about_torchvision)
        program = torch.export.export(
            _fold_normalization(model),
            (x,),
            dynamic_shapes=({0: torch.export.Dim("batch"), 2: rows, 3: columns},),
        )
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
    _remove_source_locations(proto.graph)
    _name_dimensions(proto.graph.input[0], ("batch", "height", "width"))
    _name_dimensions(proto.graph.output[0], ("batch", "out_height", "out_width"))
    content: bytes = proto.SerializeToString()
    return content


def _fold_normalization(model: Segmenter) -> Segmenter:
    """Return a copy whose convolutions include the batch normalisation after them.

    Its logits are the same but for rounding, and the exporter takes a fifth to a quarter less time.
    """
    folded = copy.deepcopy(model)
    for module in folded.modules():
        for (name, conv), (norm_name, norm) in itertools.pairwise([*module.named_children()]):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity().eval())
    return folded


def _is_not_about_torchvision(record: logging.LogRecord) -> bool:
    return "torchvision is not installed" not in record.getMessage()


def _remove_source_locations(graph: Any) -> None:
    """Remove the entries that say where in whose source code each part was made."""
    parts = (graph.node, graph.value_info, graph.input, graph.output, graph.initializer)
    for each in (each for part in parts for each in part):
        del each.metadata_props[:]


def _name_dimensions(value: Any, names: tuple[str, str, str]) -> None:
    for axis, name in zip((0, 2, 3), names, strict=True):
        value.type.tensor_type.shape.dim[axis].dim_param = name


def onnx_function(content: bytes, source: Path) -> LogitsFunction:
    """Compute an ONNX graph with as many threads as PyTorch uses.

    Raises:
        MissingPackageError: ONNX Runtime is not installed.
        ModelError: ONNX Runtime cannot compute the graph.
    """
    runtime = need("onnxruntime", ONNX_EXTRA)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Nothing is logged: errors are raised, too.
    options.log_severity_level = 4
    try:
        # A second try on the same processor would only print on standard output.
        session = runtime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's errors have no common class
        raise ModelError(
            f"ONNX Runtime cannot run {source} ({_one_line(error)}); export it again"
        ) from error

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        inputs = {INPUT_NAME: np.ascontiguousarray(x)}
        try:
            logits: NDArray[np.float32] = session.run([OUTPUT_NAME], inputs)[0]
        except Exception as error:
            raise ModelError(
                f"ONNX Runtime failed on {source} ({_one_line(error)}); "
                f"try the runtime torch or openvino"
            ) from error
        return logits

    return run


def write_onnx(path: Path, content: bytes, text: str) -> list[Path]:
    """Write an ONNX file with the description ``text``; returns the file in a list."""
    body = content + _metadata_entry("useg", text)
    path.write_bytes(body + _metadata_entry("sha256", hashlib.sha256(body).hexdigest()))
    return [path]


def read_onnx(path: Path) -> tuple[bytes, str]:
    """Read what :func:`write_onnx` wrote: the content of the file, and the description.

    Raises:
        ModelError: It is not such a file, or it has changed.
    """
    try:
        content = read_limited(path, MAX_ONNX_BYTES)
    except ValueError as error:
        raise unusable(path, str(error)) from error
    length = len(_metadata_entry("sha256", _ZERO_DIGEST))
    body, digest = content[:-length], content[-length:]
    if digest != _metadata_entry("sha256", hashlib.sha256(body).hexdigest()):
        raise ModelError(
            f"{path} is damaged, or not an ONNX file that useg export wrote; "
            f"export or copy it again"
        )
    entry = body[max(0, body.rfind(b"\n\x04useg\x12")) :]
    try:
        return content, entry[entry.index(b"{") :].decode()
    except ValueError as error:
        raise unusable(path, "it has no description") from error


def _metadata_entry(key: str, value: str) -> bytes:
    """Encode an entry of ``metadata_props``, field 14 of ONNX's ModelProto: key and value."""
    return _protobuf_field(
        14, _protobuf_field(1, key.encode()) + _protobuf_field(2, value.encode())
    )


def _protobuf_field(number: int, content: bytes) -> bytes:
    """Encode a length-delimited field of a protocol buffer; the length is a varint."""
    length, rest = b"", len(content)
    while rest > 127:
        length, rest = length + bytes([rest % 128 + 128]), rest // 128
    return bytes([number * 8 + 2]) + length + bytes([rest]) + content


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:200]


def import_openvino() -> ModuleType:
    """Import OpenVINO.

    Raises:
        MissingPackageError: It is not installed.
    """
    silence_telemetry()
    return need("openvino", OPENVINO_EXTRA)


def silence_telemetry() -> None:
    """Keep OpenVINO and NNCF from reporting every conversion to Google Analytics.

    Both work without their package ``openvino_telemetry``.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def to_openvino(model: Segmenter) -> Any:
    """Convert a model to an OpenVINO graph: raw pixels of its number type in, logits out.

    Batch, height and width are free, as far as the network allows.
    """
    openvino = import_openvino()
    model = _fold_normalization(model)
    if isinstance(model.network, EncoderUNet):
        transpose_levels(model.network)
    side = model.valid_size(1) + 2 * model.stride
    x = torch.zeros(2, model.channels, side, side + model.stride)
    with warnings.catch_warnings():
        # PyTorch warns of the check of the size, which is not part of the graph.
        warnings.simplefilter("ignore")
        # OpenVINO would trace twice and compare, to find random operations. That takes three times
        # as long, and networks have none when they predict.
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            model, x, strict=False, check_trace=False
        )
        graph = openvino.convert_model(traced, example_input=x)
    graph.reshape([-1, model.channels, -1, -1])
    processor = openvino.preprocess.PrePostProcessor(graph)
    processor.input().tensor().set_element_type(openvino.Type(np.dtype(model.pixels)))
    return _with_tensor_names(processor.build())


def transpose_levels(network: EncoderUNet) -> None:
    """Replace levels of an expanding path without batch normalisation by :class:`TransposedLevel`.

    The deepest level stays as it is. Its input may be negative, and OpenVINO would not compute its
    transposed convolution in 8 bits.
    """
    channels = 0
    for k, level in enumerate(network.merge):
        assert isinstance(level, ExpandingLevel)
        if k:
            network.merge[k] = TransposedLevel(level, channels)
        channels = level.get_parameter("0.weight").shape[0]


class TransposedLevel(nn.Module):
    """A level of an expanding path in a form that OpenVINO computes faster.

    The level convolves repeated pixels with 3x3 weights, so several weights multiply the same
    pixel. Their sums are the weights of a 4x4 transposed convolution, which takes each pixel once.
    It has 4 instead of 9 multiplications per result, and the repeated and concatenated features
    are not stored. The results are equal, except for rounding.

    Args:
        level: The level.
        channels: C, number of channels that come from the level below.
    """

    def __init__(self, level: ExpandingLevel, channels: int) -> None:
        super().__init__()
        weight = level.get_parameter("0.weight").detach()  #  (D, C + S, 3, 3)
        # (C, D, 4, 4)
        self.weight = torch.einsum("rh,cw,dkhw->kdrc", _SUMS, _SUMS, weight[:, :channels])
        self.skip_weight = weight[:, channels:]
        self.bias = level.get_parameter("0.bias")
        self.rest = nn.Sequential(*[*level][1:])

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Compute the same as :meth:`ExpandingLevel.forward`."""
        y = conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)
        if skip is not None:
            y = y + conv2d(skip, self.skip_weight, padding=1)
        out: Tensor = self.rest(y)  #                             (N, D, 2h, 2w)
        return out


# Which rows (or columns) of 3x3 weights add up to which rows of the 4x4 transposed weights.
_SUMS = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


def openvino_from_onnx(content: bytes) -> Any:
    """Convert an ONNX graph to an OpenVINO graph."""
    openvino = import_openvino()
    try:
        return _with_tensor_names(openvino.Core().read_model(content))
    except RuntimeError as error:
        raise ModelError(
            f"OpenVINO cannot read the ONNX model ({_one_line(error)}); choose the runtime onnx"
        ) from error


def _with_tensor_names(graph: Any) -> Any:
    graph.inputs[0].set_names({INPUT_NAME})
    graph.outputs[0].set_names({OUTPUT_NAME})
    return graph


@cache
def has_bf16() -> bool:
    """Whether this processor has instructions for bf16."""
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def openvino_function(graph: Any) -> LogitsFunction:
    """Compute a graph in fp32, and its quantised layers in int8."""
    return _compile_graph(graph, "f32")


def openvino_bf16_function(graph: Any) -> LogitsFunction:
    """Compute a graph in bf16, and its quantised layers in int8.

    Raises:
        MachineError: The processor has no instructions for bf16.
    """
    if not has_bf16():
        raise MachineError("this processor does not compute in bf16; choose the runtime openvino")
    return _compile_graph(graph, "bf16")


def _compile_graph(graph: Any, precision: str) -> LogitsFunction:
    """Compile a graph for any input size.

    All threads together compute a single image. For a batch there are two ways: the same, or one
    thread per image with as many images at a time as there are threads. A trial on the first batch
    decides. If PyTorch's number of threads has been set to one since, the caller is one of several
    threads, each with an image and a core of its own. The size of the first one gets a graph of its
    own, which computes the same numbers up to 4 % faster; all other sizes share one.
    """
    core, threads = import_openvino().Core(), torch.get_num_threads()
    # OpenVINO's binding initialises numpy when the data of a tensor is first read. Two threads
    # that did so at once would deadlock, so it is done here.
    _ = import_openvino().Tensor(np.zeros(1, np.float32)).data

    def compiled(streams: int, shape: tuple[int, ...] | None = None) -> Any:
        of_shape = graph
        if shape:
            of_shape = graph.clone()
            of_shape.reshape(shape)
        options = {
            # OpenVINO would choose bf16 by itself.
            "INFERENCE_PRECISION_HINT": precision,
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": threads,
        }
        try:
            return core.compile_model(of_shape, "CPU", options)
        except RuntimeError as error:
            raise ModelError(
                f"OpenVINO cannot run the model ({_one_line(error)}); export it again"
            ) from error

    all_threads = _one_request_per_thread(compiled(1))
    if threads == 1:
        return all_threads
    batch_function: list[LogitsFunction] = []
    first_shape: list[tuple[int, ...]] = []
    compile_lock = threading.Lock()

    @cache
    def on_one_thread(shape: tuple[int, ...] | None) -> LogitsFunction:
        return _one_request_per_thread(compiled(threads, shape))

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        if torch.get_num_threads() == 1:
            with compile_lock:
                if not first_shape:
                    first_shape.append(x.shape)
                network = on_one_thread(x.shape if x.shape == first_shape[0] else None)
            return network(x)
        if len(x) == 1:
            return all_threads(x)
        if not batch_function:
            candidates = (all_threads, _one_image_per_request(compiled(threads), threads))
            batch_function.append(min(candidates, key=lambda network: measure_seconds(network, x)))
        return batch_function[0](x)

    return run


def _one_request_per_thread(compiled: Any) -> LogitsFunction:
    # An inference request serves one thread at a time.
    requests: dict[int, Any] = {}
    output, Tensor = compiled.output(0), import_openvino().Tensor
    shape = tuple(output.shape) if output.partial_shape.is_static else None

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        thread = threading.get_ident()
        request = requests.get(thread)
        if request is None:
            request = requests.setdefault(thread, compiled.create_infer_request())
        inputs = [np.ascontiguousarray(x)]
        if shape is None:
            copied: NDArray[np.float32] = request.infer(inputs)[0]
            return copied
        # OpenVINO writes into a new array, so nothing is copied and no result is overwritten.
        logits = np.empty(shape, np.float32)
        request.set_output_tensor(Tensor(logits, shared_memory=True))
        request.infer(inputs, share_outputs=True)
        return logits

    return run


def _one_image_per_request(compiled: Any, num_requests: int) -> LogitsFunction:
    queue = import_openvino().AsyncInferQueue(compiled, num_requests)
    # The queue has one callback, and waits for all of its requests.
    lock = threading.Lock()

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        logits: dict[int, NDArray[np.float32]] = {}
        with lock:
            queue.set_callback(
                lambda request, k: logits.update({k: request.get_output_tensor().data.copy()})
            )
            for k in range(len(x)):
                queue.start_async([np.ascontiguousarray(x[k : k + 1])], k)
            queue.wait_all()
        return np.concatenate([logits[k] for k in range(len(x))])

    return run


def write_openvino(path: Path, graph: Any, text: str) -> list[Path]:
    """Write a graph with the description ``text``; returns the ``.xml`` and the ``.bin``."""
    graph.set_rt_info(text, ["useg", "card"])
    graph.set_rt_info(_ZERO_DIGEST, ["useg", "sha256"])
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "model.xml"
        import_openvino().save_model(graph, plain, compress_to_fp16=False)
        content, weights = plain.read_bytes(), plain.with_suffix(".bin").read_bytes()
    path.with_suffix(".bin").write_bytes(weights)
    path.write_bytes(_with_digest(content, weights))
    return [path, path.with_suffix(".bin")]


def read_openvino(path: Path) -> tuple[Any, str]:
    """Read what :func:`write_openvino` wrote: the graph and the description.

    Raises:
        ModelError: It is not such a file, or one of the two has changed or is missing.
    """
    weights_path = path.with_suffix(".bin")
    if not weights_path.is_file():
        raise ModelError(
            f"{path} needs its weights, {weights_path}, which are missing; copy both files"
        )
    try:
        content = read_limited(path, MAX_XML_BYTES)
    except ValueError as error:
        raise unusable(path, str(error)) from error
    weights = weights_path.read_bytes()
    if not _XML_DIGEST.search(content) or _with_digest(content, weights) != content:
        raise ModelError(
            f"{path} and {weights_path} are damaged, or not an OpenVINO model that useg export "
            f"wrote; export or copy both again"
        )
    check_openvino_files(content, weights, path)
    try:
        graph = import_openvino().Core().read_model(content, weights)
        return graph, graph.get_rt_info(["useg", "card"]).astype(str)
    except RuntimeError as error:
        raise unusable(path, f"OpenVINO reports: {shorten(_one_line(error))}") from error


def is_own_weights(path: Path) -> bool:
    """Recognise the ``.bin`` of an exported OpenVINO model by the digest in its ``.xml``."""
    graph_path = path.with_suffix(".xml")
    if path.is_symlink() or not path.is_file() or not is_own_openvino(graph_path):
        return False
    content = graph_path.read_bytes()
    return _with_digest(content, path.read_bytes()) == content


def _with_digest(content: bytes, weights: bytes) -> bytes:
    """Put the digest of both files into ``content``, computed with zeros in its own place."""
    zeroed = _XML_DIGEST.sub(rb"\g<1>" + _ZERO_DIGEST.encode() + rb"\3", content)
    digest = hashlib.sha256(zeroed + weights).hexdigest()
    return _XML_DIGEST.sub(rb"\g<1>" + digest.encode() + rb"\3", content)
