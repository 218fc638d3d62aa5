"""A trained model -> a file that other programs run, or nothing: what was written is read back and compared with PyTorch before it is kept."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from useg.data.dataset import Dataset
from useg.errors import UsageError
from useg.files import replacing
from useg.inference import runtimes
from useg.inference.card import Card, to_text
from useg.inference.engines import onnx, openvino
from useg.inference.probe import agreement, probe, probe_size
from useg.inference.runtimes import Runtime, Stored
from useg.serving.int8 import Quantized, quantize

LOGITS = 1e-4  # largest difference between two logits; grows with the largest logit where that is above 10
LABELS = 0.9999  # share of the probe's pixels that must have the same label


@dataclass(frozen=True)
class Export:
    """What was written, and how it compares with PyTorch in fp32.

    Args:
        files: the file, or OpenVINO's two.
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
        said = [f"on made pictures {self.agreement:.2%} of the labels are PyTorch's, the largest difference of a logit is {self.difference:.1g}"]
        return [*(self.int8.lines() if self.int8 else said), *(str(file) for file in self.files)]

    def as_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        quantized = {"int8": self.int8.as_dict()} if self.int8 else {}
        return {"files": [str(file) for file in self.files], "difference": self.difference, "agreement": self.agreement, **quantized}


def check_target(out: Path) -> None:
    """Refuse a target that cannot be written, before work is done for it.

    Raises:
        UsageError: another ending than ``.onnx`` or ``.xml``, or no folder for it.
    """
    if out.suffix not in FORMATS:
        raise UsageError(f"{out} is not a kind of file that useg exports (yet); give OUT.onnx, or OUT.xml for OpenVINO")
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent} to write {out.name} into; make it first")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}); choose another place") from error


def export(path: Path, out: Path, dataset: Dataset | None = None, *, say: Callable[[str], None] = lambda text: None) -> Export:
    """Write a trained model as ONNX or OpenVINO file: raw pixels in, logits out, for any batch, height and width that it takes.

    Args:
        path: a run folder or ``model.safetensors``.
        out: ``NAME.onnx``, or ``NAME.xml`` beside which ``NAME.bin`` is written; replaced whole or not at all.
        dataset: with it the model is quantised to 8 bits: calibrated on its training pictures, judged on its held-out ones.
        say: told what happens.

    Raises:
        UsageError: it cannot be written, a package is missing, the model was exported before, or what came out differs too much.
    """
    check_target(out)
    stored = runtimes.read(path)
    reference = runtimes.start(stored, "torch")
    graph_of, write = FORMATS[out.suffix]
    graph, card, quantized = graph_of(stored), stored.card, None
    if dataset is not None:
        graph, quantized = quantize(graph, out.suffix, reference, stored.as_torch, dataset, say=say)
        card = replace(card, precision="int8")
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder) / out.name, graph, to_text(card))
        exported = runtimes.load(files[0])
        difference, same = compare(exported, reference, card, exact=dataset is None)
        for file in reversed(files):  # the numbers before the graph that needs them
            with replacing(out.with_name(file.name)) as temporary:
                shutil.copyfile(file, temporary)
    return Export(tuple(out.with_name(file.name) for file in files), difference, same, quantized)


def compare(exported: Runtime, reference: Runtime, card: Card, *, exact: bool) -> tuple[float, float]:
    """Return the largest difference between two logits and the share of equal labels, over probe pictures of several sizes and a batch.

    Raises:
        UsageError: what was exported is not what was meant (with ``exact``, numbers too far apart; always, other shapes).
    """
    smallest, stride = card.smallest, card.stride
    probes = [(probe_size(card), 1), ((smallest + stride, smallest), 2), ((smallest + stride, smallest + 3 * stride), 3)]
    difference, pixels, equal = 0.0, 0, 0.0
    for size, count in probes:
        x = probe(card, size, count)
        expected, got = reference.run(x), exported.run(x)
        if got.shape != expected.shape:
            raise UsageError(f"the exported model answers {got.shape} where PyTorch answers {expected.shape}; nothing was written: please report it")
        beyond = 10 / max(10.0, float(np.abs(expected).max()))
        difference = max(difference, beyond * float(np.abs(got - expected).max()))
        pixels, equal = pixels + expected[:, 0].size, equal + agreement(got, expected) * expected[:, 0].size
    same = equal / pixels
    if exact and not (difference <= LOGITS and same >= LABELS):
        raise UsageError(
            f"the exported model differs from PyTorch by {difference:.2g} in a logit (at most {LOGITS:g} is allowed) and gives "
            f"{same:.3%} of the probe's pixels the same label (at least {LABELS:.2%}); nothing was written: try the other format and report it"
        )
    return difference, same


FORMATS: dict[str, tuple[Callable[[Stored], Any], Callable[[Path, Any, str], list[Path]]]] = {
    ".onnx": (lambda stored: stored.as_onnx, onnx.write),
    ".xml": (lambda stored: stored.as_openvino, openvino.write),
}
