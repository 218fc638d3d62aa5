"""A trained model -> a file or a site that runs elsewhere, or nothing: what was written is compared with PyTorch before it is kept."""

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
from useg.serving.site import check_card, check_site, is_site, write_site

LOGITS = 1e-4  # largest difference between two logits; grows with the largest logit where that is above 10
LABELS = 0.9999  # share of the probe's pixels that must have the same label


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
        said = [f"on made pictures {self.agreement:.2%} of the labels are PyTorch's, the largest difference of a logit is {self.difference:.1g}"]
        return [*(self.int8.lines() if self.int8 else said), *(str(file) for file in self.files)]

    def as_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        quantized = {"int8": self.int8.as_dict()} if self.int8 else {}
        return {"files": [str(file) for file in self.files], "difference": self.difference, "agreement": self.agreement, **quantized}


def check_target(out: Path) -> None:
    """Refuse a target that cannot be written, before work is done for it.

    Raises:
        UsageError: another ending than ``.onnx`` or ``.xml``, no folder for it, or a folder with other things in it.
    """
    if is_site(out):
        return check_site(out)
    if out.suffix not in FORMATS:
        raise UsageError(f"{out} is not a kind of file that useg exports; give OUT.onnx, OUT.xml for OpenVINO, or OUT/ for a site")
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent} to write {out.name} into; make it first")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}); choose another place") from error


def export(path: Path, out: Path, dataset: Dataset | None = None, *, say: Callable[[str], None] = lambda text: None) -> Export:
    """Write a trained model as ONNX or OpenVINO file: raw pixels in, logits out, for any batch, height and width that it takes; or as a site.

    Args:
        path: a run folder or ``model.safetensors``.
        out: ``NAME.onnx``, or ``NAME.xml`` beside which ``NAME.bin`` is written; replaced whole or not at all. A folder becomes a site:
            the page with the model (ONNX) in it, for any web server.
        dataset: with it the model is quantised to 8 bits: calibrated on its training pictures, judged on its held-out ones.
        say: told what happens.

    Raises:
        UsageError: it cannot be written, a package is missing, the model was exported before, or what came out differs too much.
    """
    check_target(out)
    stored, suffix = runtimes.read(path), ".onnx" if is_site(out) else out.suffix
    if is_site(out):
        check_card(stored.card)
    reference = runtimes.start(stored, "torch")
    graph_of, write = FORMATS[suffix]
    graph, card, quantized = graph_of(stored), stored.card, None
    if dataset is not None:
        graph, quantized = quantize(graph, suffix, reference, stored.as_torch, dataset, say=say)
        card = replace(card, precision="int8")
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder) / out.with_suffix(suffix).name, graph, to_text(card))
        exported = runtimes.load(files[0])
        difference, same = compare(exported, reference, card, exact=dataset is None)
        if is_site(out):
            written = write_site(out, files[0].read_bytes(), replace(exported, source=stored.source), say)
        else:
            written = [_copied(file, out.with_name(file.name)) for file in reversed(files)][::-1]  # the numbers before the graph that needs them
    return Export(tuple(written), difference, same, quantized)


def _copied(file: Path, out: Path) -> Path:
    with replacing(out) as temporary:
        shutil.copyfile(file, temporary)
    return out


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
