"""Measure how much a temperature fitted on some held-out images improves calibration on others.

    python benchmarks/calibration.py DATA [--run RUN] [--minutes 10] [--seed 0]

The held-out images are split into two halves along blocks of neighbouring images. The temperature
is fitted on one half and evaluated on the other, then the other way round: on the images that it
was fitted on it would look too good. The pooled error is that of all images, each with the
temperature of the half that it is not in. Without ``--run`` a model is trained first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from record import record

from useg.data.dataset import Dataset, Pair
from useg.inference import predictor
from useg.inference.predictor import Predictor
from useg.reporting import report
from useg.reporting.evaluate import (
    evaluate_dataset,
    find_blocks,
    find_temperature,
)
from useg.scoring.uncertainty import NUM_BINS, Calibration


def halves(dataset: Dataset) -> tuple[list[Pair], list[Pair]]:
    """Split the validation images into two halves such that no block is in both."""
    pairs = dataset.of("val")
    blocks = find_blocks(pairs, dataset)
    order = list(dict.fromkeys(blocks))
    first = set(order[: len(order) // 2])
    parts = (
        [pair for pair, block in zip(pairs, blocks, strict=True) if (block in first) == wanted]
        for wanted in (True, False)
    )
    return next(parts), next(parts)


def fit_and_evaluate(
    predictor: Predictor, dataset: Dataset, fitted_on: Sequence[Pair], evaluated_on: Sequence[Pair]
) -> dict[str, Any]:
    """Fit on some images; return the calibration of others, before and after."""
    temperature = find_temperature(predictor, dataset, fitted_on)
    others = replace(dataset, pairs=tuple(evaluated_on))

    def measured(at: float) -> Calibration:
        description = replace(predictor.runtime.description, temperature=at)
        divided = Predictor(replace(predictor.runtime, description=description))
        found = evaluate_dataset(divided, others, "val").calibration
        assert found
        return found

    before, after = measured(1.0), measured(temperature)
    return {
        "num_fitted": len(fitted_on),
        "num_judged": len(evaluated_on),
        "temperature": temperature,
        "before": before,
        "after": after,
    }


def pooled_error(parts: Sequence[tuple[int, Calibration]]) -> float:
    """Return the calibration error of all images of several (number of images, calibration)."""
    gaps = np.zeros(NUM_BINS)
    for number, part in parts:
        for entry in part.curve:
            gaps[min(int(entry.confidence * NUM_BINS), NUM_BINS - 1)] += (
                number * entry.share * (entry.confidence - entry.accuracy)
            )
    return float(np.abs(gaps).sum() / sum(number for number, _ in parts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = arguments.run or Path(folder) / "run"
        if not arguments.run:
            command = [
                sys.executable,
                "-m",
                "useg",
                "train",
                str(arguments.data),
                "--out",
                str(run),
                "--minutes",
                str(arguments.minutes),
            ]
            subprocess.run([*command, "--set", f"train.seed={arguments.seed}"], check=True)
        model = predictor.load(run)
    provenance = model.runtime.description.provenance
    dataset = report.open_evaluation_data(model, arguments.data)
    first, second = halves(dataset)
    if not first:
        parser.error(
            f"the held-out images of {arguments.data} are a single block, which cannot be split "
            "into two halves"
        )
    both = [
        fit_and_evaluate(model, dataset, *parts) for parts in ((first, second), (second, first))
    ]
    pooled = {
        key: pooled_error([(len(second), both[0][key]), (len(first), both[1][key])])
        for key in ("before", "after")
    }
    shown = [{**half, **{key: half[key].as_dict() for key in pooled}} for half in both]
    content = {
        "dataset": arguments.data.name,
        "pooled_error_before": pooled["before"],
        "pooled_error_after": pooled["after"],
        "halves": shown,
    }
    path = record(
        f"calibration_{arguments.data.name}_seed{provenance.get('seed')}", {**content, **provenance}
    )
    for half in both:
        print(
            f"calibration error {half['before'].error:.4f} -> {half['after'].error:.4f} "
            f"at temperature {half['temperature']:.3f}"
        )
    print(f"all images {pooled['before']:.4f} -> {pooled['after']:.4f}\n{path}")


if __name__ == "__main__":
    main()
