"""Sources (files, folders, globs) -> predictions -> label maps and overlays on disk."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from useg.data.images import IMAGE_SUFFIXES, Image, natural_key, read_image, write_label, write_picture
from useg.errors import UsageError
from useg.files import make_folder
from useg.inference.predictor import Predictor
from useg.pictures import overlay, to_picture, with_legend


def find_images(sources: Sequence[str]) -> list[Path]:
    """Turn files, folders and globs into image files, in natural order.

    Raises:
        UsageError: a source that is nothing, or two images of one stem, whose label maps would overwrite each other.
    """
    paths: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            found = [item for item in path.iterdir() if item.suffix.lower() in IMAGE_SUFFIXES and item.is_file()]
        elif path.is_file():
            found = [path]
        else:
            found = [Path(item) for item in glob.glob(source, recursive=True) if Path(item).is_file()]
        if not found:
            raise UsageError(f"there is no image at {source}; give image files, a folder of them, or a quoted glob such as 'frames/*.png'")
        paths += found
    paths = sorted(dict.fromkeys(paths), key=natural_key)
    twice = [stem for stem, count in Counter(path.stem for path in paths).items() if count > 1]
    if twice:
        both = [str(path) for path in paths if path.stem == twice[0]]
        raise UsageError(f"{' and '.join(both[:2])} would both become {twice[0]}.png; predict them into different folders")
    return paths


def predict_files(
    predictor: Predictor, sources: Sequence[str], out: Path, *, overlays: bool = True, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Path]:
    """Label images on disk; decoding and encoding run beside the network.

    Args:
        predictor: the model.
        sources: image files, folders, globs.
        out: the folder for ``STEM.png`` (palette PNG) and ``overlays/STEM.png``; made when missing.
        overlays: also draw the overlays.
        progress: called with (images done, images in all).

    Returns:
        The label maps written.

    Raises:
        UsageError: no images, an unreadable one, one that does not fit the model, or a folder that cannot be written.
    """
    paths = find_images(sources)
    make_folder(out / "overlays" if overlays else out)
    written = [out / f"{path.stem}.png" for path in paths]
    clash = next((path for path, target in zip(paths, written, strict=True) if path.resolve() == target.resolve()), None)
    if clash:
        raise UsageError(f"the label map of {clash} would overwrite the image itself; choose another folder with --out")
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        ahead: Future[Image] = reader.submit(read_image, paths[0])
        behind: Future[None] | None = None
        for k, target in enumerate(written):
            image = ahead.result()
            if k + 1 < len(paths):
                ahead = reader.submit(read_image, paths[k + 1])
            prediction = predictor(image)
            if behind:
                behind.result()

            def write(image: Image = image, prediction=prediction, target: Path = target) -> None:  # type: ignore[no-untyped-def]
                write_label(target, prediction, predictor.classes)
                if overlays:
                    picture = overlay(to_picture(image), prediction, predictor.classes)
                    write_picture(out / "overlays" / target.name, with_legend(picture, prediction, predictor.classes))

            behind = writer.submit(write)
            progress(k + 1, len(paths))
        if behind:
            behind.result()
    return written
