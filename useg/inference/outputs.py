"""An image's prediction -> the files that somebody asked for; the label map comes last, so that where it is, all of them are."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from useg.classes import ClassTable, Label, palette
from useg.data.georeference import Place
from useg.data.images import Image, write_label, write_picture
from useg.data.png import has_mark
from useg.data.shapes import BACKGROUND
from useg.data.zarr_labels import mark_of
from useg.data.zarrs import SUFFIX
from useg.errors import UsageError, choose
from useg.files import make_folder, replacing
from useg.inference.polygons import to_geojson, to_polygons
from useg.inference.predictor import Predictor
from useg.inference.tidy import tidy
from useg.pictures import overlay, to_picture, with_legend
from useg.scoring.answers import most_probable, softmax

Probabilities = NDArray[np.float32]  # (K, H, W)

_LABELS = {"png": ".png", "tif": ".tif"}
SOFTWARE = 305  # the tag of a TIFF that says what made it
_GDAL_METADATA = 42112  # XML of GDAL's own: the one place where it and QGIS look for the names of bands


@dataclass(frozen=True)
class Wanted:
    """What is written of every image, and of all together. By default: label maps as PNG, and overlays.

    Args:
        labels: form of the label maps, ``STEM.png`` or ``STEM.tif``; both with the classes' colours as palette.
        overlays: ``overlays/STEM.png``.
        probabilities: ``probabilities/STEM.tif`` with a band for each class, as ``"uint8"`` (255 is 1) or ``"float16"``; None: not written.
        confidence: ``confidence/STEM.png`` (uint8, 255 is 1) or ``.tif`` (float32): the probability of the most probable class; None: not written.
        polygons: ``polygons/STEM.geojson``: each region that is not of the class ``background``.
        coco: one ``coco.json`` for all images.
        areas: one ``areas.csv`` for all images.
        min_region: regions of fewer pixels take the class around them (:mod:`useg.inference.tidy`); probabilities stay what they are.
        max_hole: holes of fewer pixels are filled.

    Raises:
        UsageError: a form that is not known, or a negative number of pixels.
    """

    labels: str = "png"
    overlays: bool = True
    probabilities: str | None = None
    confidence: str | None = None
    polygons: bool = False
    coco: bool = False
    areas: bool = False
    min_region: int = 0
    max_hole: int = 0

    def __post_init__(self) -> None:
        choose("the form of label maps", self.labels, _LABELS)
        if self.probabilities is not None:
            choose("the form of probabilities", self.probabilities, _BANDS)
        if self.confidence is not None:
            choose("the form of confidence maps", self.confidence, _CONFIDENCE)
        for what, pixels in (("the smallest region", self.min_region), ("the largest hole", self.max_hole)):
            if pixels < 0:
                raise UsageError(f"{what} is {pixels} pixels, but it cannot be negative; 0 leaves label maps as they are")

    @property
    def only_labels(self) -> bool:
        """Whether nothing but label maps and overlays is written, and these as the model said."""
        return self == Wanted(self.labels, self.overlays)

    @property
    def of_each(self) -> str:
        """What is written of every image, as a text: two jobs that say the same write the same files, but for those of all images together."""
        return repr(replace(self, coco=False, areas=False))

    @property
    def needs_probabilities(self) -> bool:
        """Whether label maps alone do not do."""
        return self.probabilities is not None or self.confidence is not None


def label_path(out: Path, stem: str, wanted: Wanted) -> Path:
    """Return where the label map of an image goes."""
    return out / f"{stem}{_LABELS[wanted.labels]}"


def make_folders(out: Path, wanted: Wanted) -> None:
    """Make the folders that outputs go to.

    Raises:
        UsageError: one of them cannot be written.
    """
    asked = {"overlays": wanted.overlays, "probabilities": wanted.probabilities, "confidence": wanted.confidence, "polygons": wanted.polygons}
    for folder in (out, *(out / name for name, wish in asked.items() if wish)):
        make_folder(folder)


def answer(predictor: Predictor, image: Image, wanted: Wanted, tile: int | None = None) -> tuple[Label, Probabilities | None]:
    """Return an image's label map ``(H, W)``, and its probabilities ``(K, H, W)`` where they are needed; else as a call of the predictor."""
    if not wanted.needs_probabilities:
        return predictor(image, tile), None
    logits = predictor.logits(image, tile)
    return most_probable(logits), softmax(logits, predictor.temperature)


def write_outputs(
    out: Path,
    stem: str,
    image: Image,
    prediction: Label,
    probabilities: Probabilities | None,
    table: ClassTable,
    wanted: Wanted,
    *,
    place: Place | None = None,
    mark: str = "",
) -> Path:
    """Write all that is wanted of one image into the folders that :func:`make_folders` made, each file whole or not at all.

    Args:
        out: the folder for label maps.
        stem: name of the files, without suffix.
        image: as read, for the overlay.
        prediction: label map ``(H, W)``; it is tidied here.
        probabilities: ``(K, H, W)``, needed when ``wanted.needs_probabilities``.
        table: the classes.
        wanted: what to write.
        place: where the image lies on a map: polygons are in its coordinates, and TIFFs carry its tags.
        mark: ASCII text in the label map, for :func:`is_done`.

    Returns:
        The label map.

    Raises:
        UsageError: a file cannot be written.
    """
    label = tidy(prediction, wanted.min_region, wanted.max_hole)
    if wanted.overlays:
        write_picture(out / "overlays" / f"{stem}.png", with_legend(overlay(to_picture(image), label, table), label, table))
    if wanted.needs_probabilities:
        assert probabilities is not None
        if wanted.probabilities:
            _write_bands(out / "probabilities" / f"{stem}.tif", _BANDS[wanted.probabilities](probabilities), table.names, place)
        if wanted.confidence:
            _CONFIDENCE[wanted.confidence](out / "confidence" / f"{stem}.{wanted.confidence}", probabilities.max(0), place)
    if wanted.polygons:
        found = (polygon for polygon in to_polygons(label) if table.names[polygon.value] != BACKGROUND)
        with replacing(out / "polygons" / f"{stem}.geojson") as temporary:
            temporary.write_text(json.dumps(to_geojson(found, table, place), separators=(",", ":")), "utf-8")
    target = label_path(out, stem, wanted)
    if wanted.labels == "png":
        write_label(target, label, table, mark)
    else:
        _write_tiff(target, label, place, photometric="palette", colormap=palette(table).T.astype(np.uint16) * 257, software=marked(mark))
    return target


def is_done(target: Path, mark: str) -> bool:
    """Say whether a label map is there that was written with this mark; its pixels are not read."""
    if target.suffix == SUFFIX:
        return mark_of(target) == mark != ""
    if target.suffix == ".png" or not mark:
        return has_mark(target, mark)
    import tifffile

    try:
        with tifffile.TiffFile(target) as file:
            return bool(file.pages.first.tags.valueof(SOFTWARE) == marked(mark))
    except (OSError, ValueError, IndexError, struct.error):  # tifffile's own error is a ValueError
        return False


def marked(mark: str) -> str:
    """Return what a TIFF says in its tag ``SOFTWARE``."""
    return f"useg {mark}"


def _write_bands(path: Path, bands: NDArray[Any], names: tuple[str, ...], place: Place | None) -> None:
    """Write ``(K, H, W)`` as a TIFF whose bands have names: as JSON in ImageDescription, and as GDAL keeps them."""
    description = json.dumps({"bands": names, "one": 255 if bands.dtype == np.uint8 else 1})
    escaped = [escape(escape(name)) for name in names]  # GDAL undoes it twice
    items = "".join(f'<Item name="DESCRIPTION" sample="{k}" role="description">{name}</Item>' for k, name in enumerate(escaped))
    tags = [(_GDAL_METADATA, "s", 0, f"<GDALMetadata>{items}</GDALMetadata>".encode(), True)]
    _write_tiff(path, bands, place, tags, photometric="minisblack", planarconfig="separate" if len(bands) > 1 else None, description=description)


def _write_tiff(path: Path, pixels: NDArray[Any], place: Place | None, tags: list[Any] | None = None, **options: Any) -> None:
    """Deflate in its fastest form, on differences: half the time of the usual one, and fewer bytes."""
    import tifffile

    extra = [*(tags or ()), *(place.tags if place else ())]
    fast = {"compression": "deflate", "compressionargs": {"level": 1}, "predictor": options["photometric"] != "palette"}
    with replacing(path) as temporary:
        tifffile.imwrite(temporary, pixels, metadata=None, extratags=extra, **fast, **options)


def _of_255(fractions: NDArray[np.float32]) -> NDArray[np.uint8]:
    scaled: NDArray[np.uint8] = np.rint(fractions * np.float32(255)).astype(np.uint8)
    return scaled


def _write_confidence_png(path: Path, confidence: NDArray[np.float32], place: Place | None) -> None:
    write_picture(path, _of_255(confidence))


def _write_confidence_tiff(path: Path, confidence: NDArray[np.float32], place: Place | None) -> None:
    _write_tiff(path, confidence, place, photometric="minisblack")


_BANDS: dict[str, Callable[[Probabilities], NDArray[Any]]] = {"uint8": _of_255, "float16": lambda fractions: fractions.astype(np.float16)}
_CONFIDENCE = {"png": _write_confidence_png, "tif": _write_confidence_tiff}
