"""What people pass to a predictor (arrays, PIL images, files, tensors, batches) -> image arrays."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import PIL.Image
import torch

from useg.errors import DataError
from useg.images.files import Image, read_image

if TYPE_CHECKING:
    from useg.models.segmenter import ModelDescription

# One image, or a batch of them.
ImageLike: TypeAlias = Image | PIL.Image.Image | torch.Tensor | str | os.PathLike[str]
ImagesLike: TypeAlias = ImageLike | Sequence[ImageLike]


def split_batch(images: ImagesLike) -> list[ImageLike] | None:
    """Return the images of a batch: a list, a tuple or an array ``(N, H, W, C)``; else None."""
    if isinstance(images, list | tuple) or (
        isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4
    ):
        return list(images)
    return None


def to_image(image: ImageLike, description: ModelDescription) -> Image:
    """Convert an image to the bands and the number type that a model takes.

    Args:
        image: An array ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)``, a PyTorch tensor of such a
            shape, a PIL image, or the path of a file. Bands come first only if that is the one
            possible reading: the first size is the model's number of bands and the last is not.
            For a model of uint8 images, fractions from 0 to 1 are multiplied by 255 and rounded,
            with a warning.
        description: What the model takes.

    Returns:
        ``(H, W, C)``; the bands are not checked yet.

    Raises:
        DataError: It is no image, or it holds fractions that the model does not take.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(Path(image))
    if isinstance(image, PIL.Image.Image):
        return _from_pil(image)
    array: Image = (
        image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    )
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape:
        raise DataError(
            f"the image has the shape {array.shape}; "
            f"give (height, width) or (height, width, bands) with at least one pixel"
        )
    bands = (description.channels, 1)
    if array.shape[0] in bands and array.shape[2] not in bands:
        array = array.transpose(1, 2, 0)
    return _to_number_type(array, np.dtype(description.pixels))


def _from_pil(image: PIL.Image.Image) -> Image:
    """Return the pixels ``(H, W, C)``: a palette becomes colours, and transparency is dropped."""
    if image.mode in ("P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"):
        image = image.convert("RGB")
    elif image.mode in ("1", "LA"):
        image = image.convert("L")
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def _to_number_type(array: Image, wanted: np.dtype[Any]) -> Image:
    """Convert fractions for a model of uint8 images; the check of bands refuses other types."""
    if array.dtype == wanted:
        return np.ascontiguousarray(array)
    if array.dtype.kind != "f":
        return array
    if wanted.kind == "f":
        return array.astype(wanted)
    low, high = float(array.min()), float(array.max())
    if wanted != np.uint8 or not (low >= 0 and high <= 1):
        raise DataError(
            f"the image holds {array.dtype} values from {low:g} to {high:g}, but the model takes "
            f"{wanted}; give the stored {wanted} values"
            + (", or fractions from 0 to 1" if wanted == np.uint8 else "")
        )
    warnings.warn(
        "the image holds fractions from 0 to 1, which are multiplied by 255, because the model "
        "takes uint8",
        UserWarning,
        stacklevel=5,
    )
    scaled: Image = np.rint(array * 255).astype(wanted)
    return scaled
