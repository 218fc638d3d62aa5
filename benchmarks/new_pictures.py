"""What helps a model on pictures of a new place: adapting it, or a few labels and a warm start.

    python benchmarks/new_pictures.py RUN OLD NEW --name NAME [--steps 25] [--set KEY=VALUE ...]

RUN is a model of the old place OLD, with its split. NEW is the new place; its split.csv has a few
images in ``train`` and ``val``, and the others in ``test``. The model is scored on the new place
(``test``) and on the old one (``val``): as it is, started from with the few labels, beside a model
that is trained anew on them for as many steps, and adapted to the new place without labels. One
seed and fixed steps: a busy machine gives the same results, only later. Each row is written to
``results/new_pictures_NAME.json`` as soon as it is measured.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from record import record

from useg.config import Settings, parse_assignments
from useg.data.dataset import Dataset, pick_evenly, read_pair_image, read_sample
from useg.data.splits import open_dataset
from useg.images.files import resize_image
from useg.inference.adapt import choose_share, to_input
from useg.inference.predictor import Predictor
from useg.inference.runtimes import runtime_of_model
from useg.machine import describe_machine
from useg.models.geometry import fit_bands
from useg.models.segmenter import Segmenter, load_model
from useg.scoring.metrics import confusion, score
from useg.training.loop import fit
from useg.training.warm_start import take_over

NUM_SCORED = 16


def mean_iou(model: Segmenter, dataset: Dataset, split: str) -> float:
    """Return the mean IoU on at most ``NUM_SCORED`` images of a split."""
    predictor = Predictor(runtime_of_model(model, Path("model"), "torch"))
    size = len(model.classes)
    counts = np.zeros((size, size), np.int64)
    pairs = pick_evenly(dataset.of(split), NUM_SCORED)
    for pair in pairs:
        sample = read_sample(pair, dataset)
        counts += confusion(predictor(sample.image), sample.label, size)
    return score(counts, model.classes.names, len(pairs)).mean_iou


def adapt_to(model: Segmenter, dataset: Dataset) -> tuple[Segmenter, float]:
    """Return the model adapted to the test images, without their labels, and the share chosen."""
    images = []
    for pair in pick_evenly(dataset.of("test"), NUM_SCORED):
        image = fit_bands(read_pair_image(pair), model.channels, model.pixels, str(pair.image))
        size = model.working.of(image.shape[1], image.shape[0])
        images.append(to_input(model, resize_image(image, size)))
    adapted, adaptation = choose_share(model, images)
    return adapted, adaptation.share


def measure(
    run: Path, old: Dataset, new: Dataset, steps: int, changes: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Measure row by row."""

    def row(what: str, model: Segmenter, **more: Any) -> dict[str, Any]:
        scores = {"new": mean_iou(model, new, "test"), "old": mean_iou(model, old, "val")}
        return {"what": what, **scores, **more}

    source = load_model(run)
    yield row("as it is", source, steps=source.provenance["step"])
    for what, is_warm in (("started from", True), ("trained anew", False)):
        given = {**changes, "train.steps": steps, "train.validate_every": 10**9}
        settings = Settings().with_(given)
        if is_warm:
            settings, _ = take_over(run, settings, given)
        with tempfile.TemporaryDirectory() as out:
            fit(new, Path(out) / "run", settings)
            yield row(what, load_model(Path(out) / "run"), steps=steps)
    adapted, share = adapt_to(source, new)
    yield row("adapted without labels", adapted, share=share)


def main() -> None:
    """Measure one case and store it."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("run", "old", "new"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    old, new = open_dataset(given.old), open_dataset(given.new)
    content = {
        "machine": describe_machine(),
        "seed": 0,
        "labelled": len(new.of("train")) + len(new.of("val")),
        "scored": [min(NUM_SCORED, len(part)) for part in (new.of("test"), old.of("val"))],
        "settings": given.set,
    }
    rows = []
    for row in measure(given.run, old, new, given.steps, parse_assignments(given.set)):
        rows.append(row)
        print(row, flush=True)
        record(f"new_pictures_{given.name}", {**content, "rows": rows})


if __name__ == "__main__":
    main()
