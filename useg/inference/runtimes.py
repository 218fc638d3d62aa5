"""A model file -> one callable: raw pixels in, logits out, whatever the file and whatever computes it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from useg.errors import UsageError, choose, need
from useg.inference import exported
from useg.inference.tiles import LogitsFunction
from useg.machine import measure_seconds
from useg.models import segmenter
from useg.models.describe import describe
from useg.models.geometry import reflect_indices
from useg.models.segmenter import (
    ModelDescription,
    Segmenter,
    build_network,
    describe_model,
    description_from_json,
)
from useg.scenes.scene import make_scene

MAX_PROBE_SIDE_PIXELS = 512  # a longer side than this is not probed


NUM_PROBE_SCENES = 4  # scenes; a larger batch repeats them


def probe_size(description: ModelDescription) -> tuple[int, int]:
    """Return the (width, height) of what the network is given at its working size, at most about ``SIDE`` each way."""
    width, height = description.working.of(
        *(description.working.frame or (MAX_PROBE_SIDE_PIXELS, MAX_PROBE_SIDE_PIXELS))
    )
    whole = [
        description.valid_size(min(side, MAX_PROBE_SIDE_PIXELS) + 2 * description.margin)
        for side in (width, height)
    ]
    return whole[0], whole[1]


def make_probe(
    description: ModelDescription, size: tuple[int, int], count: int = 1
) -> NDArray[np.generic]:
    """Make raw pixels ``(count, C, height, width)`` as the model takes them; the same each time."""
    width, height = size
    scenes = [_scene(k % NUM_PROBE_SCENES) for k in range(count)]
    rows, columns = reflect_indices(np.arange(height), 192), reflect_indices(np.arange(width), 256)
    x = np.stack(scenes)[:, rows][:, :, columns].transpose(0, 3, 1, 2)[
        :, [band % 3 for band in range(description.channels)]
    ]
    x = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    x = (
        x * np.array(description.std, np.float32)[:, None, None]
        + np.array(description.mean, np.float32)[:, None, None]
    )
    if description.pixels != "float32":
        x = np.clip(np.rint(x), 0, np.iinfo(description.pixels).max)
    pixels: NDArray[np.generic] = x.astype(description.pixels)
    return pixels


@cache
def _scene(seed: int) -> NDArray[np.float32]:
    return make_scene(seed, (256, 192)).image.astype(np.float32)


def label_agreement(logits: NDArray[np.float32], others: NDArray[np.float32]) -> float:
    """Return the share of pixels, 0 to 1, that two answers (N, K, h, w) give the same label."""
    return float((logits.argmax(1) == others.argmax(1)).mean())


def torch_function(model: Segmenter) -> LogitsFunction:
    """Compute in fp32, where the weights lie."""
    return _logits_function(model, bf16=False)


def torch_bf16_function(model: Segmenter) -> LogitsFunction:
    """Compute the convolutions in bf16, where the weights lie; all else as autocast decides, logits in fp32.

    Weights are cast once instead of with every call, which saves 10 % with one small picture at a time. Grouped convolutions stay in
    fp32 for ``in_fp32``, and are small.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.groups == 1:
            module.to(torch.bfloat16)
    return _logits_function(model, bf16=True)


def gpu_function(model: Segmenter) -> LogitsFunction:
    """Compute in bf16 on the first GPU.

    Raises:
        UsageError: PyTorch sees no GPU.
    """
    if not torch.cuda.is_available():
        raise UsageError(
            "PyTorch sees no GPU here; choose --runtime auto, or install a build of torch for your GPU"
        )
    return torch_bf16_function(copy.deepcopy(model).to("cuda"))


def _logits_function(model: Segmenter, *, bf16: bool) -> LogitsFunction:
    device = model.mean.device

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits: NDArray[np.float32] = model(_to_tensor(x).to(device)).float().cpu().numpy()
        return logits

    return run


def _to_tensor(x: NDArray[np.generic]) -> torch.Tensor:
    if x.dtype == np.uint16:  # torch has few operations on uint16
        x = x.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(x))


PEAK_FEATURE_MAPS, PEAK_LOGIT_MAPS = (
    7,
    2,
)  # live at the same time at the peak, fitted to measured processes (benchmarks/tiles.py)


DESCRIBED_SIDE_PIXELS = 256  # pixels: the side of the picture for which the network is described


def bytes_per_pixel(description: ModelDescription) -> int:
    """Estimate the memory that the network's activations take at their peak, in fp32, for each pixel that it is given.

    Seven times its largest feature map and twice its answer: that is what the last level of the expanding path holds.
    """
    side = description.valid_size(max(DESCRIBED_SIDE_PIXELS, description.smallest))
    with torch.device("meta"):
        network = build_network(description.network)
    largest = max(
        channels * height * width
        for channels, height, width in (
            layer.shape for layer in describe(network, (side, side)).layers
        )
    )
    return int(
        4 * (PEAK_FEATURE_MAPS * largest / side**2 + PEAK_LOGIT_MAPS * len(description.classes))
    )


def window_pixels(description: ModelDescription, budget_bytes: int) -> int:
    """Return how many pixels a window may have so that the network's activations fit into ``budget_bytes``."""
    return budget_bytes // bytes_per_pixel(description)


MIN_LABEL_AGREEMENT = (
    0.999  # of the probe's labels: what a faster runtime must reach to be taken for the exact one
)


MAX_WINDOW_BYTES = 1 << 30


OPENVINO_STARTUP_SECONDS = 4.0  # seconds that it takes to import OpenVINO, to convert a trained network, to compile and try it: with less to do it cannot pay


@dataclass(frozen=True)
class Runtime:
    """A model ready to compute.

    Args:
        run: raw pixels ``(N, C, H, W)`` -> logits ``(N, K, h, w)`` float32.
        description: what it takes, what the K logits stand for, what it was trained on.
        name: what computes it, one of ``RUNTIMES``.
        source: where it was read from.
    """

    run: LogitsFunction
    description: ModelDescription
    name: str
    source: Path

    @cached_property
    def window_pixels(self) -> int:
        """How many pixels a window may have, so that its activations take about ``WINDOW_BYTES``."""
        return window_pixels(self.description, MAX_WINDOW_BYTES)


@dataclass(frozen=True)
class StoredModel:
    """A model that was read and checked, in the form in which it was stored: one of the three; others are made of it when asked for.

    Args:
        description: what the file says of it.
        source: where it was read from.
        model: of a run folder or ``model.safetensors``.
        onnx_file: of an ``.onnx``.
        openvino_graph: of an ``.xml``.
    """

    description: ModelDescription
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
        return (
            "openvino-bf16"
            if self.description.precision == "int8" and exported.has_bf16()
            else "openvino"
        )

    @property
    def as_torch(self) -> segmenter.Segmenter:
        """The model as a module.

        Raises:
            UsageError: it was exported.
        """
        if self.model is None:
            raise UsageError(
                f"{self.source} is an exported model, which PyTorch does not run; choose another runtime or give the run folder"
            )
        return self.model

    @cached_property
    def as_onnx(self) -> bytes:
        """The model as an ONNX file."""
        if self.openvino_graph is not None:
            raise UsageError(
                f"{self.source} is an OpenVINO model, which ONNX Runtime does not run; choose another runtime or give the run folder"
            )
        return self.onnx_file if self.onnx_file is not None else exported.to_onnx(self.as_torch)

    @cached_property
    def as_openvino(self) -> Any:
        """The model as an OpenVINO graph."""
        if self.onnx_file is not None:
            return exported.openvino_from_onnx(self.onnx_file)
        return (
            self.openvino_graph
            if self.openvino_graph is not None
            else exported.to_openvino(self.as_torch)
        )


def read_model(path: Path) -> StoredModel:
    """Read a run folder, a ``model.safetensors``, an ``.onnx`` or an ``.xml``.

    Raises:
        UsageError: there is none, it is damaged, or useg did not write it.
    """
    if path.suffix in (".onnx", ".xml") and not path.is_file():
        raise UsageError(
            f"there is no model at {path}; give a run folder, a model.safetensors, or an .onnx or .xml that useg export wrote"
        )
    if path.suffix == ".onnx":
        content, text = exported.read_onnx(path)
        return StoredModel(description_from_json(text, str(path)), path, onnx_file=content)
    if path.suffix == ".xml":
        graph, text = exported.read_openvino(path)
        return StoredModel(description_from_json(text, str(path)), path, openvino_graph=graph)
    model = segmenter.load_model(path)
    return StoredModel(describe_model(model), path, model)


def load_runtime(path: Path, runtime: str | None = None, pictures: float = math.inf) -> Runtime:
    """Make a model ready to compute.

    Args:
        path: a run folder, a ``model.safetensors``, an ``.onnx`` or an ``.xml``.
        runtime: one of ``RUNTIMES``; ``"auto"`` tries which is fastest; by default the one that the file is for, in fp32.
        pictures: how many there are to label, as far as known: what ``"auto"`` may spend on trying.

    Raises:
        UsageError: there is no such model or runtime, the file is damaged, a package is missing.
    """
    stored = read_model(path)
    if runtime == "auto":
        return fastest_runtime(stored, pictures)
    return start_runtime(stored, runtime or stored.native)


def runtime_of_model(model: segmenter.Segmenter, source: Path) -> Runtime:
    """Wrap a model that is in memory; it computes where its weights lie, in fp32."""
    return start_runtime(StoredModel(describe_model(model), source, model), "torch")


def start_runtime(stored: StoredModel, name: str) -> Runtime:
    """Make a model ready to compute by the runtime called ``name``.

    Raises:
        UsageError: there is no such runtime, or it cannot run this model here.
    """
    network = choose("runtime", name, RUNTIMES)(stored)
    return Runtime(network, stored.description, name, stored.source)


def fastest_runtime(stored: StoredModel, pictures: float = math.inf) -> Runtime:
    """Choose the fastest runtime that is installed and labels a probe as the file's own runtime does.

    Args:
        stored: the model.
        pictures: how many there are to label. A runtime that has to be started is tried only if there is more to do than its start takes.
    """
    x = make_probe(stored.description, probe_size(stored.description))
    best = start_runtime(stored, stored.native)
    expected, least = best.run(x), measure_seconds(best.run, x)
    for name in ("gpu", "torch-bf16", "openvino-bf16", "openvino"):
        if name == best.name or (
            name.startswith("openvino")
            and stored.openvino_graph is None
            and pictures * least < OPENVINO_STARTUP_SECONDS
        ):
            continue
        try:
            candidate = start_runtime(stored, name)
        except UsageError:  # not installed, or not possible here
            continue
        if (
            label_agreement(candidate.run(x), expected) >= MIN_LABEL_AGREEMENT
            and (seconds := measure_seconds(candidate.run, x)) < least
        ):
            best, least = candidate, seconds
    return best


def _onnx(stored: StoredModel) -> LogitsFunction:
    need("onnxruntime", exported.ONNX_EXTRA)  # before the conversion, which takes a while
    return exported.onnx_function(stored.as_onnx, stored.source)


RUNTIMES: dict[str, Callable[[StoredModel], LogitsFunction]] = {
    "torch": lambda stored: torch_function(stored.as_torch),
    "torch-bf16": lambda stored: torch_bf16_function(stored.as_torch),
    "gpu": lambda stored: gpu_function(stored.as_torch),
    "onnx": _onnx,
    "openvino": lambda stored: exported.openvino_function(stored.as_openvino),
    "openvino-bf16": lambda stored: exported.openvino_bf16_function(stored.as_openvino),
}
