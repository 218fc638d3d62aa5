"""Survey -> classes.toml, split.csv and dataset.toml beside the data, to be edited.

They say what was recognised, so that nothing is guessed any more, and a user changes only what is
wrong.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from useg.classes import classes_to_toml
from useg.data.dataset import Dataset
from useg.data.layouts import find_dataset
from useg.data.official_splits import write_split_csv
from useg.doctor.survey import Survey
from useg.errors import DataError, MachineError
from useg.files import replacing

# The last one is written last: it names the others.
DESCRIPTION_FILES = ("classes.toml", "split.csv", "dataset.toml")


def check_no_description(data: Path) -> None:
    """Refuse to describe data that are described already.

    Raises:
        DataError: one of the files exists.
    """
    folder = data if data.is_dir() else data.parent
    there = [folder / name for name in DESCRIPTION_FILES if os.path.lexists(folder / name)]
    if there:
        raise DataError(
            f"'{there[0]}' exists already, and somebody may have written it, so it is not "
            "replaced; edit it, or move it away first"
        )


def write_description(survey: Survey) -> tuple[Path, ...]:
    """Write ``classes.toml``, ``split.csv`` and ``dataset.toml`` into the data's folder.

    They are read back; if the data set then differs, they are removed.

    Returns:
        The files.

    Raises:
        DataError: one of the files exists, or the data cannot be described so.
        MachineError: the folder cannot be written.
    """
    dataset = survey.dataset
    check_no_description(dataset.root)
    written: list[Path] = []
    try:
        for name in DESCRIPTION_FILES:
            path = dataset.root / name
            if name == "split.csv":
                if not all(pair.split for pair in dataset.pairs):
                    continue
                write_split_csv(path, dataset)
            else:
                text = classes_to_toml(dataset.classes)
                text = text if name == "classes.toml" else _dataset_toml(dataset, written)
                # Nothing is replaced.
                with replacing(path, lambda _: False) as draft:
                    draft.write_text(text, "utf-8")
            written.append(path)
        _check_equal(find_dataset(dataset.root, strict=False), dataset)
    except (DataError, MachineError):
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return tuple(written)


def _check_equal(again: Dataset, dataset: Dataset) -> None:
    if (again.pairs, again.classes) != (dataset.pairs, dataset.classes):
        raise DataError(
            f"'{dataset.root}' cannot be described by what useg inspect --init writes; write a "
            "dataset.toml by hand"
        )


def _dataset_toml(dataset: Dataset, written: Sequence[Path]) -> str:
    names = [path.name for path in written]
    lines = [
        f"# What useg recognised here: {len(dataset.pairs)} pairs, layout {dataset.layout}.",
        "# Edit what is wrong; useg inspect shows the effect.",
        "",
        "# Names, values and colours of the classes:",
        'classes = "classes.toml"',
    ]
    if "split.csv" in names:
        lines += ["# Which images are for training (train), validation (val) and testing (test):"]
        lines += ['splits = "split.csv"']
    encoding = dataset.encoding
    lines += [
        "",
        "# Whether every value but 0 in a mask numbers one object:",
        f"objects = {str(encoding.objects).lower()}",
        "# Whether the classes are in the transparency of the masks:",
        f"alpha = {str(encoding.alpha).lower()}",
        '# What an image without annotations is: "background", or "ignore" if it is unfinished:',
        f'empty = "{"ignore" if encoding.ignore_empty else "background"}"',
        "",
        "# More values, or names of classes, that do not count:",
        "# ignore = [255]",
        "# Which files belong together, if useg pairs others than you mean:",
        '# images = "photos/*.jpg"',
        '# masks = "truth/*_mask.png"',
    ]
    return "\n".join(lines) + "\n"
