"""A trained model in; an ONNX file, an OpenVINO model or a site out, compared with PyTorch first.

With a data set the model is quantised to 8 bits. Whatever is not accurate enough is not written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from useg.data.dataset import Dataset
from useg.errors import MachineError, ModelError, SettingsError
from useg.files import clear_drafts, replacing
from useg.inference import exported, runtimes
from useg.inference.predictor import load
from useg.inference.runtimes import Runtime, StoredModel, label_agreement, make_probe, probe_size
from useg.models.description import ModelDescription, description_to_json
from useg.ownership import Recognizer, is_own_onnx, is_own_openvino, refuse_foreign_files
from useg.reporting.report import open_evaluation_data
from useg.serving.quantization import QuantizationResult, quantize
from useg.serving.site import check_browser_can_read, check_site_target, is_site, write_site

# Largest difference of a logit from PyTorch's; it grows with logits above 10.
EXPORT_LOGIT_TOLERANCE = 1e-4

# Smallest share of pixels, 0 to 1, that have PyTorch's label.
EXPORT_LABEL_AGREEMENT = 0.9999


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

    Returns:
        The files, and how far the exported model differs from PyTorch in fp32.

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
        SettingsError: its extension is neither ``.onnx`` nor ``.xml``, its folder does not
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
        out: ``NAME.onnx``; ``NAME.xml``, next to which ``NAME.bin`` is written; or a folder for a
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
