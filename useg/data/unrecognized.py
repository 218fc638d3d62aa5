"""A folder in which no pairs were found -> what it has instead, and what to do about it."""

from __future__ import annotations

import zipfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from useg.data.dataset import pick_evenly
from useg.data.file_names import split_name
from useg.data.ground_truth import Candidate, OpenChoiceError
from useg.data.mask_content import is_photograph
from useg.data.pairing import find_photograph_sets, role_of_array
from useg.errors import UsageError, format_count, join_names
from useg.files import list_files, list_subfolders
from useg.images.formats import UNREAD_SUFFIXES
from useg.images.image_files import list_image_files, read_image, read_mask_and_alpha, read_size
from useg.parsing import open_file

# Image files that are opened if no pairs are found.
_NUM_TRIED = 3
# A band of more values is not a mask.
_MAX_FEW_VALUES = 16
# In a mask, a smaller share than this of the neighbouring pixels differ; in an image, the share is
# larger by this factor.
_MAX_PLAIN_CHANGES, _MIN_RATIO_OF_CHANGES = 0.5, 2.0
_VIDEO_ADVICE = "save the labelled frames as PNG, for example with ffmpeg"
# What to do with files that useg does not read.
_ADVICE = {
    **UNREAD_SUFFIXES,
    ".nii.gz": UNREAD_SUFFIXES[".nii"],
    ".zip": "unpack them; if they are ROI sets of ImageJ, save a mask for each image instead",
    **dict.fromkeys((".mp4", ".avi", ".mov", ".mkv", ".webm"), _VIDEO_ADVICE),
}
_NIFTI_SUFFIXES = (".nii", ".nii.gz")
_CONTAINER_SUFFIXES = (*_NIFTI_SUFFIXES, ".h5", ".hdf5", ".mat")
# MATLAB's files of version 7.3 are HDF5, and begin so.
_MATLAB_HDF5 = b"MATLAB 7.3"
_OTHER_SUFFIXES = (*(".json", ".xml", ".txt", ".csv"), *_ADVICE)

# So many numbers at one place of all names may stand for images, masks and others.
_MAX_NUMBERS = 8

# The end of a ZIP file is in its last bytes; the list of its files has at most this many bytes.
_ZIP_END_BYTES, _MAX_ZIP_LIST_BYTES = 66_000, 1 << 20


def describe_unrecognized(folder: Path) -> str:
    """Return an error message: what the folder has instead of pairs, and what to do."""
    others = list_files(folder, _OTHER_SUFFIXES)
    suffixes = Counter(
        ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()
        for path in others
    )
    return (
        f"'{folder}' has no pairs of image and mask that useg recognises. "
        f"It has {_list_content(folder, suffixes)}. {_advise(folder, others, suffixes)}"
    )


def _list_content(folder: Path, suffixes: Counter[str]) -> str:
    """List the images of each sub-folder, those beside them, and the most usual other files."""
    counts = {child: len(list_image_files(child)) for child in list_subfolders(folder)}
    loose = sum(path.parent == folder for path in list_image_files(folder))
    named = [f"{child.name}/ ({format_count(count, 'image')})" for child, count in counts.items()]
    shown = named[:8]
    if loose and counts:
        shown.append(f"{format_count(loose, 'image')} beside them")
    elif not counts:
        shown.append(f"{format_count(loose, 'image')} and no sub-folders")
    shown += [format_count(count, f"{suffix} file") for suffix, count in suffixes.most_common(3)]
    return ", ".join(shown)


def _has_mask_as_fourth_band(path: Path) -> bool:
    """Return whether an image has a fourth band, or transparency, of two to a few values."""
    try:
        alpha = read_mask_and_alpha(path)[1]
    except UsageError:
        pixels = read_image(path)
        alpha = pixels[..., 3] if pixels.shape[2] == 4 else None
    return alpha is not None and 2 <= len(set(alpha.ravel().tolist())) <= _MAX_FEW_VALUES


def _list_arrays(path: Path) -> list[str]:
    """Return the names of the arrays in a .npz file; none if it is damaged or lists very many."""
    try:
        with open_file(path) as file:
            file.seek(max(0, path.stat().st_size - _ZIP_END_BYTES))
            # What ends a ZIP file says where the list of its files begins, and how long it is.
            end = file.read().rpartition(b"PK\5\6")[2]
            if not 0 < int.from_bytes(end[8:12], "little") <= _MAX_ZIP_LIST_BYTES:
                return []
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return []
    return [name.removesuffix(".npy") for name in names if name.removesuffix(".npy").isidentifier()]


def _advise_arrays(folder: Path, archives: Sequence[Path]) -> str:
    """Return lines of Python that turn .npz files into folders that useg reads."""
    names = _list_arrays(archives[0])
    roles = {name: role_of_array(name) for name in names}
    chosen = [[name for name in names if roles[name] == role] for role in ("image", "mask")]
    if [len(part) for part in chosen] == [1, 1]:
        image, mask = chosen[0][0], chosen[1][0]
        save = (
            f"    for name, place in ({image!r}, 'images'), ({mask!r}, 'masks'):\n"
            "        target = pathlib.Path('OUT', place, path.stem + '.npy')\n"
        )
    else:
        save = (
            "    for name in arrays.files:\n"
            "        target = pathlib.Path('OUT', path.stem, name + '.npy')\n"
        )
    listed = f", which has the arrays {join_names(names, 8)}" if names else ""
    return (
        f"useg does not read .npz files such as '{archives[0]}'{listed}. It reads .npy files, also "
        "of many images; these lines of Python write them to the folder OUT:\n"
        "import numpy, pathlib\n"
        f"for path in pathlib.Path({str(folder)!r}).rglob('*.npz'):\n"
        "    arrays = numpy.load(path)\n"
        f"{save}"
        "        target.parent.mkdir(parents=True, exist_ok=True)\n"
        "        numpy.save(target, arrays[name])"
    )


def _advise_containers(folder: Path, paths: Sequence[Path], suffix: str) -> str:
    """Return lines of Python that turn HDF5, MATLAB or NIfTI files into files that useg reads."""
    with open_file(paths[0]) as file:
        is_hdf5 = suffix != ".mat" or file.read(10) == _MATLAB_HDF5
    place = str(folder) if list_image_files(folder) else "OUT"
    if suffix in _NIFTI_SUFFIXES:
        package, target = "nibabel tifffile", "with_name(path.name.split('.nii')[0] + '.tif')"
        lines = (
            "import nibabel, numpy, pathlib, tifffile\n"
            f"for path in pathlib.Path({str(folder)!r}).rglob('*.nii*'):\n"
            "    slices = numpy.moveaxis(numpy.asarray(nibabel.load(path).dataobj), 2, 0)\n"
            "    slices = slices.astype('float32' if slices.dtype.kind == 'f' else slices.dtype)\n"
            f"    target = pathlib.Path({place!r}) / path.relative_to({str(folder)!r}).{target}\n"
            "    target.parent.mkdir(parents=True, exist_ok=True)\n"
            "    planar = 'contig' if slices.ndim == 4 else None\n"
            "    tifffile.imwrite(target, slices, photometric='minisblack', planarconfig=planar)"
        )
    else:
        package = "h5py" if is_hdf5 else "scipy"
        # MATLAB stores columns first, which h5py does not know.
        array = "numpy.asarray(item).T" if suffix == ".mat" and is_hdf5 else "item"
        read = (
            "    with h5py.File(path) as file:\n"
            "        file.visititems(lambda name, item: save(name.replace('/', '_'), item))"
            if is_hdf5
            else "    save('', scipy.io.loadmat(path, simplify_cells=True))"
        )
        lines = (
            f"import {'h5py' if is_hdf5 else 'scipy.io'}, numpy, pathlib\n"
            "def save(name, item):\n"
            "    if isinstance(item, dict):\n"
            "        for key in item:\n"
            "            save(f'{name}_{key}'.strip('_'), item[key])\n"
            "    elif getattr(item, 'ndim', 0) > 1 and item.dtype.kind in 'buif':\n"
            f"        file = path.relative_to({str(folder)!r}).with_suffix('.npy')\n"
            f"        target = pathlib.Path({place!r}, name) / file\n"
            "        target.parent.mkdir(parents=True, exist_ok=True)\n"
            f"        numpy.save(target, numpy.ascontiguousarray({array}))\n"
            f"for path in pathlib.Path({str(folder)!r}).rglob('*{suffix}'):\n"
            f"{read}"
        )
    where = "beside the images" if place != "OUT" else "to the folder OUT"
    return (
        f"useg does not read {suffix} files such as '{paths[0]}'. These lines of Python write "
        f"their arrays {where}; useg reads them if they are images and masks of class ids "
        f"(pip install {package}):\n{lines}"
    )


def _advise_object_masks(folder: Path, images: Sequence[Path]) -> str:
    """Return lines of Python that join masks named IMAGE_CLASS_NUMBER; ``""`` for other names."""
    stems = {path.stem: path for path in images if "_" not in path.stem}
    masks = [path for path in images if path.stem.partition("_")[0] in stems.keys() - {path.stem}]
    names = sorted({path.stem.split("_")[1] for path in masks})
    has_all = len(stems) + len(masks) == len(images) and len(masks) >= _NUM_TRIED
    if not has_all or 2 * len(names) > len(masks) or not all(map(str.isidentifier, names)):
        return ""
    if any(map(is_photograph, pick_evenly(masks, _NUM_TRIED))):
        return ""
    first = stems[masks[0].stem.partition("_")[0]]
    return (
        f"The names of {format_count(len(masks), 'file')} such as '{masks[0]}' consist of the "
        "name of an image and a word, like those of masks of single objects. If the word is the "
        "class, these lines of Python write one mask for each image to the folder OUT:\n"
        "import numpy, pathlib, PIL.Image, shutil\n"
        f"names, labels, folder = {names}, {{}}, pathlib.Path({str(folder)!r})\n"
        f"images = {{path.stem: path for path in folder.rglob('*{first.suffix}')}}\n"
        "for place in 'images', 'masks':\n"
        "    pathlib.Path('OUT', place).mkdir(parents=True, exist_ok=True)\n"
        "pathlib.Path('OUT', 'classes.txt').write_text('\\n'.join(['background', *names]))\n"
        f"for path in folder.rglob('*_*{masks[0].suffix}'):\n"
        "    image, name = path.stem.split('_')[:2]\n"
        "    with PIL.Image.open(images[image]) as picture, PIL.Image.open(path) as part:\n"
        "        mask = numpy.asarray(part.convert('L').resize(picture.size, 0)) > 0\n"
        "    labels.setdefault(image, mask * numpy.uint8(0))[mask] = names.index(name) + 1\n"
        "for image, label in labels.items():\n"
        "    PIL.Image.fromarray(label).save(f'OUT/masks/{image}.png')\n"
        "    shutil.copy(images[image], 'OUT/images')"
    )


def _find_mask_half(path: Path) -> int | None:
    """Return which half of a picture alone has plain areas, like a mask: 0 left, 1 right."""
    pixels = read_image(path)
    half = pixels.shape[1] // 2
    if half <= pixels.shape[0] // 2 or pixels.shape[1] % 2:
        return None
    changing = [
        float((part[:, 1:] != part[:, :-1]).any(axis=2).mean())
        for part in (pixels[:, :half], pixels[:, half:])
    ]
    is_plain = [share < _MAX_PLAIN_CHANGES for share in changing]
    is_clear = max(changing) >= max(_MAX_PLAIN_CHANGES, _MIN_RATIO_OF_CHANGES * min(changing))
    return is_plain.index(True) if is_clear and any(is_plain) else None


def _advise_halves(folder: Path, images: Sequence[Path], half: int) -> str:
    """Return lines of Python that cut pictures of an image beside its mask, as pix2pix has them."""
    names = ("masks", "images") if half == 0 else ("images", "masks")
    colors = ". JPEG has altered colours of masks: list the true ones in OUT/classes.toml with "
    colors += "by_color = true, and run useg inspect OUT --fix"
    colors *= images[0].suffix.lower() in (".jpg", ".jpeg")
    return (
        f"The {('left', 'right')[half]} half of '{images[0]}' and others has plain areas, like a "
        "mask beside its image. If so, these lines of Python cut them into the folder OUT"
        f"{colors}:\n"
        "import pathlib, PIL.Image\n"
        f"for path in pathlib.Path({str(folder)!r}).rglob('*{images[0].suffix}'):\n"
        "    picture = PIL.Image.open(path).convert('RGB')\n"
        "    half = picture.width // 2\n"
        f"    for name, left in ({names[0]!r}, 0), ({names[1]!r}, half):\n"
        f"        place = path.relative_to({str(folder)!r}).with_suffix('.png')\n"
        "        target = pathlib.Path('OUT', name) / place\n"
        "        target.parent.mkdir(parents=True, exist_ok=True)\n"
        "        picture.crop((left, 0, left + half, picture.height)).save(target)"
    )


def ask_about_numbers(folder: Path) -> None:
    """Ask if one number in the names tells images from masks, such as a_1 and a_2.

    Every image has a file with each of a few numbers at one place of its name. By the pixels, some
    of these numbers are images, and others masks.

    Raises:
        OpenChoiceError: There are such files.
    """
    rows: dict[tuple[str, ...], Path] = {}
    for path in list_image_files(folder):
        rows[tuple(split_name(path.relative_to(folder).with_suffix("").as_posix()))] = path
    for place in range(min(map(len, rows), default=0)):
        numbers = {row[place] for row in rows}
        if not 2 <= len(numbers) <= _MAX_NUMBERS or not all(map(str.isdecimal, numbers)):
            continue
        sets: dict[str, dict[tuple[str, ...], Path]] = defaultdict(dict)
        for row, path in rows.items():
            sets[row[place]][row[:place] + row[place + 1 :]] = path
        names = [*sets.values()]
        if len(names[0]) >= _NUM_TRIED and all(each.keys() == names[0].keys() for each in names):
            kinds = {
                number: {is_photograph(path) for path in [*files.values()][:_NUM_TRIED]}
                for number, files in sets.items()
            }
            _ask(sets, kinds)


def _ask(
    sets: Mapping[str, Mapping[tuple[str, ...], Path]], kinds: Mapping[str, set[bool | None]]
) -> None:
    """Ask which numbers are the images and the masks, if the pixels show some of both."""
    images, masks = (
        [number for number, kind in kinds.items() if kind == {is_image}]
        for is_image in (True, False)
    )
    if not images or not masks:
        return
    candidates = [
        Candidate(mask, {sets[image][name]: path for name, path in sets[mask].items()})
        for image in images
        for mask in masks
    ]
    raise OpenChoiceError(
        f"the names of the files differ by one number: those with {join_names(images)} look like "
        f"images, and those with {join_names(masks)} like masks",
        candidates,
        candidates,
    )


def _advise(folder: Path, others: Sequence[Path], suffixes: Counter[str]) -> str:
    """Say what to do with a folder in which no pairs were found.

    Args:
        folder: The folder.
        others: Its files that are not images.
        suffixes: How many files of each suffix are among them.
    """
    # Files of outlines help only with images that useg reads.
    for suffix, _ in sorted(suffixes.most_common(), key=lambda each: each[0] == ".geojson"):
        if suffix == ".npz":
            return _advise_arrays(folder, [path for path in others if path.suffix == suffix])
        if suffix in _CONTAINER_SUFFIXES:
            return _advise_containers(
                folder, [path for path in others if path.name.lower().endswith(suffix)], suffix
            )
        if suffix in _ADVICE:
            return f"useg does not read {suffix} files: {_ADVICE[suffix]}"
    images = list_image_files(folder)
    annotated = [path for path in others if path.suffix.lower() in (".json", ".xml")]
    if annotated and not images:
        return f"Put the images of '{annotated[0]}' there too, or choose the folder that has both."
    known = {name for path in images for name in (path.stem, path.name)}
    beside = [path for path in others if {path.stem, path.name.partition(".")[0]} & known]
    if 2 * len(beside) > len(images):
        return (
            f"useg does not know the format of '{beside[0]}' and other files that are named after "
            "images. If they have outlines, export them as COCO, LabelMe or 'CVAT for images 1.1'; "
            "otherwise, save a mask for each image"
        )
    bare = [] if images else list_files(folder, ("",))
    if len(bare) > 1:
        return (
            f"{format_count(len(bare), 'file')} such as '{bare[0]}' have no suffix; "
            "give them that of their format, such as .png"
        )
    for path in images[:_NUM_TRIED]:
        try:
            read_size(path)
        except UsageError as error:
            return str(error)
    if advice := _advise_object_masks(folder, images):
        return advice
    halves = {_find_mask_half(path) for path in images[:_NUM_TRIED]}
    if len(images) >= _NUM_TRIED and halves in ({0}, {1}):
        return _advise_halves(folder, images, 0 if 0 in halves else 1)
    if images and all(map(_has_mask_as_fourth_band, images[:_NUM_TRIED])):
        return (
            f"The fourth band, or the transparency, of '{images[0]}' and others has only a few "
            "values, like a mask. If it is the mask, save it as a separate file, such as "
            "masks/a.png, and the other bands as images/a.png"
        )
    if alike := find_photograph_sets(folder):
        return (
            f"The names of {alike} agree, but both look like photographs, and masks have plain "
            "areas of class ids or of few colours. Turn probabilities or heights into class ids, "
            "for example by a threshold, or add masks if there are none"
        )
    return (
        "It recognises images and masks whose names agree, such as images/a.png with "
        "masks/a.png or a.png with a_mask.png, and annotation files of COCO, CVAT, LabelMe, "
        "Label Studio, Supervisely, VIA and YOLO. Rename your files, list each image with its mask "
        f"in {folder / 'pairs.csv'} with the columns image,mask, or write their globs as images "
        f"and masks into {folder / 'dataset.toml'}"
    )
