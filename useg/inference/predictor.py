"""Image -> prediction: working size, windows, logits, native size, label map."""

from __future__ import annotations

import math
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
from useg.scoring.answers import most_probable, softmax

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
    def load(cls, path: str | Path, runtime: str | None = None, pictures: float = math.inf) -> Predictor:
        """Load a run folder or a model file; arguments and errors as for :func:`useg.inference.runtimes.load`."""
        return cls(runtimes.load(Path(path), runtime, pictures))

    @property
    def classes(self) -> ClassTable:
        """The class table: what the ids in a prediction stand for."""
        return self.runtime.card.classes

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
        on pictures like those held out in training.
        """
        return softmax(self.logits(image, tile), self.runtime.card.temperature)

    def logits(self, image: Image, tile: int | None = None) -> NDArray[np.float32]:
        """Return the network's answer at the image's own size, ``(K, H, W)`` float32; arguments and errors as for a call."""
        image = self._fit(image)
        height, width = image.shape[:2]
        size = self.runtime.card.working.of(width, height)
        if tile is None:
            tile = TILE if size[0] * size[1] > WHOLE_PIXELS else 0
        pixels = resize_image(image, size)
        logits = torch.from_numpy(tiles.predict(pixels, self.runtime.run, self.runtime.card.geometry, tile))
        native: NDArray[np.float32] = enlarge(logits[None], height, width)[0].numpy()
        return native

    def _fit(self, image: Image) -> Image:
        if image.ndim == 2:
            image = image[:, :, None]
        if image.ndim != 3 or 0 in image.shape:
            raise UsageError(f"an image has the shape {image.shape}; give (height, width) or (height, width, bands) with at least one pixel")
        return fit_bands(image, self.runtime.card.channels, self.runtime.card.pixels, "the image")


def enlarge(logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bring logits (N, K, h, w) to the label's native size before the class is chosen: bilinear, in fp32."""
    if logits.shape[-2:] == (height, width):
        return logits.float()
    return F.interpolate(logits.float(), (height, width), mode="bilinear", align_corners=False)
