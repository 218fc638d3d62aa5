"""A model file -> one callable: raw pixels in, logits out, whatever computes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from useg.classes import ClassTable
from useg.data.cache import WorkingSize
from useg.errors import UsageError
from useg.inference.tiles import Geometry, Network
from useg.models import segmenter


@dataclass(frozen=True)
class Runtime:
    """A model ready to compute.

    Args:
        run: raw pixels ``(N, C, H, W)`` -> logits ``(N, K, h, w)`` float32.
        geometry: which sizes it takes and what it loses.
        classes: what the K logits stand for.
        working: the size at which it looks at pictures.
        channels: bands that it takes.
        pixels: number type that it takes.
        provenance: what it was trained on.
        source: where it was read from.
    """

    run: Network
    geometry: Geometry
    classes: ClassTable
    working: WorkingSize
    channels: int
    pixels: str
    provenance: dict[str, Any]
    source: Path


def load(path: Path) -> Runtime:
    """Load a run folder or a ``model.safetensors``.

    Raises:
        UsageError: there is none, it is damaged, or of a kind that this version does not run.
    """
    if path.suffix in (".onnx", ".xml"):
        raise UsageError(f"{path}: this version of useg runs run folders and model.safetensors; exported models are not supported yet")
    return of_model(segmenter.load(path), path)


def of_model(model: segmenter.Segmenter, source: Path) -> Runtime:
    """Wrap a model that is in memory; it computes where its weights lie, in fp32."""
    device = model.mean.device

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = model(_to_tensor(x).to(device)).float().cpu().numpy()
        return logits

    geometry = Geometry(model.margin, model.stride, model.context, model.valid_size)
    return Runtime(run, geometry, model.classes, model.working, model.channels, model.pixels, model.provenance, source)


def _to_tensor(x: NDArray[np.generic]) -> torch.Tensor:
    if x.dtype == np.uint16:  # torch has few operations on uint16
        x = x.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(x))
