"""A trained model -> a file or a site that runs elsewhere, or nothing: what was written is compared
with PyTorch before it is kept.
"""

from __future__ import annotations

import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from useg.data.dataset import Dataset, read_sample
from useg.errors import UsageError, need
from useg.files import replacing
from useg.inference import exported, runtimes
from useg.inference.predictor import Predictor, load
from useg.inference.runtimes import Runtime, StoredModel, label_agreement, make_probe, probe_size
from useg.inference.tiles import LogitsFunction
from useg.models.segmenter import ModelDescription, Segmenter, description_to_json
from useg.reporting.report import open_evaluation_data
from useg.scoring.metrics import confusion, score
from useg.serving.site import check_browser_can_read, check_site_target, is_site, write_site

MOST_LOST = 0.01  # of mean IoU, on the held-out pictures


# share of the layers that may stay in higher precision: with more it would hardly be faster
MOST_KEPT = 0.5


CALIBRATION = 100  # windows from training pictures


RANKING = 4  # of them, to find the sensitive layers


@dataclass(frozen=True)
class Quantized:
    """What quantisation did.

    Args:
        before: mean IoU on the held-out pictures, PyTorch in fp32.
        after: the same of the quantised model, by the runtime that its file is for.
        num_images: held-out pictures.
        num_layers: convolutions.
        kept: those that were left in higher precision, the most sensitive first.
        everything: mean IoU with all layers quantised.
    """

    before: float
    after: float
    num_images: int
    num_layers: int
    kept: tuple[str, ...]
    everything: float

    def lines(self) -> list[str]:
        """Say it in words."""
        kept = (
            f"{len(self.kept)} of {self.num_layers} layers kept in higher precision: "
            f"{', '.join(self.kept)}"
        )
        return [
            f"mean IoU on {self.num_images} held-out pictures: {100 * self.before:.1f} % before, "
            f"{100 * self.after:.1f} % after"
            + (f" ({100 * self.everything:.1f} % with every layer in 8 bits)" if self.kept else ""),
            kept if self.kept else f"all {self.num_layers} layers are in 8 bits",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        return asdict(self)


def quantize(
    graph: Any,
    form: str,
    reference: Runtime,
    model: Segmenter,
    dataset: Dataset,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Any, Quantized]:
    """Quantise a converted model to 8 bits, calibrated on the training pictures of a data set and
    judged on its held-out ones.

    Args:
        graph: the model in fp32, as ``form`` has it.
        form: ``".onnx"`` or ``".xml"``.
        reference: the model as it was trained.
        model: the same as a module.
        dataset: pairs with their splits assigned, and the model's classes.
        say: told what happens.

    Returns:
        The quantised graph, and what was done.

    Raises:
        UsageError: NNCF is not installed, no held-out or training picture, other classes, or too
            much would be lost.
    """
    if dataset.classes.names != reference.description.classes.names:
        raise UsageError(
            f"{dataset.root} has other classes than the model "
            f"({', '.join(reference.description.classes.names)}); give a data set with these"
        )
    if not (dataset.of("train") and dataset.of("val")):
        raise UsageError(
            f"{dataset.root} has no training or no held-out pictures, and both are needed; "
            "choose with --set data.split=... "
        )
    windows = calibration_windows(reference, dataset)
    operations, run, shrink = FORMS[form]
    layers = matched(model, operations(graph))
    names = list(layers)
    before = held_out_mean_iou(reference, dataset)
    ranked: list[str] = []
    everything = best = 0.0
    keep = 0
    while keep <= MOST_KEPT * len(layers):
        if keep and not ranked:
            ranked = sorted(
                names,
                key=dict(
                    zip(names, harms(model, names, windows[:RANKING]), strict=True)
                ).__getitem__,
                reverse=True,
            )
        kept = ranked[:keep]
        quantized = shrink(graph, windows, [layers[name] for name in kept])
        after = held_out_mean_iou(replace(reference, run=run(quantized, reference.source)), dataset)
        say(
            f"{len(layers) - keep} of {len(layers)} layers in 8 bits: mean IoU {100 * after:.1f} "
            f"%, before {100 * before:.1f} %"
        )
        everything, best = everything if keep else after, max(best, after)
        if before - after <= MOST_LOST:
            return quantized, Quantized(
                before, after, len(dataset.of("val")), len(layers), tuple(kept), everything
            )
        keep = max(1, 2 * keep)
    raise UsageError(
        f"in 8 bits the model loses {100 * (before - best):.1f} points of mean IoU (from "
        f"{100 * before:.1f} %), "
        f"even with half of its layers in higher precision, and {100 * MOST_LOST:g} is allowed; "
        "nothing was written: "
        "calibrate with more or other pictures, or export without --int8"
    )


def calibration_windows(runtime: Runtime, dataset: Dataset) -> list[NDArray[np.generic]]:
    """Return what the network is given when training pictures are labelled: at most ``CALIBRATION``
    windows, evenly chosen.
    """
    windows: list[NDArray[np.generic]] = []
    seen: list[NDArray[np.generic]] = []
    card = runtime.description

    def record(x: NDArray[np.generic]) -> NDArray[np.float32]:
        seen.append(x)
        N, _, H, W = x.shape
        return np.zeros(
            (N, len(card.classes), H - 2 * card.margin, W - 2 * card.margin), np.float32
        )

    predictor = Predictor(replace(runtime, run=record))
    for pair in _evenly(dataset.of("train"), CALIBRATION):
        seen.clear()
        predictor(read_sample(pair, dataset).image)
        windows += _evenly(seen, 4)
    return _evenly(windows, CALIBRATION)


def held_out_mean_iou(runtime: Runtime, dataset: Dataset) -> float:
    """Return the mean IoU on the held-out pictures at their native size."""
    predictor, pairs, size = Predictor(runtime), dataset.of("val"), len(runtime.description.classes)
    total = np.zeros((size, size), np.int64)
    for pair in pairs:
        sample = read_sample(pair, dataset)
        total += confusion(predictor(sample.image), sample.label, size)
    return score(total, runtime.description.classes.names, len(pairs)).mean_iou


def matched(model: Segmenter, operations: Mapping[str, NDArray[np.float32]]) -> dict[str, str]:
    """Return name of a convolution in the network -> name of its operation in the graph.

    Names and order change when a network becomes a graph, and batch normalisation is folded into
    the weights before it. What stays is the direction of each output channel's weights.
    """
    weights = {
        name: module.weight.detach().numpy()
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    }
    alike = [
        (_parallel(weight, other), name, key)
        for name, weight in weights.items()
        for key, other in operations.items()
        if weight.size == other.size
    ]
    found: dict[str, str] = {}
    for _, name, key in sorted(alike, reverse=True):
        if name not in found and key not in found.values():
            found[name] = key
    return found


def _parallel(weight: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return the mean over the channels of the cosine between two directions, without its sign: 1
    for the same layer.
    """
    a, b = weight.reshape(len(weight), -1), other.reshape(len(weight), -1)
    return float(
        (
            np.abs((a * b).sum(1)) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1) + 1e-12)
        ).mean()
    )


def harms(
    model: Segmenter, names: Sequence[str], windows: Sequence[NDArray[np.generic]]
) -> list[float]:
    """Return how far the logits move (mean square) when each layer alone computes in 8 bits."""
    exact = [_logits(model, x) for x in windows]
    found = []
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
        weight = layer.weight.data
        layer.weight.data = _rounded_weight(
            weight, 1 if isinstance(layer, nn.ConvTranspose2d) and layer.groups == 1 else 0
        )
        hook = layer.register_forward_pre_hook(lambda module, inputs: (_rounded(inputs[0]),))
        found.append(
            sum(
                float((_logits(model, x) - logits).square().mean())
                for x, logits in zip(windows, exact, strict=True)
            )
        )
        hook.remove()
        layer.weight.data = weight
    return found


def _rounded(x: Tensor) -> Tensor:
    """Round to 256 equal steps between the smallest and the largest value."""
    low = x.min()
    step = ((x.max() - low) / 255).clamp_min(1e-12)
    return ((x - low) / step).round() * step + low


def _rounded_weight(weight: Tensor, axis: int) -> Tensor:
    """Round to 255 equal steps about zero, for each output channel on its own."""
    step = (weight.abs().amax([k for k in range(4) if k != axis], keepdim=True) / 127).clamp_min(
        1e-12
    )
    return (weight / step).round() * step


def _logits(model: Segmenter, x: NDArray[np.generic]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.from_numpy(x.astype(np.float32)))
    return logits


def _evenly(things: Sequence[Any], most: int) -> list[Any]:
    return [
        things[k * len(things) // min(most, len(things))] for k in range(min(most, len(things)))
    ]


def _shrink(graph: Any, windows: Sequence[Any], ignored: Sequence[str]) -> Any:
    """Let NNCF quantise a graph of its own kind, except for the operations ``ignored``; it talks
    and warns a lot.
    """
    exported.silence_telemetry()
    nncf = need("nncf", exported.OPENVINO_EXTRA)
    nncf.set_log_level(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return nncf.quantize(
            graph,
            nncf.Dataset(windows),
            preset=nncf.QuantizationPreset.MIXED,  # activations of both signs, weights about zero
            subset_size=len(windows),
            ignored_scope=nncf.IgnoredScope(names=list(ignored)),
        )


def _shrink_onnx(
    content: bytes, windows: Sequence[NDArray[np.generic]], ignored: Sequence[str]
) -> bytes:
    package = need("onnx", exported.ONNX_EXTRA)
    shrunk: bytes = _shrink(
        package.load_from_string(content), [{exported.INPUT_NAME: x} for x in windows], ignored
    ).SerializeToString()
    return shrunk


def _operations_onnx(content: bytes) -> dict[str, NDArray[np.float32]]:
    package = need("onnx", exported.ONNX_EXTRA)
    graph = package.load_from_string(content).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    return {
        node.name: package.numpy_helper.to_array(weights[node.input[1]])
        for node in graph.node
        if node.op_type in ("Conv", "ConvTranspose")
    }


def _operations_openvino(graph: Any) -> dict[str, NDArray[np.float32]]:
    found = {}
    for node in graph.get_ordered_ops():
        if "Convolution" in node.get_type_name():
            weight = node.input_value(1).get_node()
            while (
                weight.get_type_name() != "Constant"
            ):  # the weights of grouped convolutions are reshaped
                weight = weight.input_value(0).get_node()
            found[node.get_friendly_name()] = weight.data
    return found


def _run_openvino(graph: Any, source: Path) -> LogitsFunction:
    return (
        exported.openvino_bf16_function(graph)
        if exported.has_bf16()
        else exported.openvino_function(graph)
    )


# kind of file -> (its convolutions with their weights, what computes it, what quantises it)
FORMS: dict[
    str,
    tuple[
        Callable[[Any], dict[str, NDArray[np.float32]]],
        Callable[[Any, Path], LogitsFunction],
        Callable[[Any, Any, Sequence[str]], Any],
    ],
] = {
    ".onnx": (_operations_onnx, exported.onnx_function, _shrink_onnx),
    ".xml": (_operations_openvino, _run_openvino, _shrink),
}


# largest difference between two logits; grows with the largest logit where that is above 10
EXPORT_LOGIT_TOLERANCE = 1e-4


EXPORT_LABEL_AGREEMENT = 0.9999  # share of the probe's pixels that must have the same label


@dataclass(frozen=True)
class Export:
    """What was written, and how it compares with PyTorch in fp32.

    Args:
        files: the file, OpenVINO's two, or a site's page, card and model.
        difference: the largest between two logits, on the probe pictures.
        agreement: share of the probe's pixels, 0 to 1, with the same label.
        int8: what quantisation did, if it was asked for.
    """

    files: tuple[Path, ...]
    difference: float
    agreement: float
    int8: Quantized | None = None

    def lines(self) -> list[str]:
        """Say it in words."""
        said = [
            f"on made pictures {self.agreement:.2%} of the labels are PyTorch's, the largest "
            f"difference of a logit is {self.difference:.1g}"
        ]
        return [*(self.int8.lines() if self.int8 else said), *(str(file) for file in self.files)]

    def as_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        quantized = {"int8": self.int8.as_dict()} if self.int8 else {}
        return {
            "files": [str(file) for file in self.files],
            "difference": self.difference,
            "agreement": self.agreement,
            **quantized,
        }


def check_target(out: Path) -> None:
    """Refuse a target that cannot be written, before work is done for it.

    Raises:
        UsageError: another ending than ``.onnx`` or ``.xml``, no folder for it, or a folder with
            other things in it.
    """
    if is_site(out):
        return check_site_target(out)
    if out.suffix not in EXPORT_FORMATS:
        raise UsageError(
            f"{out} is not a kind of file that useg exports; give OUT.onnx, OUT.xml for "
            "OpenVINO, or OUT/ for a site"
        )
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent} to write {out.name} into; make it first")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UsageError(
            f"{out} cannot be written ({error.strerror}); choose another place"
        ) from error


def export_model(
    path: Path,
    out: Path,
    dataset: Dataset | None = None,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Export:
    """Write a trained model as ONNX or OpenVINO file: raw pixels in, logits out, for any batch,
    height and width that it takes; or as a site.

    Args:
        path: a run folder or ``model.safetensors``.
        out: ``NAME.onnx``, or ``NAME.xml`` beside which ``NAME.bin`` is written; replaced whole or
            not at all. A folder becomes a site: the page with the model (ONNX) in it, for any web
            server.
        dataset: with it the model is quantised to 8 bits: calibrated on its training pictures,
            judged on its held-out ones.
        say: told what happens.

    Raises:
        UsageError: it cannot be written, a package is missing, the model was exported before, or
            what came out differs too much.
    """
    check_target(out)
    stored, suffix = runtimes.read_model(path), ".onnx" if is_site(out) else out.suffix
    if is_site(out):
        check_browser_can_read(stored.description)
    reference = runtimes.start_runtime(stored, "torch")
    graph_of, write = EXPORT_FORMATS[suffix]
    graph, card, quantized = graph_of(stored), stored.description, None
    if dataset is not None:
        graph, quantized = quantize(graph, suffix, reference, stored.as_torch, dataset, say=say)
        card = replace(card, precision="int8")
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder) / out.with_suffix(suffix).name, graph, description_to_json(card))
        exported = runtimes.load_runtime(files[0])
        difference, same = compare_exports(exported, reference, card, exact=dataset is None)
        if is_site(out):
            written = write_site(
                out, files[0].read_bytes(), replace(exported, source=stored.source), say
            )
        else:
            written = [_copied(file, out.with_name(file.name)) for file in reversed(files)][
                ::-1
            ]  # the numbers before the graph that needs them
    return Export(tuple(written), difference, same, quantized)


def _copied(file: Path, out: Path) -> Path:
    with replacing(out) as temporary:
        shutil.copyfile(file, temporary)
    return out


def compare_exports(
    exported: Runtime, reference: Runtime, card: ModelDescription, *, exact: bool
) -> tuple[float, float]:
    """Return the largest difference between two logits and the share of equal labels, over probe
    pictures of several sizes and a batch.

    Raises:
        UsageError: what was exported is not what was meant (with ``exact``, numbers too far apart;
            always, other shapes).
    """
    smallest, stride = card.smallest, card.stride
    probes = [
        (probe_size(card), 1),
        ((smallest + stride, smallest), 2),
        ((smallest + stride, smallest + 3 * stride), 3),
    ]
    difference, pixels, equal = 0.0, 0, 0.0
    for size, count in probes:
        x = make_probe(card, size, count)
        expected, got = reference.run(x), exported.run(x)
        if got.shape != expected.shape:
            raise UsageError(
                f"the exported model answers {got.shape} where PyTorch answers {expected.shape}; "
                "nothing was written: please report it"
            )
        beyond = 10 / max(10.0, float(np.abs(expected).max()))
        difference = max(difference, beyond * float(np.abs(got - expected).max()))
        pixels, equal = (
            pixels + expected[:, 0].size,
            equal + label_agreement(got, expected) * expected[:, 0].size,
        )
    same = equal / pixels
    if exact and not (difference <= EXPORT_LOGIT_TOLERANCE and same >= EXPORT_LABEL_AGREEMENT):
        raise UsageError(
            f"the exported model differs from PyTorch by {difference:.2g} in a logit (at most "
            f"{EXPORT_LOGIT_TOLERANCE:g} is allowed) and gives "
            f"{same:.3%} of the probe's pixels the same label (at least "
            f"{EXPORT_LABEL_AGREEMENT:.2%}); nothing was written: try the other format and "
            "report it"
        )
    return difference, same


EXPORT_FORMATS: dict[
    str, tuple[Callable[[StoredModel], Any], Callable[[Path, Any, str], list[Path]]]
] = {
    ".onnx": (lambda stored: stored.as_onnx, exported.write_onnx),
    ".xml": (lambda stored: stored.as_openvino, exported.write_openvino),
}


def export(
    model: str | Path,
    out: str | Path,
    int8: str | Path | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Export:
    """Write a trained model for other programs: raw pixels in, logits out, for any batch, height
    and width that it takes.

    Args:
        model: a run folder or ``model.safetensors``.
        out: ``NAME.onnx``, ``NAME.xml`` for OpenVINO, or a folder for a site: a page that runs the
            model in the browser.
        int8: a data set: quantise to 8 bits, calibrated on its training pictures and judged on its
            held-out ones.
        settings: dotted ``data.*`` settings that say how the set is split; by default as when the
            model was trained.
        say: told what happens.

    Raises:
        UsageError: no model, a target that cannot be written, a missing package, or a result too
            far from the model.
    """
    check_target(Path(out))
    dataset = open_evaluation_data(load(model), int8, settings) if int8 else None
    return export_model(Path(model), Path(out), dataset, say=say)
