"""Check an untrusted ONNX or OpenVINO graph before a runtime computes it.

A graph is a program: it can loop, read other files, and ask for any amount of memory. So only the
operations of useg's own exports are allowed, all weights must lie in the file itself and be finite,
and the shapes of all results are computed for two sizes of the image, without the results. They
must give the logits that the file describes, and tell how much memory an image needs.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from useg.errors import ModelError, need
from useg.models.description import ModelDescription, unusable
from useg.parsing import shorten

# Operations of useg's exports, also of those that NNCF has quantised, and close relatives. None of
# them runs other graphs, repeats itself, reads a file or makes random numbers.
ONNX_OPERATIONS = {
    "Add",
    "BatchNormalization",
    "Cast",
    "Clip",
    "Concat",
    "Constant",
    "Conv",
    "ConvTranspose",
    "DequantizeLinear",
    "Div",
    "Expand",
    "Gather",
    "Identity",
    "MaxPool",
    "Mul",
    "Pad",
    "QuantizeLinear",
    "Relu",
    "Reshape",
    "Resize",
    "Shape",
    "Slice",
    "Squeeze",
    "Sub",
    "Unsqueeze",
}
OPENVINO_OPERATIONS = {
    "Add",
    "Broadcast",
    "Clamp",
    "Concat",
    "Const",
    "Convert",
    "Convolution",
    "ConvolutionBackpropData",
    "Divide",
    "FakeQuantize",
    "Gather",
    "GroupConvolution",
    "GroupConvolutionBackpropData",
    "Interpolate",
    "MaxPool",
    "Maximum",
    "Minimum",
    "Multiply",
    "Pad",
    "Parameter",
    "ReLU",
    "Reshape",
    "Result",
    "ShapeOf",
    "Slice",
    "StridedSlice",
    "Subtract",
    "Unsqueeze",
    "VariadicSplit",
}
OPENVINO_NUMBER_BYTES = {"f32": 4, "f16": 2, "i64": 8, "i32": 4, "i8": 1, "u8": 1}
# The largest network of useg has 900 operations.
MAX_OPERATIONS = 5000
# Weights of a convolution have 4, and 5 if it has groups.
MAX_AXES = 8
# The .xml has no weights. The largest network of useg, quantised, has 480 kB and 35,000 of the
# characters < and =, of which each element and attribute has one or two. Each takes 100 times its
# length in memory.
MAX_XML_BYTES, MAX_XML_MARKS = 2 << 20, 70_000
# A message of protobuf, which an ONNX file is, cannot be larger.
MAX_ONNX_BYTES = (1 << 31) - 1
# Fields of an ONNX file. An empty one has 2 bytes and takes up to 350 in memory. A number in a list
# may have 1 byte and take 8, so it is counted, too. The largest network of useg has 7,000 fields.
MAX_ONNX_FIELDS = 300_000
# Sides of the images for which shapes are computed. A larger image may need this many times as much
# memory per pixel as a small one, because of rounding at its edges.
SIDES = (96, 512)
MAX_GROWTH = 2
# Memory that the smaller of the images, and all constants in addition to the file, may take.
MAX_SMALL_IMAGE_BYTES = 1 << 30
MAX_CONSTANT_FACTOR, MIN_CONSTANT_BYTES = 16, 1 << 20
# Tensors with more numbers are weights, whose values decide no shape.
MAX_SHAPE_NUMBERS = 64


@dataclass(frozen=True)
class Step:
    """An operation of a graph: the names of what it takes, and name and bytes of its results."""

    inputs: tuple[str, ...]
    outputs: Mapping[str, int]


def parse_onnx(content: bytes, source: object) -> Any:
    """Parse an ONNX file, and refuse what no export of useg has.

    Raises:
        ModelError: it is damaged, refers to other files, or has operations or weights that are not
            allowed.
        MissingPackageError: the package ``onnx`` is not installed.
    """
    onnx = need("onnx", "onnx")
    model = onnx.ModelProto()
    try:
        _check_onnx_fields(content, model.DESCRIPTOR, source)
        model.ParseFromString(content)
    except ModelError:
        raise
    # protobuf's own class of errors.
    except Exception as error:
        raise unusable(source, "it is not a valid ONNX file") from error
    graph = model.graph
    if model.functions or model.training_info or graph.sparse_initializer:
        raise unusable(source, "it has local functions, training steps or sparse weights")
    if len(graph.node) > MAX_OPERATIONS:
        raise unusable(source, f"it has {len(graph.node):,} operations")
    for end, name, values in (
        ("input", "pixels", graph.input),
        ("output", "logits", graph.output),
    ):
        if [value.name for value in values] != [name]:
            raise unusable(source, f"it needs one {end}, called {name}, and no other")
    tensors = list(graph.initializer)
    for node in graph.node:
        if node.op_type not in ONNX_OPERATIONS or node.domain not in ("", "ai.onnx"):
            kind = shorten(f"{node.domain}.{node.op_type}".lstrip("."))
            raise unusable(source, f"it has the operation {kind}, which useg never exports")
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs or attribute.HasField("sparse_tensor"):
                raise unusable(source, "one of its operations has a subgraph")
            tensors += [attribute.t] if attribute.HasField("t") else list(attribute.tensors)
    for tensor in tensors:
        _check_onnx_tensor(onnx, tensor, source)
    return model


def _check_onnx_fields(content: bytes, message: Any, source: object) -> None:
    """Refuse a file of very many fields before protobuf makes objects of them.

    Raises:
        ModelError: it has more than an export of useg.
        IndexError: it ends in the middle of a field.
    """
    kinds = {message.full_name: _kinds_of_fields(message)}
    count, parts = 0, [(0, len(content), message)]
    while parts:
        place, end, message = parts.pop()
        if message.full_name not in kinds:
            kinds[message.full_name] = _kinds_of_fields(message)
        known = kinds[message.full_name]
        while place < end:
            key, place = _read_varint(content, place)
            count, (inner, is_packed) = count + 1, known.get(key >> 3, (None, False))
            match key & 7:
                case 0:
                    _, place = _read_varint(content, place)
                case 1:
                    place += 8
                case 5:
                    place += 4
                case 2:
                    size, place = _read_varint(content, place)
                    count += size if is_packed else 0
                    if inner is not None:
                        parts.append((place, place + size, inner))
                    place += size
                case _:
                    raise unusable(source, "it is not a valid ONNX file")
            if count > MAX_ONNX_FIELDS:
                raise unusable(source, f"it has more than {MAX_ONNX_FIELDS:,} fields")
        if place > end:
            raise unusable(source, "it is not a valid ONNX file")


def _kinds_of_fields(message: Any) -> dict[int, tuple[Any, bool]]:
    """Return for each field its message, or None, and whether it may be a list of integers."""
    return {
        field.number: (
            field.message_type,
            field.type
            not in (
                *(field.TYPE_MESSAGE, field.TYPE_STRING, field.TYPE_BYTES),
                *(field.TYPE_FLOAT, field.TYPE_DOUBLE),
            ),
        )
        for field in message.fields
    }


def _read_varint(content: bytes, place: int) -> tuple[int, int]:
    """Return a number of variable length, and where it ends."""
    number = shift = 0
    while (byte := content[place]) > 127:
        number |= (byte & 127) << shift
        place, shift = place + 1, min(shift + 7, 70)
    return number | byte << shift, place + 1


def _check_onnx_tensor(onnx: Any, tensor: Any, source: object) -> None:
    if tensor.data_location != onnx.TensorProto.DEFAULT or tensor.external_data:
        raise unusable(source, f"its weights {shorten(tensor.name)} are in another file")
    try:
        values = onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise unusable(
            source, f"its weights {shorten(tensor.name)} do not have their declared size"
        ) from error
    _check_finite(values, tensor.name, source)


def _check_finite(values: NDArray[Any], name: str, source: object) -> None:
    if values.dtype.kind not in "biuf":
        raise unusable(source, f"its weights {shorten(name)} are not plain numbers")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise unusable(source, f"its weights {shorten(name)} are not finite")


def check_onnx(content: bytes, description: ModelDescription, source: object) -> int:
    """Check an ONNX file; return the bytes of memory that a pixel of an image needs at the peak.

    Raises:
        ModelError: as for :func:`parse_onnx`; or the graph does not give the logits that are
            described, or needs too much memory.
        MissingPackageError: the package ``onnx`` is not installed.
    """
    model = parse_onnx(content, source)
    onnx = need("onnx", "onnx")
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(description.pixels))
    if model.graph.input[0].type.tensor_type.elem_type != kind:
        raise unusable(source, f"its graph does not take {description.pixels} pixels")
    known = {tensor.name for tensor in model.graph.initializer}
    for tensor in model.graph.initializer:
        # The shape of weights is enough, and inference copies the file.
        if math.prod(tensor.dims) > MAX_SHAPE_NUMBERS:
            tensor.ClearField("raw_data")
    needs = []
    for side in _sides(description):
        sizes = _onnx_sizes(onnx, model, (1, description.channels, side, side), source)
        _check_logits(sizes.get("logits", ((), 0))[0], side, description, source)
        steps = []
        for node in model.graph.node:
            outputs = [name for name in node.output if name]
            if missing := [name for name in outputs if name not in sizes]:
                raise unusable(source, f"the size of {shorten(missing[0])} cannot be inferred")
            results = {name: math.prod(sizes[name][0]) * sizes[name][1] for name in outputs}
            steps.append(Step(tuple(name for name in node.input if name not in known), results))
        needs.append(_check_memory(steps, "pixels", len(content), source) / side**2)
    return _check_growth(needs, source)


def _onnx_sizes(
    onnx: Any, model: Any, shape: Sequence[int], source: object
) -> dict[str, tuple[tuple[int, ...], int]]:
    """Return the shape of every result, and the bytes of a number, for an input shape."""
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    del sized.graph.value_info[:]
    sized.graph.output[0].type.tensor_type.ClearField("shape")
    declared = sized.graph.input[0].type.tensor_type.shape
    if len(declared.dim) != len(shape):
        raise unusable(source, "its input does not have the shape (N, C, H, W)")
    for dimension, side in zip(declared.dim, shape, strict=True):
        dimension.dim_value = side
    try:
        inferred = onnx.shape_inference.infer_shapes(sized, strict_mode=True, data_prop=True)
    # The checker's errors have no common class.
    except Exception as error:
        raise unusable(source, "the shapes of its operations are inconsistent") from error
    sizes = {}
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        kind = value.type.tensor_type
        dimensions = kind.shape.dim
        if kind.HasField("shape") and all(side.HasField("dim_value") for side in dimensions):
            width = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
            sizes[value.name] = tuple(side.dim_value for side in dimensions), width
    return sizes


def check_openvino_files(content: bytes, weights: bytes, source: object) -> None:
    """Check the ``.xml`` and ``.bin`` of an OpenVINO model before OpenVINO reads them.

    Raises:
        ModelError: the file is not plain XML, has operations that are not allowed, or weights that
            are not in the ``.bin``.
    """
    if len(content) > MAX_XML_BYTES:
        raise unusable(source, f"it has {len(content):,} bytes without weights")
    if content.count(b"<") + content.count(b"=") > MAX_XML_MARKS:
        raise unusable(source, "it has more elements and attributes than useg ever exports")
    if b"<!" in content or b"\0" in content:
        raise unusable(source, "it has a document type declaration, which could define entities")
    layers = 0
    try:
        for _, element in ElementTree.iterparse(io.BytesIO(content)):
            if element.tag == "dim" and not -1 <= int(element.text or "") < 1 << 31:
                raise unusable(source, f"a dimension is {shorten(element.text)}")
            if element.tag == "layer":
                layers += 1
                _check_openvino_layer(element, weights, source)
                element.clear()
    except (ElementTree.ParseError, ValueError, KeyError, RecursionError) as error:
        raise unusable(source, f"it is not valid ({shorten(str(error))})") from error
    if not 0 < layers <= MAX_OPERATIONS:
        raise unusable(source, f"it has {layers:,} operations")


def _check_openvino_layer(layer: Any, weights: bytes, source: object) -> None:
    kind = layer.get("type")
    if kind not in OPENVINO_OPERATIONS:
        raise unusable(source, f"it has the operation {shorten(kind)}, which useg never exports")
    if kind != "Const":
        return
    values = layer.find("data").attrib if layer.find("data") is not None else {}
    # The product of millions of sides takes hours.
    if values["shape"].count(",") >= MAX_AXES:
        raise unusable(source, f"its weights have more than {MAX_AXES} axes")
    shape = [int(side) for side in values["shape"].split(",") if side.strip()]
    offset, size = int(values["offset"]), int(values["size"])
    width = OPENVINO_NUMBER_BYTES[values["element_type"]]
    if min([offset, *shape]) < 0 or size != width * math.prod(shape):
        raise unusable(source, "its weights do not have their declared size")
    if offset + size > len(weights):
        raise unusable(source, "its weights are not in its .bin")


def check_openvino(
    graph: Any, num_bytes: int, description: ModelDescription, source: object
) -> int:
    """Check an OpenVINO graph of ``num_bytes``; return the peak bytes per pixel of an image.

    Raises:
        ModelError: the graph does not give the logits that are described, has weights that are not
            finite, or needs too much memory.
    """
    for operation in graph.get_ops():
        if operation.get_type_name() == "Constant":
            _check_finite(operation.data, operation.get_friendly_name(), source)
    inputs, outputs = graph.inputs, graph.outputs
    if len(inputs) != 1 or len(outputs) != 1:
        raise unusable(source, "it has more than one input or output")
    if inputs[0].get_element_type().to_dtype() != np.dtype(description.pixels):
        raise unusable(source, f"its graph does not take {description.pixels} pixels")
    needs = []
    for side in _sides(description):
        sized = graph.clone()
        try:
            sized.reshape([1, description.channels, side, side])
        except RuntimeError as error:
            raise unusable(source, "the shapes of its operations are inconsistent") from error
        steps = []
        for operation in sized.get_ordered_ops():
            if any(output.get_partial_shape().is_dynamic for output in operation.outputs()):
                raise unusable(source, "the size of a result cannot be inferred")
            taken = tuple(_name(value.get_source_output()) for value in operation.inputs())
            if operation.get_type_name() not in ("Constant", "Parameter", "Result"):
                results = {
                    _name(output): math.prod(output.get_shape()) * output.get_element_type().size
                    for output in operation.outputs()
                }
                steps.append(Step(taken, results))
        _check_logits(tuple(sized.outputs[0].get_shape()), side, description, source)
        pixels = _name(sized.inputs[0])
        needs.append(_check_memory(steps, pixels, num_bytes, source) / side**2)
    return _check_growth(needs, source)


def _name(output: Any) -> str:
    return f"{output.get_node().get_name()}:{output.get_index()}"


def _sides(description: ModelDescription) -> Iterable[int]:
    return [description.valid_size(side + 2 * description.margin) for side in SIDES]


def _check_logits(
    shape: tuple[int, ...], side: int, description: ModelDescription, source: object
) -> None:
    height = side - 2 * description.margin
    expected = 1, description.num_outputs, height, height
    if shape != expected:
        raise unusable(
            source, f"its logits have the shape {shape}, but its description says {expected}"
        )


def _check_memory(steps: Sequence[Step], image: str, num_bytes: int, source: object) -> int:
    """Return the most bytes that results which depend on the image take at the same time.

    Raises:
        ModelError: the other results, which are constant, take much more than the file.
    """
    last_use = {name: k for k, step in enumerate(steps) for name in step.inputs}
    from_image = {image}
    freed_after = [0] * len(steps)
    live = peak = constant = 0
    for k, step in enumerate(steps):
        if from_image.isdisjoint(step.inputs):
            constant += sum(step.outputs.values())
            continue
        from_image |= step.outputs.keys()
        for name, size in step.outputs.items():
            live += size
            freed_after[max(k, last_use.get(name, k))] += size
        peak = max(peak, live)
        live -= freed_after[k]
    if constant > MAX_CONSTANT_FACTOR * num_bytes + MIN_CONSTANT_BYTES:
        raise unusable(source, f"its constants need {constant:,} bytes of memory")
    return peak


def _check_growth(needs: Sequence[float], source: object) -> int:
    small, large = needs
    if small * SIDES[0] ** 2 > MAX_SMALL_IMAGE_BYTES or large > MAX_GROWTH * small:
        raise unusable(source, f"it needs {large:,.0f} bytes of memory for each pixel")
    return math.ceil(max(needs))
