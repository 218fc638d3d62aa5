"""A converted model and a data set -> the model in 8 bits, and the accuracy that this costs.

Quantising every layer is fastest, and can cost points of mean IoU. NNCF then reverts the layers
that cost most, one by one, until the loss on the held-out images is small enough.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.data.dataset import Dataset, Pair, read_sample
from useg.errors import DataError, ModelError, need
from useg.inference import exported
from useg.inference.predictor import Predictor
from useg.inference.runtimes import Runtime
from useg.inference.tiles import LogitsFunction
from useg.models.description import ModelDescription
from useg.scoring.metrics import confusion, score

# Largest loss of mean IoU on the held-out images, 0 to 1.
MAX_QUANTIZATION_LOSS = 0.01

# Largest share of the layers in higher precision; with more, the model would hardly be faster.
MAX_REVERTED_SHARE = 0.5

# Windows of training images on which the ranges of activations are measured.
MAX_CALIBRATION_WINDOWS = 100
MAX_CALIBRATION_WINDOWS_PER_IMAGE = 4

# Held-out images on which layers are ranked by the accuracy that they cost.
MAX_RANKING_IMAGES = 8


@dataclass(frozen=True)
class QuantizationResult:
    """What quantisation did.

    Args:
        before: mean IoU on the held-out images, 0 to 1, computed by PyTorch in fp32.
        after: the same of the quantised model, computed by the runtime that its file is for.
        num_images: held-out images.
        num_layers: convolutions.
        kept: convolutions that stay in higher precision, by their names in the exported graph.
        everything: mean IoU with every layer in 8 bits.
    """

    before: float
    after: float
    num_images: int
    num_layers: int
    kept: tuple[str, ...]
    everything: float

    def lines(self) -> list[str]:
        """Return the result as lines of text."""
        accuracy = (
            f"mean IoU on {self.num_images} held-out images: {100 * self.before:.1f} % before, "
            f"{100 * self.after:.1f} % after"
        )
        if not self.kept:
            return [accuracy, f"all {self.num_layers} layers are in 8 bits"]
        return [
            f"{accuracy} ({100 * self.everything:.1f} % with every layer in 8 bits)",
            f"{len(self.kept)} of {self.num_layers} layers stay in higher precision: "
            f"{', '.join(self.kept)}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return the result ready for JSON."""
        return asdict(self)


def quantize(
    graph: Any,
    suffix: str,
    reference: Runtime,
    dataset: Dataset,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Any, QuantizationResult]:
    """Quantise a converted model to 8 bits, except for layers that cost too much accuracy.

    Args:
        graph: the model in fp32, an ONNX file's content or an OpenVINO graph.
        suffix: ``".onnx"`` or ``".xml"``, which of the two.
        reference: the model computed by PyTorch.
        dataset: pairs with their splits assigned, and the model's classes; calibrates on its
            training images and judges on its held-out ones.
        say: called with each progress message.

    Returns:
        The quantised graph, and what was done.

    Raises:
        DataError: the data set has no training or no held-out images, or other classes.
        ModelError: the loss is too large.
        MissingPackageError: NNCF is not installed.
    """
    _check_quantization_data(dataset, reference.description)
    quantizer, num_images = QUANTIZERS[suffix], len(dataset.of("val"))
    before = held_out_mean_iou(reference, dataset)
    # NNCF's calls: one to learn what `validate` returns, fp32, every layer in 8 bits, others.
    scores: list[float] = []

    def validate(model: Any, pairs: Iterable[Pair]) -> tuple[float, list[float]]:
        runtime = replace(reference, run=quantizer.start_validated(model))
        mean_iou, of_images = _mean_iou(runtime, dataset, pairs)
        scores.append(mean_iou)
        if len(scores) == 3:
            say(f"mean IoU {100 * mean_iou:.1f} % with every layer in 8 bits")
        return mean_iou, of_images

    windows = [quantizer.to_item(x) for x in calibration_windows(reference, dataset)]
    model = _quantize_with_nncf(quantizer, quantizer.load(graph), windows, dataset, validate)
    quantized = quantizer.save(model)
    run = quantizer.start(quantized, reference.source)
    after = held_out_mean_iou(replace(reference, run=run), dataset)
    layers = quantizer.layers(model)
    kept = tuple(name for name, is_quantized in layers.items() if not is_quantized)
    if before - after > MAX_QUANTIZATION_LOSS:
        raise ModelError(
            f"in 8 bits the model loses {100 * (before - after):.1f} points of mean IoU (from "
            f"{100 * before:.1f} %), even with {len(kept)} of {len(layers)} layers in higher "
            f"precision, but at most {100 * MAX_QUANTIZATION_LOSS:g} is allowed; nothing was "
            "written: calibrate with more or other images, or export in 32 bits"
        )
    everything = scores[2] if kept else after
    return quantized, QuantizationResult(before, after, num_images, len(layers), kept, everything)


def _check_quantization_data(dataset: Dataset, description: ModelDescription) -> None:
    if dataset.classes.names != description.classes.names:
        raise DataError(
            f"{dataset.root} does not have the classes of the model "
            f"({', '.join(description.classes.names)}); give a data set that has them"
        )
    if not (dataset.of("train") and dataset.of("val")):
        raise DataError(
            f"{dataset.root} has no training or no held-out images, but quantisation needs both; "
            "choose a split with data.split"
        )


def calibration_windows(runtime: Runtime, dataset: Dataset) -> list[NDArray[np.generic]]:
    """Return windows that the network gets when training images are predicted, evenly chosen."""
    description = runtime.description
    windows: list[NDArray[np.generic]] = []
    of_image: list[NDArray[np.generic]] = []

    def record(x: NDArray[np.generic]) -> NDArray[np.float32]:
        of_image.append(x)
        N, _, H, W = x.shape
        K, margin = len(description.classes), description.margin
        return np.zeros((N, K, H - 2 * margin, W - 2 * margin), np.float32)

    predictor = Predictor(replace(runtime, run=record))
    for pair in _evenly_chosen(dataset.of("train"), MAX_CALIBRATION_WINDOWS):
        of_image.clear()
        predictor(read_sample(pair, dataset).image)
        windows += _evenly_chosen(of_image, MAX_CALIBRATION_WINDOWS_PER_IMAGE)
    return _evenly_chosen(windows, MAX_CALIBRATION_WINDOWS)


def _evenly_chosen(items: Sequence[Any], limit: int) -> list[Any]:
    count = min(limit, len(items))
    return [items[k * len(items) // count] for k in range(count)]


def held_out_mean_iou(runtime: Runtime, dataset: Dataset) -> float:
    """Return the mean IoU on the held-out images at their native size."""
    return _mean_iou(runtime, dataset, dataset.of("val"))[0]


def _mean_iou(
    runtime: Runtime, dataset: Dataset, pairs: Iterable[Pair]
) -> tuple[float, list[float]]:
    """Return the mean IoU on all images together, and on each."""
    predictor, names = Predictor(runtime), runtime.description.classes.names
    counts = []
    for pair in pairs:
        sample = read_sample(pair, dataset)
        counts.append(confusion(predictor(sample.image), sample.label, len(names)))
    total: NDArray[np.int64] = np.sum(counts, axis=0)
    of_images = [score(each, names, 1).mean_iou for each in counts]
    return score(total, names, len(counts)).mean_iou, of_images


@dataclass(frozen=True)
class Quantizer:
    """How NNCF gets a graph and returns it.

    Args:
        load: graph -> NNCF's input.
        save: NNCF's output -> graph.
        to_item: window -> item of NNCF's calibration data.
        start: graph and its source -> function of the quantised model.
        start_validated: what NNCF validates -> function.
        layers: NNCF's output -> name of each convolution, and whether it is quantised.
    """

    load: Callable[[Any], Any]
    save: Callable[[Any], Any]
    to_item: Callable[[NDArray[np.generic]], Any]
    start: Callable[[Any, Path], LogitsFunction]
    start_validated: Callable[[Any], LogitsFunction]
    layers: Callable[[Any], dict[str, bool]]


def _quantize_with_nncf(
    quantizer: Quantizer,
    model: Any,
    windows: Sequence[Any],
    dataset: Dataset,
    validate: Callable[[Any, Iterable[Pair]], tuple[float, list[float]]],
) -> Any:
    """Quantise, then revert layers; NNCF's messages and warnings are suppressed."""
    exported.silence_telemetry()
    nncf = need("nncf", exported.OPENVINO_EXTRA)
    nncf.set_log_level(logging.ERROR)
    restorer = nncf.AdvancedAccuracyRestorerParameters(
        max_num_iterations=max(1, int(MAX_REVERTED_SHARE * len(quantizer.layers(model)))),
        ranking_subset_size=MAX_RANKING_IMAGES,
        num_ranking_workers=1,
    )
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return nncf.quantize_with_accuracy_control(
            model,
            nncf.Dataset(windows),
            nncf.Dataset(dataset.of("val")),
            validate,
            max_drop=MAX_QUANTIZATION_LOSS,
            # Asymmetric activations, symmetric weights.
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(windows),
            advanced_accuracy_restorer_parameters=restorer,
        )


def _load_onnx(content: bytes) -> Any:
    return need("onnx", exported.ONNX_EXTRA).load_from_string(content)


def _save_onnx(model: Any) -> bytes:
    content: bytes = model.SerializeToString()
    return content


def _start_validated_onnx(model: Any) -> LogitsFunction:
    return exported.onnx_function(_save_onnx(model), Path("the quantised model"))


def _layers_onnx(model: Any) -> dict[str, bool]:
    dequantized = {
        output
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        for output in node.output
    }
    return {
        node.name: node.input[1] in dequantized
        for node in model.graph.node
        if node.op_type in ("Conv", "ConvTranspose")
    }


def _start_openvino(graph: Any, source: Path) -> LogitsFunction:
    if exported.has_bf16():
        return exported.openvino_bf16_function(graph)
    return exported.openvino_function(graph)


def _start_validated_openvino(compiled: Any) -> LogitsFunction:
    request = compiled.create_infer_request()

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = request.infer([np.ascontiguousarray(x)])[0].copy()
        return logits

    return run


def _layers_openvino(graph: Any) -> dict[str, bool]:
    layers = {}
    for node in graph.get_ordered_ops():
        if "Convolution" in node.get_type_name():
            weight = node.input_value(1).get_node()
            # Between the constant and the convolution: conversion, scale, the shape of groups.
            while weight.get_type_name() != "Constant":
                weight = weight.input_value(0).get_node()
            layers[node.get_friendly_name()] = weight.data.dtype.itemsize == 1
    return layers


QUANTIZERS = {
    ".onnx": Quantizer(
        _load_onnx,
        _save_onnx,
        lambda x: {exported.INPUT_NAME: x},
        exported.onnx_function,
        _start_validated_onnx,
        _layers_onnx,
    ),
    ".xml": Quantizer(
        lambda graph: graph,
        lambda model: model,
        lambda x: x,
        _start_openvino,
        _start_validated_openvino,
        _layers_openvino,
    ),
}
