"""The ways in which test-time augmentation looks at a picture <-> the answers, brought back to how the picture lies."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from numpy.typing import NDArray

from useg.data.images import Image


@dataclass(frozen=True)
class View:
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
        return turned.copy() if self.transposed or self.upside_down or self.mirrored else logits  # torch takes no negative strides


_BOTH = (False, True)

AUGMENTATIONS: dict[str, tuple[View, ...]] = {
    "none": (View(),),
    "flip": (View(), View(mirrored=True)),  # street scenes: the sky stays above
    "flips": tuple(View(upside_down=a, mirrored=b) for a, b in product(_BOTH, _BOTH)),
    "turns": tuple(View(1, *turns) for turns in product(_BOTH, _BOTH, _BOTH)),  # U-Net paper, table 1: "averaged over 7 rotated versions"
    "scales": tuple(View(scale) for scale in (0.75, 1.0, 1.25)),
}
