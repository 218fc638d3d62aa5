"""Compare the exported forms of a model with the model: largest difference of logits, equal labels.

python benchmarks/exports.py MODEL PICTURES [--count 100]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from record import record

from useg.images.files import read_image
from useg.inference import predictor
from useg.inference.files import find_images
from useg.serving import export


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("pictures")
    parser.add_argument("--count", type=int, default=100)
    arguments = parser.parse_args()
    images = [read_image(path) for path in find_images([arguments.pictures])[: arguments.count]]
    original = predictor.load(arguments.model)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".onnx", ".xml"):
            export.export(arguments.model, Path(folder) / f"model{suffix}")
            exported = predictor.load(Path(folder) / f"model{suffix}")
            difference, equal = 0.0, []
            for image in images:
                expected, logits = original.logits(image), exported.logits(image)
                difference = max(difference, float(np.abs(expected - logits).max()))
                equal.append(float((expected.argmax(0) == logits.argmax(0)).mean()))
            found[suffix[1:]] = {
                "largest_difference": difference,
                "equal_labels": float(np.mean(equal)),
                "least_equal_labels": min(equal),
            }
    print(found)
    print(
        record(
            f"exports_{arguments.model.name}",
            {"num_images": len(images), "network": original.runtime.description.network, **found},
        )
    )


if __name__ == "__main__":
    main()
