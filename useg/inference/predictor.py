"""Image -> prediction: working size, windows, logits, native size, label map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from useg.classes import ClassTable, most_probable, softmax
from useg.errors import UsageError, choose
from useg.images.files import Image, resize_image
from useg.inference import runtimes, tiles
from useg.models import geometry
from useg.models.geometry import fit_bands


@dataclass(frozen=True)
class AugmentedView:
    """A way to look at a picture: first with rows and columns exchanged, then upside down, then mirrored.

    Args:
        scale: factor applied to the size at which the model works.
        transposed: rows become columns.
        upside_down: the lowest row comes first.
        mirrored: the rightmost column comes first.
    """

    scale: float = 1.0
    transposed: bool = False
    upside_down: bool = False
    mirrored: bool = False

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) to which a picture is brought before it is turned."""
        return max(1, round(width * self.scale)), max(1, round(height * self.scale))

    def turn(self, pixels: Image) -> Image:
        """Turn a picture ``(H, W, C)`` the way in which the network sees it."""
        pixels = pixels.transpose(1, 0, 2) if self.transposed else pixels
        return pixels[:: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1]

    def turn_back(self, logits: NDArray[Any]) -> NDArray[Any]:
        """Turn the network's answer ``(K, h, w)`` back: the inverse of :meth:`turn`."""
        turned = logits[:, :: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1]
        turned = turned.transpose(0, 2, 1) if self.transposed else turned
        return (
            turned.copy() if self.transposed or self.upside_down or self.mirrored else logits
        )  # torch takes no negative strides


_BOTH = (False, True)


AUGMENTATIONS: dict[str, tuple[AugmentedView, ...]] = {
    "none": (AugmentedView(),),
    "flip": (AugmentedView(), AugmentedView(mirrored=True)),  # street scenes: the sky stays above
    "flips": tuple(AugmentedView(upside_down=a, mirrored=b) for a, b in product(_BOTH, _BOTH)),
    "turns": tuple(
        AugmentedView(1, *turns) for turns in product(_BOTH, _BOTH, _BOTH)
    ),  # U-Net paper, table 1: "averaged over 7 rotated versions"
    "scales": tuple(AugmentedView(scale) for scale in (0.75, 1.0, 1.25)),
}


MAX_SINGLE_PASS_PIXELS = 1_500_000  # up to so many pixels nobody has to ask what one pass takes


class Predictor:
    """A trained model, or several that answer together, as a function from image to label map.

    >>> model = Predictor.load("run")  # doctest: +SKIP
    >>> prediction = model(image)  # doctest: +SKIP

    Args:
        runtime: the model.
        others: further ones, for an ensemble: the mean of all their probabilities decides. They may work at other sizes.
        augment: test-time augmentation, one of ``AUGMENTATIONS``: ``"flip"`` also looks at the mirror image, ``"flips"`` also from below, ``"turns"``
            in all eight ways, ``"scales"`` at three sizes; again the mean of the probabilities decides.

    Raises:
        UsageError: no such augmentation, or models that do not know the same classes or do not take the same pictures.
    """

    def __init__(
        self, runtime: runtimes.Runtime, *others: runtimes.Runtime, augment: str = "none"
    ) -> None:
        self.views = choose("augmentation", augment, AUGMENTATIONS)
        for other in others:
            _check_ensemble(runtime, other)
        self.runtime = runtime
        self.runtimes = (runtime, *others)
        self.augment = augment

    @classmethod
    def load(
        cls,
        path: str | Path,
        runtime: str | None = None,
        pictures: float = math.inf,
        augment: str = "none",
    ) -> Predictor:
        """Load a run folder or a model file, or several with commas between them as an ensemble.

        Arguments and errors are those of :func:`useg.inference.runtimes.load_runtime` and of the class.
        """
        choose("augmentation", augment, AUGMENTATIONS)  # a slip is answered at once
        return cls(
            *(runtimes.load_runtime(part, runtime, pictures) for part in _model_paths(Path(path))),
            augment=augment,
        )

    @property
    def classes(self) -> ClassTable:
        """The class table: what the ids in a prediction stand for."""
        return self.runtime.description.classes

    @property
    def is_alone(self) -> bool:
        """Whether the answer is that of one model in one view, so that ``runtime`` is all there is to it."""
        return len(self.runtimes) == len(self.views) == 1

    @property
    def name(self) -> str:
        """What to call it in a report: where it was read from, and how it was augmented."""
        sources = ", ".join(str(runtime.source) for runtime in self.runtimes)
        return sources if self.augment == "none" else f"{sources} ({self.augment})"

    @property
    def temperature(self) -> float:
        """What :meth:`logits` are divided by before they become probabilities; 1 where they are those of a mean of probabilities."""
        return self.runtime.description.temperature if self.is_alone else 1.0

    def __call__(self, image: Image, tile: int | None = None) -> NDArray[np.uint8]:
        """Label every pixel.

        Args:
            image: ``(H, W, C)`` or ``(H, W)``, with the bands and number type of the training images (grey is accepted for RGB).
            tile: 0 forces one pass, a number forces windows of about that many pixels, None chooses.

        Returns:
            Label map ``(H, W)`` uint8: class ids.

        Raises:
            UsageError: bands or number type do not fit the model.
        """
        return most_probable(self.logits(image, tile))

    def probabilities(self, image: Image, tile: int | None = None) -> NDArray[np.float32]:
        """Return each class's probability at each pixel, ``(K, H, W)`` float32, summing to 1; arguments and errors as for a call.

        The logits are divided by the model's temperature, which changes no label map: of the pixels that it calls 80 % sure, about 80 % are right
        on pictures like those held out in training. Of an ensemble, and of several views, it is the mean.
        """
        image = self._fit(image)
        mean: NDArray[np.float32] | None = None
        for runtime in self.runtimes:
            for view in self.views:
                part = softmax(
                    _native_logits(runtime, view, image, tile), runtime.description.temperature
                )
                mean = part if mean is None else np.add(mean, part, out=mean)
        assert mean is not None
        mean /= len(self.runtimes) * len(self.views)
        return mean

    def logits(self, image: Image, tile: int | None = None) -> NDArray[np.float32]:
        """Return the network's answer at the image's own size, ``(K, H, W)`` float32; arguments and errors as for a call.

        Of an ensemble, and of several views, it is the logarithm of the mean probabilities.
        """
        if self.is_alone:
            return _native_logits(self.runtime, self.views[0], self._fit(image), tile)
        probabilities = self.probabilities(image, tile)
        return np.log(
            np.maximum(probabilities, np.finfo(np.float32).tiny, out=probabilities),
            out=probabilities,
        )

    def _fit(self, image: Image) -> Image:
        if image.ndim == 2:
            image = image[:, :, None]
        if image.ndim != 3 or 0 in image.shape:
            raise UsageError(
                f"an image has the shape {image.shape}; give (height, width) or (height, width, bands) with at least one pixel"
            )
        return fit_bands(
            image, self.runtime.description.channels, self.runtime.description.pixels, "the image"
        )


def _native_logits(
    runtime: runtimes.Runtime, view: AugmentedView, image: Image, tile: int | None
) -> NDArray[np.float32]:
    """Return the logits ``(K, H, W)`` of one model that looks at an image in one way."""
    height, width = image.shape[:2]
    size = view.size(*runtime.description.working.of(width, height))
    pixels = view.turn(resize_image(image, size))
    tile, geometry = (
        _tiling(runtime, pixels) if tile is None else (tile, runtime.description.geometry)
    )
    logits = torch.from_numpy(
        view.turn_back(tiles.predict_tiled(pixels, runtime.run, geometry, tile))
    )
    native: NDArray[np.float32] = resize_logits(logits[None], height, width)[0].numpy()
    return native


def _tiling(runtime: runtimes.Runtime, pixels: Image) -> tuple[int, geometry.Geometry]:
    """Choose how large the windows are, 0 for one pass, and how far they overlap: exactly, unless the network sees too far for that."""
    height, width = pixels.shape[:2]
    if height * width <= MAX_SINGLE_PASS_PIXELS or not (
        tile := tiles.choose_tile(
            height, width, runtime.description.geometry, runtime.window_pixels
        )
    ):
        return 0, runtime.description.geometry
    geometry = tiles.overlap_geometry(runtime.run, pixels, runtime.description.geometry)
    return tile if geometry == runtime.description.geometry else tiles.choose_tile(
        height, width, geometry, runtime.window_pixels
    ), geometry


def _model_paths(path: Path) -> list[Path]:
    """Split ``MODEL,MODEL`` into its models; a path that is there, comma or not, is one."""
    names = [str(path)] if path.exists() else str(path).split(",")
    if not all(names):
        raise UsageError(
            f"the models '{path}' lack a name before or after a comma; give RUN, or RUN,RUN for an ensemble"
        )
    return [Path(name) for name in names]


def _check_ensemble(first: runtimes.Runtime, second: runtimes.Runtime) -> None:
    known, others = first.description.classes.names, second.description.classes.names
    if known != others:
        raise UsageError(
            f"{first.source} knows the classes {', '.join(known)}, but {second.source} knows {', '.join(others)}; "
            f"an ensemble needs models of the same classes in the same order"
        )
    takes = [
        f"{description.channels} bands of {description.pixels}"
        for description in (first.description, second.description)
    ]
    if takes[0] != takes[1]:
        raise UsageError(
            f"{first.source} takes pictures with {takes[0]}, but {second.source} {takes[1]}; an ensemble needs models of the same pictures"
        )


def resize_logits(logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bring logits (N, K, h, w) to the label's native size before the class is chosen: bilinear, in fp32.

    First rows, then columns, for which a row's pixels pose as channels that lie side by side: half the time of both at once.
    """
    if logits.shape[-2:] == (height, width):
        return logits.float()
    N, K, h, _ = logits.shape
    wide = F.interpolate(logits.float(), (h, width), mode="bilinear", align_corners=False)
    columns = wide.reshape(N * K, h, 1, width).permute(0, 3, 1, 2)
    tall = F.interpolate(columns, (height, 1), mode="bilinear", align_corners=False)
    return tall.permute(0, 2, 3, 1).reshape(N, K, height, width)


def load(model: str | Path, runtime: str | None = None, augment: str = "none") -> Predictor:
    """Load a model: a run folder, a ``model.safetensors``, or an ``.onnx`` or ``.xml`` that was exported; several make an ensemble.

    Args:
        model: where it is; ``"A,B"`` for the mean of several.
        runtime: what computes it: ``"torch"``, ``"torch-bf16"``, ``"gpu"``, ``"onnx"``, ``"openvino"``, ``"openvino-bf16"``; ``"auto"`` tries
            which is fastest; by default the one that the file is for, in fp32.
        augment: look at each image in several ways, too: ``"flip"``, ``"flips"``, ``"turns"`` or ``"scales"``.

    Returns:
        A function from image ``(H, W, C)`` to label map ``(H, W)`` uint8.

    Raises:
        UsageError: there is no model, it is damaged, or the runtime cannot run it.
    """
    return Predictor.load(model, runtime, augment=augment)


def check_same_split(*predictors: Predictor) -> None:
    """Refuse models that held out different images, as far as they say."""
    splits = [
        runtime.description.provenance.get("split", {})
        for predictor in predictors
        for runtime in predictor.runtimes
    ]
    different = [split for split in splits if split and split != splits[0]]
    if splits[0] and different:
        raise UsageError(
            f"the models were trained with different splits ({splits[0]} and {different[0]}), so that one may have seen what another is scored on; "
            f"say with --set data.split=... and data.holdout=... which images to take"
        )
