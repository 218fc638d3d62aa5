"""A trained model in; an ONNX file, an OpenVINO model or a site out, compared with PyTorch first.

With a data set the model is quantised to 8 bits. Quantising every layer is fastest, and can cost
points of mean IoU. NNCF then reverts the layers that cost most, one by one, until the loss on the
held-out images is small enough. Whatever is not accurate enough is not written.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.data.dataset import Dataset, Pair, read_sample
from useg.errors import DataError, MachineError, ModelError, SettingsError, need
from useg.files import clear_drafts, replacing
from useg.inference import exported, runtimes
from useg.inference.predictor import Predictor, load
from useg.inference.runtimes import Runtime, StoredModel, label_agreement, make_probe, probe_size
from useg.inference.tiles import LogitsFunction
from useg.models.description import ModelDescription, description_to_json
from useg.ownership import Recognizer, is_own_onnx, is_own_openvino, refuse_foreign_files
from useg.reporting.report import open_evaluation_data
from useg.scoring.metrics import confusion, score
from useg.serving.site import check_browser_can_read, check_site_target, is_site, write_site

# Largest loss of mean IoU on the held-out images, 0 to 1.
MAX_QUANTIZATION_LOSS = 0.01

# Largest share of the layers in higher precision; with more, the model would hardly be faster.
MAX_REVERTED_SHARE = 0.5

# Windows of training images on which the ranges of activations are measured.
MAX_CALIBRATION_WINDOWS = 100
MAX_CALIBRATION_WINDOWS_PER_IMAGE = 4

# Held-out images on which layers are ranked by the accuracy that they cost.
MAX_RANKING_IMAGES = 8

# Largest difference of a logit from PyTorch's; it grows with logits above 10.
EXPORT_LOGIT_TOLERANCE = 1e-4

# Smallest share of pixels, 0 to 1, that have PyTorch's label.
EXPORT_LABEL_AGREEMENT = 0.9999


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


@dataclass(frozen=True)
class Export:
    """What was written, and how it compares with PyTorch in fp32.

    Args:
        files: the ONNX file, OpenVINO's two files, or a site's page, description and model.
        difference: largest difference of a logit, on generated images.
        agreement: share of their pixels, 0 to 1, that have PyTorch's label.
        int8: what quantisation did; None without it.
    """

    files: tuple[Path, ...]
    difference: float
    agreement: float
    int8: QuantizationResult | None = None

    def lines(self) -> list[str]:
        """Return the result as lines of text."""
        comparison = (
            f"on generated images {100 * self.agreement:.2f} % of the labels equal PyTorch's, and "
            f"logits differ by at most {self.difference:.1g}"
        )
        lines = self.int8.lines() if self.int8 else [comparison]
        return [*lines, *map(str, self.files)]

    def as_dict(self) -> dict[str, Any]:
        """Return the result ready for JSON."""
        content = {
            "files": [str(file) for file in self.files],
            "difference": self.difference,
            "agreement": self.agreement,
        }
        return content | ({"int8": self.int8.as_dict()} if self.int8 else {})


def export(
    model: str | os.PathLike[str],
    out: str | Path,
    int8: str | Path | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Export:
    """Write a trained model for other programs.

    The exported model takes raw pixels and returns logits, for any batch size, height and width
    that the network allows.

    Args:
        model: a run folder or ``model.safetensors``.
        out: ``NAME.onnx``, ``NAME.xml`` for OpenVINO, or a folder for a site: a page that runs the
            model in the browser.
        int8: a data set: quantise to 8 bits, calibrated on its training images and checked on its
            held-out ones.
        settings: dotted ``data.*`` settings that split the data set; by default as in training.
        say: called with each progress message.

    Raises:
        UsageError: there is no such model, the target cannot be written, a package is missing, or
            the result differs too much from the model.
    """
    check_export_target(Path(out))
    _check_source(Path(model))
    dataset = open_evaluation_data(load(model), int8, settings) if int8 else None
    return export_model(Path(model), Path(out), dataset, say=say)


def check_export_target(out: Path) -> None:
    """Refuse a target that cannot be written, before any work.

    Raises:
        SettingsError: it has another extension than ``.onnx`` or ``.xml``, its folder does not
            exist, or it is a folder with other files in it.
        DataError: useg did not write the file that is there.
        MachineError: it cannot be written.
    """
    if is_site(out):
        return check_site_target(out)
    if out.suffix not in EXPORT_FORMATS:
        raise SettingsError(
            f"useg export does not write {out.suffix} files ({out}); give NAME.onnx, NAME.xml for "
            "OpenVINO, or a folder for a site"
        )
    targets = [out] if out.suffix == ".onnx" else [out, out.with_suffix(".bin")]
    refuse_foreign_files(
        ((target, RECOGNIZERS[target.suffix]) for target in targets), "choose another name"
    )
    if not out.parent.is_dir():
        raise SettingsError(f"the folder {out.parent} for {out.name} does not exist; make it first")
    try:
        clear_drafts(out.absolute().parent)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise MachineError(
            f"{out} cannot be written ({error.strerror}); choose another place"
        ) from error


def export_model(
    path: Path,
    out: Path,
    dataset: Dataset | None = None,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Export:
    """Write a trained model as :func:`export` does.

    Args:
        path: a run folder or ``model.safetensors``.
        out: ``NAME.onnx``; ``NAME.xml``, beside which ``NAME.bin`` is written; or a folder for a
            site. Files are replaced whole or not at all.
        dataset: with it the model is quantised to 8 bits.
        say: called with each progress message.

    Raises:
        UsageError: as for :func:`export`.
    """
    check_export_target(out)
    _check_source(path)
    stored = runtimes.read_model(path)
    suffix = ".onnx" if is_site(out) else out.suffix
    if is_site(out):
        check_browser_can_read(stored.description)
    reference = runtimes.start_runtime(stored, "torch")
    convert, write = EXPORT_FORMATS[suffix]
    graph, description, quantized = convert(stored), stored.description, None
    if dataset is not None:
        graph, quantized = quantize(graph, suffix, reference, dataset, say=say)
        description = replace(description, precision="int8")
    with tempfile.TemporaryDirectory() as folder:
        name = out.with_suffix(suffix).name
        files = write(Path(folder) / name, graph, description_to_json(description))
        runtime = runtimes.load_runtime(files[0])
        difference, agreement = compare_exports(
            runtime, reference, description, exact=dataset is None
        )
        if is_site(out):
            content = files[0].read_bytes()
            written = write_site(out, content, replace(runtime, source=stored.source), say)
        else:
            written = [out.with_name(file.name) for file in files]
            # OpenVINO's weights come before the graph that needs them.
            for file, target in reversed(list(zip(files, written, strict=True))):
                with replacing(target, RECOGNIZERS[target.suffix]) as draft:
                    shutil.copyfile(file, draft)
    return Export(tuple(written), difference, agreement, quantized)


def _check_source(path: Path) -> None:
    """Refuse what other commands accept as a model, but export cannot convert."""
    if path.suffix in EXPORT_FORMATS:
        raise ModelError(
            f"{path} is already an exported model, and useg export needs the model as it was "
            "trained; give its run folder or its model.safetensors"
        )
    if "," in str(path) and not path.exists():
        raise ModelError(
            f"{path} names an ensemble, and useg export writes one model to one file; export each "
            "model separately"
        )


def compare_exports(
    runtime: Runtime, reference: Runtime, description: ModelDescription, *, exact: bool
) -> tuple[float, float]:
    """Compare an exported model with PyTorch on generated images of several sizes.

    Args:
        runtime: the exported model.
        reference: the model computed by PyTorch.
        description: of the model.
        exact: whether logits and labels have to be equal, but for rounding.

    Returns:
        The largest difference of a logit, and the share of equal labels.

    Raises:
        ModelError: the difference is too large, or the shapes differ.
    """
    smallest, stride = description.smallest, description.stride
    probes = [
        (probe_size(description), 1),
        ((smallest + stride, smallest), 2),
        ((smallest + stride, smallest + 3 * stride), 3),
    ]
    difference, pixels, equal = 0.0, 0, 0.0
    for size, count in probes:
        x = make_probe(description, size, count)
        expected, logits = reference.run(x), runtime.run(x)
        if logits.shape != expected.shape:
            raise ModelError(
                f"the exported model returns the shape {logits.shape}, PyTorch {expected.shape}; "
                "nothing was written: please report this"
            )
        scale = 10 / max(10.0, float(np.abs(expected).max()))
        difference = max(difference, scale * float(np.abs(logits - expected).max()))
        pixels += expected[:, 0].size
        K = len(description.classes)
        equal += label_agreement(logits[:, :K], expected[:, :K]) * expected[:, 0].size
    agreement = equal / pixels
    if exact and not (difference <= EXPORT_LOGIT_TOLERANCE and agreement >= EXPORT_LABEL_AGREEMENT):
        raise ModelError(
            f"the exported model differs from PyTorch by {difference:.2g} in a logit "
            f"({EXPORT_LOGIT_TOLERANCE:g} is allowed), and {100 * agreement:.3f} % of its labels "
            f"are equal ({100 * EXPORT_LABEL_AGREEMENT:.2f} % are needed); nothing was written: "
            "try the other format and report this"
        )
    return difference, agreement


EXPORT_FORMATS: dict[
    str, tuple[Callable[[StoredModel], Any], Callable[[Path, Any, str], list[Path]]]
] = {
    ".onnx": (lambda stored: stored.as_onnx, exported.write_onnx),
    ".xml": (lambda stored: stored.as_openvino, exported.write_openvino),
}


RECOGNIZERS: dict[str, Recognizer] = {
    ".onnx": is_own_onnx,
    ".xml": is_own_openvino,
    ".bin": exported.is_own_weights,
}


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
            f"{dataset.root} has other classes than the model "
            f"({', '.join(description.classes.names)}); give a data set with the model's classes"
        )
    if not (dataset.of("train") and dataset.of("val")):
        raise DataError(
            f"{dataset.root} has no training or no held-out images, and 8 bits need both; choose "
            "a split with data.split"
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
