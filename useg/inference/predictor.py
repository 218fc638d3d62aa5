"""Image -> prediction: working size, windows, logits, native size, label map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from useg.classes import ClassTable
from useg.data.cache import fit_bands
from useg.data.images import Image, resize_image
from useg.errors import UsageError
from useg.inference import runtimes, tiles

WHOLE_PIXELS = 1_500_000  # above this many pixels an image is predicted in windows
TILE = 1024


class Predictor:
    """A trained model as a function from image to label map.

    >>> model = Predictor.load("run")  # doctest: +SKIP
    >>> prediction = model(image)  # doctest: +SKIP
    """

    def __init__(self, runtime: runtimes.Runtime) -> None:
        self.runtime = runtime

    @classmethod
    def load(cls, path: str | Path) -> Predictor:
        """Load a run folder or a model file.

        Raises:
            UsageError: there is none or it is damaged.
        """
        return cls(runtimes.load(Path(path)))

    @property
    def classes(self) -> ClassTable:
        """The class table: what the ids in a prediction stand for."""
        return self.runtime.classes

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
        prediction: NDArray[np.uint8] = self._native_logits(image, tile).argmax(0).to(torch.uint8).numpy()
        return prediction

    def probabilities(self, image: Image, tile: int | None = None) -> NDArray[np.float32]:
        """Return each class's probability at each pixel, ``(K, H, W)`` float32, summing to 1; arguments and errors as for a call."""
        probabilities: NDArray[np.float32] = self._native_logits(image, tile).softmax(0).numpy()
        return probabilities

    def _native_logits(self, image: Image, tile: int | None) -> torch.Tensor:
        image = self._fit(image)
        height, width = image.shape[:2]
        size = self.runtime.working.of(width, height)
        if tile is None:
            tile = TILE if size[0] * size[1] > WHOLE_PIXELS else 0
        pixels = resize_image(image, size)
        logits = torch.from_numpy(tiles.predict(pixels, self.runtime.run, self.runtime.geometry, tile))
        return enlarge(logits[None], height, width)[0]

    def _fit(self, image: Image) -> Image:
        if image.ndim == 2:
            image = image[:, :, None]
        if image.ndim != 3 or 0 in image.shape:
            raise UsageError(f"an image has the shape {image.shape}; give (height, width) or (height, width, bands) with at least one pixel")
        return fit_bands(image, self.runtime.channels, self.runtime.pixels, "the image")


def enlarge(logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bring logits (N, K, h, w) to the label's native size before the class is chosen: bilinear, in fp32."""
    if logits.shape[-2:] == (height, width):
        return logits.float()
    return F.interpolate(logits.float(), (height, width), mode="bilinear", align_corners=False)
