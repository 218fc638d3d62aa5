"""A model file -> one callable: raw pixels in, logits out, whatever the file and whatever computes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from useg.errors import UsageError, choose, need
from useg.inference.budget import window_pixels
from useg.inference.card import Card, card_of, from_text
from useg.inference.engines import onnx, openvino, pytorch
from useg.inference.probe import agreement, probe, probe_size, seconds_of
from useg.inference.tiles import Network
from useg.models import segmenter

AGREEMENT = 0.999  # of the probe's labels: what a faster runtime must reach to be taken for the exact one
WINDOW_BYTES = 1 << 30
STARTUP = 4.0  # seconds that it takes to import OpenVINO, to convert a trained network, to compile and try it: with less to do it cannot pay


@dataclass(frozen=True)
class Runtime:
    """A model ready to compute.

    Args:
        run: raw pixels ``(N, C, H, W)`` -> logits ``(N, K, h, w)`` float32.
        card: what it takes, what the K logits stand for, what it was trained on.
        name: what computes it, one of ``RUNTIMES``.
        source: where it was read from.
    """

    run: Network
    card: Card
    name: str
    source: Path

    @cached_property
    def window_pixels(self) -> int:
        """How many pixels a window may have, so that its activations take about ``WINDOW_BYTES``."""
        return window_pixels(self.card, WINDOW_BYTES)


@dataclass(frozen=True)
class Stored:
    """A model that was read and checked, in the form in which it was stored: one of the three; others are made of it when asked for.

    Args:
        card: what the file says of it.
        source: where it was read from.
        model: of a run folder or ``model.safetensors``.
        onnx_file: of an ``.onnx``.
        openvino_graph: of an ``.xml``.
    """

    card: Card
    source: Path
    model: segmenter.Segmenter | None = None
    onnx_file: bytes | None = None
    openvino_graph: Any = None

    @property
    def native(self) -> str:
        """The runtime that computes it exactly as it is."""
        if self.model is not None:
            return "torch"
        if self.onnx_file is not None:
            return "onnx"
        return "openvino-bf16" if self.card.precision == "int8" and openvino.has_bf16() else "openvino"

    @property
    def as_torch(self) -> segmenter.Segmenter:
        """The model as a module.

        Raises:
            UsageError: it was exported.
        """
        if self.model is None:
            raise UsageError(f"{self.source} is an exported model, which PyTorch does not run; choose another runtime or give the run folder")
        return self.model

    @cached_property
    def as_onnx(self) -> bytes:
        """The model as an ONNX file."""
        if self.openvino_graph is not None:
            raise UsageError(f"{self.source} is an OpenVINO model, which ONNX Runtime does not run; choose another runtime or give the run folder")
        return self.onnx_file if self.onnx_file is not None else onnx.convert(self.as_torch)

    @cached_property
    def as_openvino(self) -> Any:
        """The model as an OpenVINO graph."""
        if self.onnx_file is not None:
            return openvino.from_onnx(self.onnx_file)
        return self.openvino_graph if self.openvino_graph is not None else openvino.convert(self.as_torch)


def read(path: Path) -> Stored:
    """Read a run folder, a ``model.safetensors``, an ``.onnx`` or an ``.xml``.

    Raises:
        UsageError: there is none, it is damaged, or useg did not write it.
    """
    if path.suffix in (".onnx", ".xml") and not path.is_file():
        raise UsageError(f"there is no model at {path}; give a run folder, a model.safetensors, or an .onnx or .xml that useg export wrote")
    if path.suffix == ".onnx":
        content, text = onnx.read(path)
        return Stored(from_text(text, str(path)), path, onnx_file=content)
    if path.suffix == ".xml":
        graph, text = openvino.read(path)
        return Stored(from_text(text, str(path)), path, openvino_graph=graph)
    model = segmenter.load(path)
    return Stored(card_of(model), path, model)


def load(path: Path, runtime: str | None = None, pictures: float = math.inf) -> Runtime:
    """Make a model ready to compute.

    Args:
        path: a run folder, a ``model.safetensors``, an ``.onnx`` or an ``.xml``.
        runtime: one of ``RUNTIMES``; ``"auto"`` tries which is fastest; by default the one that the file is for, in fp32.
        pictures: how many there are to label, as far as known: what ``"auto"`` may spend on trying.

    Raises:
        UsageError: there is no such model or runtime, the file is damaged, a package is missing.
    """
    stored = read(path)
    if runtime == "auto":
        return fastest(stored, pictures)
    return start(stored, runtime or stored.native)


def of_model(model: segmenter.Segmenter, source: Path) -> Runtime:
    """Wrap a model that is in memory; it computes where its weights lie, in fp32."""
    return start(Stored(card_of(model), source, model), "torch")


def start(stored: Stored, name: str) -> Runtime:
    """Make a model ready to compute by the runtime called ``name``.

    Raises:
        UsageError: there is no such runtime, or it cannot run this model here.
    """
    network = choose("runtime", name, RUNTIMES)(stored)
    return Runtime(network, stored.card, name, stored.source)


def fastest(stored: Stored, pictures: float = math.inf) -> Runtime:
    """Choose the fastest runtime that is installed and labels a probe as the file's own runtime does.

    Args:
        stored: the model.
        pictures: how many there are to label. A runtime that has to be started is tried only if there is more to do than its start takes.
    """
    x = probe(stored.card, probe_size(stored.card))
    best = start(stored, stored.native)
    expected, least = best.run(x), seconds_of(best.run, x)
    for name in ("gpu", "torch-bf16", "openvino-bf16", "openvino"):
        if name == best.name or (name.startswith("openvino") and stored.openvino_graph is None and pictures * least < STARTUP):
            continue
        try:
            candidate = start(stored, name)
        except UsageError:  # not installed, or not possible here
            continue
        if agreement(candidate.run(x), expected) >= AGREEMENT and (seconds := seconds_of(candidate.run, x)) < least:
            best, least = candidate, seconds
    return best


def _onnx(stored: Stored) -> Network:
    need("onnxruntime", onnx.EXTRA)  # before the conversion, which takes a while
    return onnx.network(stored.as_onnx, stored.source)


RUNTIMES: dict[str, Callable[[Stored], Network]] = {
    "torch": lambda stored: pytorch.network(stored.as_torch),
    "torch-bf16": lambda stored: pytorch.network_bf16(stored.as_torch),
    "gpu": lambda stored: pytorch.network_gpu(stored.as_torch),
    "onnx": _onnx,
    "openvino": lambda stored: openvino.network(stored.as_openvino),
    "openvino-bf16": lambda stored: openvino.network_bf16(stored.as_openvino),
}
