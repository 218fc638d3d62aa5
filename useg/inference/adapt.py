"""A model and unlabelled images -> the model with some of these images' batch statistics.

Batch normalisation keeps the mean and the variance of every feature over the training images. In
another light, season or laboratory they are others. Some of the new statistics, mixed into the old
ones, often brings scores back (Schneider and others 2020, section 3). How much to mix is measured
without labels: the model should give the same answer for an image and for augmented views of it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from useg.data.dataset import pick_evenly
from useg.errors import DataError, ModelError, UsageError, format_count
from useg.files import locked_folder, make_folder
from useg.images.image_files import read_image
from useg.inference.predict_files import find_images
from useg.models.geometry import fit_bands, output_size, reflect_indices
from useg.models.segmenter import (
    MODEL_NAME,
    Segmenter,
    load_model,
    read_model_provenance,
    save_model,
)
from useg.ownership import is_own_model, refuse_foreign_files
from useg.parsing import printable

# Shares of the new statistics that are tried.
SHARES = (0.2, 0.4, 0.6)

# Pictures whose statistics are used, and of these how many are predicted to compare shares.
MAX_PICTURES = 64
MAX_COMPARED = 16
# The statistics of fewer images are those of a few places.
_MIN_PICTURES = 4

# Of larger images, the middle is used: pixels per side, at the working size.
MAX_SIDE = 512

# A share is used if the views agree on this much more of the pixels than without, and if the
# variety of the predicted classes (the entropy of their shares) stays nearly as large.
MIN_AGREEMENT_GAIN = 0.002
MIN_VARIETY = 0.9

_STANDARDIZED = (
    "the model stays as it is: it already gives all images the same brightness and contrast "
    "(data.standardize), and new statistics did not improve such models. Label about ten of the "
    "images, and start a training from this model"
)

# Contrast and brightness of the augmented views; the first is flipped too.
VIEWS = ((1.0, 0.0, True), (0.8, 0.15, False), (1.25, -0.15, False))


@dataclass(frozen=True)
class Adaptation:
    """The result of an adaptation.

    Args:
        share: Share of the new statistics, 0 to 1; 0 for the unchanged model.
        agreement: For each share that was tried, the share of pixels on which the predictions for
            augmented views agree, 0 to 1.
        variety: For each share, the entropy of the predicted classes' shares, in nats.
        num_pictures: Images whose statistics were computed.
        reason: Why this share, in a sentence.
    """

    share: float
    agreement: dict[float, float]
    variety: dict[float, float]
    num_pictures: int
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "share": self.share,
            "tried": [
                {"share": share, "agreement": self.agreement[share], "variety": variety}
                for share, variety in self.variety.items()
            ],
            "num_pictures": self.num_pictures,
            "reason": self.reason,
        }


def adapt(
    model: str | os.PathLike[str],
    pictures: str | os.PathLike[str],
    out: str | Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Adaptation:
    """Adapt the batch normalisation statistics of a model to images without masks.

    Source: Schneider and others (2020), section 3.

    Args:
        model: A run folder or a ``model.safetensors``.
        pictures: A folder, a file or a glob of images; 4 or more.
        out: Folder for the new ``model.safetensors``. If no share is better, the unchanged model is
            written there.
        progress: Called with (shares tried, shares in all).

    Returns:
        The share of the new statistics that was mixed in, and why.

    Raises:
        ModelError: There is no such model, or it has no batch normalisation.
        DataError: There are too few pictures, or they do not fit the model.
        UsageError: ``out`` cannot be written, or contains a model that this did not write.

    Example:
        >>> import useg
        >>> useg.adapt("run", "new_street", "adapted").share  # doctest: +SKIP
        0.4
    """
    source, out = load_model(Path(model)), Path(out)
    target = out / MODEL_NAME
    if os.path.realpath(out) == os.path.realpath(Path(model)) or (out / "run.toml").exists():
        raise UsageError(f"{out} contains a run; choose another folder for the output")
    refuse_foreign_files([(target, is_own_model)])
    if target.exists():
        _refuse_other_model(target, Path(model))
    if not any(isinstance(layer, nn.BatchNorm2d) for layer in source.modules()):
        raise ModelError(
            f"{os.fspath(model)} has no batch normalisation, so there are no statistics to adapt; "
            "label a few of the images and train from that model"
        )
    images = _read_pictures(source, pictures)
    adapted, result = choose_share(source, images, progress)
    adapted.provenance = {
        **source.provenance,
        "adapted": {
            "share": result.share,
            "num_pictures": result.num_pictures,
            "pictures": printable(Path(pictures).name),
        },
    }
    make_folder(out)
    with locked_folder(out):
        save_model(adapted, target)
    return result


def _refuse_other_model(target: Path, model: Path) -> None:
    """Refuse to replace the model itself, or one that was trained."""
    if os.path.realpath(target) == os.path.realpath(model):
        raise UsageError(f"{target} is the model itself; choose another folder for the output")
    if "adapted" not in read_model_provenance(target):
        raise UsageError(
            f"{target} is a model that useg adapt did not write; choose another folder for the "
            "output"
        )


def choose_share(
    source: Segmenter,
    images: Sequence[Tensor],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Segmenter, Adaptation]:
    """Return the model with the share of new statistics that a measurement without labels chooses.

    Args:
        source: The model.
        images: Raw pixels ``(1, C, H, W)`` of sizes that the network takes.
        progress: Called with (shares tried, shares in all).

    A model whose images have the same brightness and contrast stays as it is: of nine such models,
    eight chose no share, and one chose a share that made it worse (``docs/new_images.md``).
    """
    if source.working.standardize:
        return source, Adaptation(0.0, {}, {}, len(images), _STANDARDIZED)
    compared = pick_evenly(images, MAX_COMPARED)
    models = {0.0: source}
    agreement, variety = {}, {}
    agreement[0.0], variety[0.0] = measure_agreement(source, compared)
    for done, share in enumerate(SHARES, 1):
        models[share] = mix_statistics(source, images, share)
        agreement[share], variety[share] = measure_agreement(models[share], compared)
        progress(done, len(SHARES))
    allowed = [share for share in models if variety[share] >= MIN_VARIETY * variety[0.0]]
    best = max(allowed, key=lambda share: agreement[share])
    gain = agreement[best] - agreement[0.0]
    if gain < MIN_AGREEMENT_GAIN:
        best = 0.0
    reason = _explain(best, agreement, allowed)
    return models[best], Adaptation(best, agreement, variety, len(images), reason)


def _explain(best: float, agreement: dict[float, float], allowed: Sequence[float]) -> str:
    before = 100 * agreement[0.0]
    if best:
        return (
            f"with {100 * best:.0f} % of the new statistics blended in, the predictions for "
            f"augmented views of an image agree on {100 * agreement[best]:.1f} % of the pixels; "
            f"without them, on {before:.1f} %"
        )
    if len(allowed) == 1:
        return "the model stays as it is: the new statistics would make it predict fewer classes"
    return (
        "the model stays as it is: the predictions for augmented views of an image agree "
        f"on {before:.1f} % of the pixels, and the new statistics do not improve this"
    )


def _read_pictures(model: Segmenter, pictures: str | os.PathLike[str]) -> list[Tensor]:
    """Read images at the working size, mirrored up to sizes that the network takes."""
    paths = pick_evenly(find_images([os.fspath(pictures)]), MAX_PICTURES)
    if len(paths) < _MIN_PICTURES:
        raise DataError(
            f"{os.fspath(pictures)} has {format_count(len(paths), 'image')}, but batch statistics "
            f"need {_MIN_PICTURES} or more; add images of the same kind"
        )
    images = []
    for path in paths:
        image = fit_bands(read_image(path), model.channels, model.pixels, str(path))
        images.append(to_input(model, model.working.prepare(image)))
    return images


def to_input(model: Segmenter, image: NDArray[Any]) -> Tensor:
    """Return the middle of an image ``(H, W, C)`` as input of the network ``(1, C, H', W')``."""
    height, width = (min(side, MAX_SIDE) for side in image.shape[:2])
    sizes = output_size(model, (width, height))
    indices = []
    for length, inner, wanted in (
        (image.shape[0], height, sizes[1]),
        (image.shape[1], width, sizes[0]),
    ):
        first = (length - inner) // 2
        positions = np.arange(first - model.margin, first + wanted + model.margin)
        indices.append(reflect_indices(positions, length))
    pixels = image[indices[0]][:, indices[1]].astype(np.float32)
    return torch.from_numpy(pixels.transpose(2, 0, 1)[None])


@dataclass
class _Sums:
    """Sums of a layer's inputs over images, per channel."""

    count: float = 0.0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0


@dataclass
class _Layer:
    """A layer of batch normalisation, with the statistics of the training."""

    layer: nn.BatchNorm2d
    share: float
    sums: _Sums = field(default_factory=_Sums)

    def __post_init__(self) -> None:
        mean, var = self.layer.running_mean, self.layer.running_var
        assert mean is not None
        assert var is not None
        self.mean, self.var = mean.clone(), var.clone()

    def observe(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Mix the statistics of all inputs so far into those of the training."""
        x = inputs[0].double()
        self.sums.count += x.numel() / x.shape[1]
        self.sums.total = self.sums.total + x.sum((0, 2, 3))
        self.sums.squares = self.sums.squares + (x**2).sum((0, 2, 3))
        mean = self.sums.total / self.sums.count
        var = torch.as_tensor(self.sums.squares / self.sums.count - mean**2).clamp(min=0)
        for buffer, old, new in (
            (self.layer.running_mean, self.mean, mean),
            (self.layer.running_var, self.var, var),
        ):
            assert buffer is not None
            buffer.copy_((1 - self.share) * old + self.share * torch.as_tensor(new).to(old.dtype))


def mix_statistics(source: Segmenter, images: Sequence[Tensor], share: float) -> Segmenter:
    """Return a copy of a model whose batch statistics are mixed with those of images.

    Args:
        source: The model.
        images: Raw pixels ``(1, C, H, W)``.
        share: Share of the new statistics, 0 to 1.
    """
    model = copy.deepcopy(source).eval()
    with _observing(model, share), torch.inference_mode():
        for image in images:
            model(image)
    return model


@contextmanager
def _observing(model: Segmenter, share: float) -> Iterator[None]:
    layers = [_Layer(each, share) for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    hooks = [each.layer.register_forward_pre_hook(each.observe) for each in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def measure_agreement(model: Segmenter, images: Sequence[Tensor]) -> tuple[float, float]:
    """Return on which share of the pixels all views agree, and the entropy of the classes' shares.

    Args:
        model: The model.
        images: Raw pixels ``(1, C, H, W)``.
    """
    model.eval()
    num_classes = len(model.classes)
    same = total = 0
    counts = torch.zeros(num_classes)
    with torch.inference_mode():
        for image in images:
            # What tells objects apart follows the classes.
            plain = model(image)[0, :num_classes].argmax(0)
            agreed = torch.ones_like(plain, dtype=torch.bool)
            for contrast, brightness, flip in VIEWS:
                view = (image - model.mean) * contrast + model.mean + brightness * model.std
                logits = model(view.flip(3) if flip else view)[0, :num_classes]
                label = logits.argmax(0)
                agreed &= (label.flip(1) if flip else label) == plain
            same, total = same + int(agreed.sum()), total + plain.numel()
            counts += torch.bincount(plain.flatten(), minlength=num_classes)
    shares = counts / counts.sum()
    entropy = float(-(shares * shares.clamp(min=1e-12).log()).sum())
    return same / total, entropy
