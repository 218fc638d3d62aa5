"""Predict label maps with a trained model or an ensemble: numpy image in, class ids out.

The image is resized to the model's working size, computed in windows, and its logits are resized
to the native size before the class is chosen. Test-time augmentation and ensembles average
probabilities.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from useg.classes import IGNORE, ClassTable, Label, most_probable, softmax, take_log
from useg.errors import DataError, ModelError, choose
from useg.images.image_files import Image, image_from_pil, read_image_and_missing, resize_image
from useg.inference import runtimes, tiles
from useg.models import geometry
from useg.models.description import ModelDescription
from useg.models.geometry import convert_fractions, fit_bands

if TYPE_CHECKING:
    from useg.inference.resampling import LabelFunction, ResizeFunction
    from useg.objects.table import FoundObjects, PixelOutputs

# One image, or a batch of them.
ImageLike: TypeAlias = Image | PIL.Image.Image | torch.Tensor | str | os.PathLike[str]
ImagesLike: TypeAlias = ImageLike | Sequence[ImageLike]

# Images of up to this number of pixels are computed in one pass without estimating its memory.
MAX_SINGLE_PASS_PIXELS = 1_500_000

# A compiler is called when the logits at the size of the images are more than these: resizing so
# many without it takes about as long as the compiler.
MIN_COMPILED_LOGITS = 100_000_000


@dataclass(frozen=True)
class AugmentedView:
    """A transformation of the image for test-time augmentation; the steps happen in this order.

    Args:
        scale: Factor on the working size of the model.
        transpose: Exchange rows and columns.
        vertical_flip: Reverse the order of the rows.
        horizontal_flip: Reverse the order of the columns.
    """

    scale: float = 1.0
    transpose: bool = False
    vertical_flip: bool = False
    horizontal_flip: bool = False

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) to which an image is resized first."""
        return max(1, round(width * self.scale)), max(1, round(height * self.scale))

    def apply(self, pixels: Image) -> Image:
        """Transpose and flip an image ``(H, W, C)``."""
        pixels = pixels.transpose(1, 0, 2) if self.transpose else pixels
        return pixels[:: -1 if self.vertical_flip else 1, :: -1 if self.horizontal_flip else 1]

    def undo(self, logits: NDArray[Any]) -> NDArray[Any]:
        """Flip and transpose logits ``(K, h, w)`` back: the inverse of :meth:`apply`."""
        if not (self.transpose or self.vertical_flip or self.horizontal_flip):
            return logits
        rows, columns = (-1 if flip else 1 for flip in (self.vertical_flip, self.horizontal_flip))
        restored = logits[:, ::rows, ::columns]
        # PyTorch accepts no negative strides, so the result is copied.
        return (restored.transpose(0, 2, 1) if self.transpose else restored).copy()


_BOTH = (False, True)

AUGMENTATIONS: dict[str, tuple[AugmentedView, ...]] = {
    "none": (AugmentedView(),),
    # For street scenes: the sky stays at the top.
    "flip": (AugmentedView(), AugmentedView(horizontal_flip=True)),
    "flips": tuple(AugmentedView(1, False, *flips) for flips in product(_BOTH, _BOTH)),
    # U-Net paper, table 1: "averaged over 7 rotated versions".
    "turns": tuple(AugmentedView(1, *steps) for steps in product(_BOTH, _BOTH, _BOTH)),
    "scales": tuple(AugmentedView(scale) for scale in (0.75, 1.0, 1.25)),
}


class Predictor:
    """A trained model or an ensemble, as a function from image to label map.

    >>> model = Predictor.load("run")  # doctest: +SKIP
    >>> prediction = model(image)  # doctest: +SKIP

    Args:
        runtime: The model.
        others: Further models of an ensemble, which may have other working sizes. The class with
            the highest mean probability wins.
        augment: Test-time augmentation, one of ``AUGMENTATIONS``. ``"flip"`` adds the horizontally
            flipped image, ``"flips"`` all four flips, ``"turns"`` all eight flips and rotations,
            ``"scales"`` three sizes. The mean of the probabilities decides.

    Raises:
        SettingsError: An unknown augmentation.
        ModelError: Models with different classes, bands or number types.
    """

    def __init__(
        self, runtime: runtimes.Runtime, *others: runtimes.Runtime, augment: str = "none"
    ) -> None:
        self.views = choose("augmentation", augment, AUGMENTATIONS)
        for other in others:
            runtimes.check_ensemble(runtime, other)
        self.runtime = runtime
        self.runtimes = (runtime, *others)
        self.augment = augment
        self._num_logits = 0

    @classmethod
    def load(
        cls,
        path: str | Path,
        runtime: str | None = None,
        num_images: float = math.inf,
        augment: str = "none",
    ) -> Predictor:
        """Load a run folder or a model file, or several separated by commas as an ensemble.

        Errors are those of :func:`useg.inference.runtimes.load_runtime` and of the class.

        Args:
            path, runtime, augment: As for :func:`load`.
            num_images: About how many images will be labelled. For a few, ``"auto"`` tries nothing.
        """
        # A misspelled augmentation is refused before the model is read.
        choose("augmentation", augment, AUGMENTATIONS)
        paths = runtimes.split_model_paths(Path(path))
        if runtime == "auto":
            from useg.inference.bench import fastest_runtime

            models = (fastest_runtime(runtimes.read_model(part), num_images) for part in paths)
        else:
            models = (runtimes.load_runtime(part, runtime) for part in paths)
        return cls(*models, augment=augment)

    @property
    def classes(self) -> ClassTable:
        """The class table: the meaning of the ids in a prediction."""
        return self.runtime.description.classes

    @property
    def num_bands(self) -> int:
        """Bands of the images that the model takes."""
        return self.runtime.description.channels

    @property
    def is_single(self) -> bool:
        """Whether this is one model without augmentation, so that ``runtime`` computes it all."""
        return len(self.runtimes) == len(self.views) == 1

    @property
    def name(self) -> str:
        """Name for reports: the model files, and the augmentation."""
        sources = ", ".join(str(runtime.source) for runtime in self.runtimes)
        return sources if self.augment == "none" else f"{sources} ({self.augment})"

    @property
    def temperature(self) -> float:
        """Divisor of :meth:`logits` before softmax; 1 if they are logarithms of probabilities."""
        return self.runtime.description.temperature if self.is_single else 1.0

    def __call__(self, image: ImagesLike, tile: int | None = None) -> NDArray[np.uint8]:
        """Predict the class of every pixel.

        Args:
            image: ``(H, W, C)`` or ``(H, W)``, with the bands and the number type of the training
                images. A colour model accepts grey images. PyTorch tensors, ``(C, H, W)`` where
                only that is possible, PIL images and paths of files are accepted too. For a model
                of uint8 images, fractions from 0 to 1 are multiplied by 255, with a warning. A
                list or an array ``(N, H, W, C)`` is a batch of images of one size.
            tile: None chooses the window size, 0 forces one pass, another number forces windows of
                about that side.

        Returns:
            Label map ``(H, W)`` uint8: class ids, and 255 where a file says that it has no data;
            ``(N, H, W)`` for a batch.

        Raises:
            DataError: The bands or the number type of the image are not those of the model.
        """
        if (batch := _split_batch(image)) is not None:
            return _stack([self(one, tile) for one in batch])
        if isinstance(image, str | os.PathLike):
            pixels, missing = read_image_and_missing(Path(image))
            label = self(pixels, tile)
            return label if missing is None else np.where(missing, np.uint8(IGNORE), label)
        if not self.is_single:
            return most_probable(self.logits(image, tile))
        pixels = self._check_image(image)
        self._num_logits += len(self.classes) * pixels[..., 0].size
        resize, choose_classes = _find_resampling(self._num_logits)
        logits = _working_outputs(self.runtime, self.views[0], pixels, tile, resize)
        return choose_classes(logits[: len(self.classes)], *pixels.shape[:2])

    def probabilities(self, image: ImagesLike, tile: int | None = None) -> NDArray[np.float32]:
        """Return class probabilities ``(K, H, W)`` float32, which sum to 1 at each pixel.

        They are calibrated: the logits are divided by the model's temperature, which changes no
        label map. Of pixels with 80 %, about 80 % are right on images like the held-out ones.
        Ensembles and augmentation give the mean. Arguments and errors are those of a call.
        """
        if (batch := _split_batch(image)) is not None:
            return _stack([self.probabilities(one, tile) for one in batch])
        pixels, of_classes = self._check_image(image), slice(len(self.classes))
        return self.mean_probabilities(
            lambda runtime, view: _native_outputs(runtime, view, pixels, tile, of_classes)
        )

    def mean_probabilities(
        self, logits: Callable[[runtimes.Runtime, AugmentedView], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Return the mean probabilities ``(K, H, W)`` of the logits of all models and views."""
        mean: NDArray[np.float32] | None = None
        for runtime, view in product(self.runtimes, self.views):
            part = softmax(logits(runtime, view), runtime.description.temperature)
            mean = part if mean is None else np.add(mean, part, out=mean)
        assert mean is not None
        mean /= len(self.runtimes) * len(self.views)
        return mean

    def logits(self, image: ImagesLike, tile: int | None = None) -> NDArray[np.float32]:
        """Return logits ``(K, H, W)`` float32 at the size of the image.

        Ensembles and augmentation give the logarithm of the mean probabilities. Arguments and
        errors are those of a call.
        """
        if (batch := _split_batch(image)) is not None:
            return _stack([self.logits(one, tile) for one in batch])
        if self.is_single:
            pixels, of_classes = self._check_image(image), slice(len(self.classes))
            return _native_outputs(self.runtime, self.views[0], pixels, tile, of_classes)
        return take_log(self.probabilities(image, tile))

    def training_distance(self, image: ImageLike) -> float | None:
        """Return how much an image differs from the training images; above 1 is unusual.

        About 3 % of the images held out in training are above 1. The distance compares brightness,
        contrast, colours and sharpness, not content (:mod:`useg.models.description`).

        Returns:
            The distance; None for a model of an earlier version, which did not store how its
            training images look.

        Raises:
            DataError: The bands or the number type of the image are not those of the model.
        """
        description = self.runtime.description
        if description.training_images is None:
            return None
        return description.training_distance(self._check_image(image))

    @property
    def object_classes(self) -> tuple[int, ...]:
        """The classes whose objects are separated; if not known, all but the background."""
        if self.classes.objects is not None:
            return self.classes.objects
        return tuple(k for k, name in enumerate(self.classes.names) if name != "background")

    @property
    def has_objects(self) -> bool:
        """Whether the model has learned to keep touching objects apart."""
        return all(runtime.description.has_objects for runtime in self.runtimes)

    @property
    def min_object_pixels(self) -> int:
        """The minimum number of pixels of an object; 0 if the model has not learned objects."""
        return self.min_pixels_at(1.0)

    def min_pixels_at(self, scale: float) -> int:
        """Return this minimum for an image that is best computed at ``scale``."""
        return min(runtime.description.min_pixels_at(scale) for runtime in self.runtimes)

    @property
    def object_side(self) -> float:
        """Side of a typical object in the training images, in pixels; 0 if no scale is better."""
        return min(runtime.description.object_side for runtime in self.runtimes)

    def are_objects_larger(self, scale: float) -> bool:
        """Whether an image that is best computed at ``scale`` has larger objects than training."""
        return all(runtime.description.are_objects_larger(scale) for runtime in self.runtimes)

    @property
    def enlarged_biases(self) -> NDArray[np.float32]:
        """What is added to the logits of the classes ``(K,)`` in images that are enlarged."""
        biases = [runtime.description.enlarged_biases for runtime in self.runtimes]
        return np.asarray(np.mean(biases, 0), np.float32)

    def objects(self, image: ImageLike, tile: int | None = None) -> FoundObjects:
        """Find the objects of an image, such as cells, and keep those apart that touch.

        A model learns this from masks that distinguish objects. For other models, each connected
        region of a class is one object; ``kept_apart`` of the result says which of the two
        applies. The background and the classes that ``classes.toml`` excludes have no objects.
        Regions much smaller than the objects in the training images do not count.

        Args:
            image: One image, as for a call.
            tile: As for a call; the objects are the same.

        Returns:
            Numbers ``(H, W)`` uint32, 0 for none, and a table of the objects.

        Raises:
            DataError: As for a call.
        """
        from useg.objects.table import find_objects

        return find_objects(self.pixel_outputs(image, tile), self.object_classes, self.temperature)

    def pixel_outputs(self, image: ImageLike, tile: int | None = None) -> PixelOutputs:
        """Return :meth:`logits`, and the logits of the depth if the model computes them.

        Ensembles and augmentation give the mean of the depth's logits. If objects are larger or
        smaller than in training, the image is computed again, resized so that they have the size of
        the training objects. Arguments and errors are those of a call.
        """
        from useg.objects.table import PixelOutputs

        if not self.has_objects:
            return PixelOutputs(self.logits(image, tile))
        return _outputs_with_depth(self, self._check_image(image), tile)

    def _check_image(self, image: Any) -> Image:
        """Return an image with the bands that the model takes."""
        description = self.runtime.description
        return fit_bands(
            _to_image(image, description), description.channels, description.pixels, "the image"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the paths of the models: each process loads them itself."""
        return _load_pickled, (tuple(map(_pickle_runtime, self.runtimes)), self.augment)


def _pickle_runtime(runtime: runtimes.Runtime) -> tuple[Path, str, ModelDescription]:
    """Return what identifies a model, and refuse one that has no file."""
    if not runtime.source.exists():
        raise ModelError(
            f"the predictor cannot be pickled, because {runtime.source} does not exist; "
            "save the model to a file and load it"
        )
    return runtime.source.absolute(), runtime.name, runtime.description


def _load_pickled(
    models: tuple[tuple[Path, str, ModelDescription], ...], augment: str
) -> Predictor:
    """Load the models of a pickled predictor, and refuse files that have changed since."""
    loaded = []
    for source, name, description in models:
        runtime = runtimes.load_runtime(source, name)
        if runtime.description != description:
            raise ModelError(f"{source} has changed since the predictor was pickled; load it again")
        loaded.append(runtime)
    return Predictor(*loaded, augment=augment)


def _stack(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """Join the results of a batch."""
    sizes = {part.shape[-2:] for part in parts}
    if len(sizes) != 1:
        what = " and ".join(f"{w}x{h}" for h, w in sorted(sizes)) or "no image"
        raise DataError(f"a batch holds {what}; give images of one size, or one call per image")
    return np.stack(parts)


def load(
    model: str | os.PathLike[str], runtime: str | None = None, augment: str = "none"
) -> Predictor:
    """Load a model.

    Args:
        model: A run folder, the ``Run`` that :func:`useg.train` returns, a ``model.safetensors``,
            or an ``.onnx`` or ``.xml`` that ``useg export`` wrote; ``"A,B"`` for an ensemble.
        runtime: What computes it: ``"torch"``, ``"torch-bf16"``, ``"gpu"``, ``"onnx"``,
            ``"openvino"`` or ``"openvino-bf16"``. ``"auto"`` measures which is fastest. By default
            the GPU if there is one, else the runtime that the file was made for, in fp32.
        augment: Test-time augmentation: ``"flip"``, ``"flips"``, ``"turns"`` or ``"scales"``.

    Returns:
        A function from image ``(H, W, C)`` to label map ``(H, W)`` uint8.

    Raises:
        UsageError: There is no model, it is damaged, or the runtime cannot compute it.
    """
    return Predictor.load(Path(model), runtime, augment=augment)


def _split_batch(images: ImagesLike) -> list[ImageLike] | None:
    """Return the images of a batch: a list, a tuple or an array ``(N, H, W, C)``; else None."""
    if isinstance(images, list | tuple) or (
        isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4
    ):
        return list(images)
    return None


def _to_image(image: ImageLike, description: ModelDescription) -> Image:
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
        DataError: It is not an image, or it holds fractions that the model does not take.
    """
    if isinstance(image, str | os.PathLike):
        return read_image_and_missing(Path(image))[0]
    if isinstance(image, PIL.Image.Image):
        return image_from_pil(image)
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
    wanted = np.dtype(description.pixels)
    if array.dtype == wanted:
        return np.ascontiguousarray(array)
    return convert_fractions(array, wanted)


def _native_outputs(
    runtime: runtimes.Runtime,
    view: AugmentedView,
    image: Image,
    tile: int | None,
    which: slice = slice(None),
) -> NDArray[np.float32]:
    """Return the logits ``(K, H, W)`` of one model for one view of an image.

    ``which`` of the outputs are wanted: the classes come first, then what tells objects apart.
    """
    logits = _working_outputs(runtime, view, image, tile)[which]
    resized = resize_logits(torch.from_numpy(logits)[None], *image.shape[:2])
    native: NDArray[np.float32] = resized[0].numpy()
    return native


def _find_resampling(num_logits: int) -> tuple[ResizeFunction, LabelFunction]:
    """Return the functions that resize images and label logits; after many logits compiled ones."""
    if num_logits <= MIN_COMPILED_LOGITS:
        return resize_image, _label_resized
    from useg.inference.resampling import label_compiled, resize_compiled

    return (
        partial(resize_compiled, reference=resize_image),
        partial(label_compiled, reference=_label_resized),
    )


def _label_resized(logits: NDArray[np.float32], height: int, width: int) -> Label:
    """Return the most probable classes of logits ``(K, h, w)`` at another size."""
    resized = resize_logits(torch.from_numpy(logits)[None], height, width)
    return most_probable(resized[0].numpy())


def _working_outputs(
    runtime: runtimes.Runtime,
    view: AugmentedView,
    image: Image,
    tile: int | None,
    resize: ResizeFunction = resize_image,
) -> NDArray[np.float32]:
    """Return all logits of one model for one view of an image, at the size that it computes."""
    working, (height, width) = runtime.description.working, image.shape[:2]
    pixels = view.apply(working.prepare(image, view.size(*working.of(width, height)), resize))
    network_geometry = runtime.description.geometry
    if tile is None:
        tile, network_geometry = _choose_windows(runtime, pixels)
    return view.undo(tiles.predict_tiled(pixels, runtime.run, network_geometry, tile))


def _outputs_with_depth(predictor: Predictor, image: Image, tile: int | None) -> PixelOutputs:
    """Return what a model that has learned to keep objects apart computes for an image."""
    from useg.objects.table import PixelOutputs, refine_outputs

    K = len(predictor.classes)

    def compute(scale: float) -> PixelOutputs:
        depths: list[NDArray[np.float32]] = []

        def class_logits(runtime: runtimes.Runtime, view: AugmentedView) -> NDArray[np.float32]:
            scaled = replace(view, scale=scale * view.scale)
            outputs = _native_outputs(runtime, scaled, image, tile)
            # A view would keep all outputs in memory.
            depths.append(outputs[K].copy())
            return outputs[:K]

        if predictor.is_single:
            logits = class_logits(predictor.runtime, predictor.views[0])
        else:
            logits = take_log(predictor.mean_probabilities(class_logits))
        depth, side = np.mean(depths, 0), predictor.object_side / scale
        are_larger = predictor.are_objects_larger(scale)
        return PixelOutputs(logits, depth, predictor.min_pixels_at(scale), side, are_larger)

    outputs = compute(1.0)
    if not predictor.object_side:
        return outputs
    return refine_outputs(
        outputs,
        compute,
        predictor.object_classes,
        predictor.object_side,
        predictor.enlarged_biases,
        predictor.temperature,
    )


def _choose_windows(runtime: runtimes.Runtime, pixels: Image) -> tuple[int, geometry.Geometry]:
    """Choose the side of the windows, 0 for one pass, and how far they overlap.

    The overlap is exact unless the receptive field is too large for that.
    """
    height, width = pixels.shape[:2]
    exact = runtime.description.geometry
    if height * width <= MAX_SINGLE_PASS_PIXELS:
        return 0, exact
    tile = tiles.choose_tile(height, width, exact, runtime.window_pixels)
    if not tile:
        return 0, exact
    measured = tiles.overlap_geometry(runtime.class_logits, pixels, exact)
    if measured != exact:
        tile = tiles.choose_tile(height, width, measured, runtime.window_pixels)
    return tile, measured


def resize_logits(logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize logits ``(N, K, h, w)`` bilinearly, in fp32.

    Columns are resized first, then rows, with the pixels of a row as channels: this takes half the
    time of both at once.
    """
    if logits.shape[-2:] == (height, width):
        return logits.float()
    N, K, h, _ = logits.shape
    if K > 1 and height * width > MAX_SINGLE_PASS_PIXELS:
        # One class at a time gives the same numbers and takes a third of the memory.
        resized = logits.new_empty((N, K, height, width), dtype=torch.float32)
        for k in range(K):
            resized[:, k : k + 1] = resize_logits(logits[:, k : k + 1], height, width)
        return resized
    wide = F.interpolate(logits.float(), (h, width), mode="bilinear", align_corners=False)
    columns = wide.reshape(N * K, h, 1, width).permute(0, 3, 1, 2)
    tall = F.interpolate(columns, (height, 1), mode="bilinear", align_corners=False)
    return tall.permute(0, 2, 3, 1).reshape(N, K, height, width)
