"""A folder of image files -> pairs of images and masks, in natural order (1, 2, 10).

The names say which files belong together (:mod:`useg.data.file_names`), wherever they lie, and
which of them are the masks (:mod:`useg.data.roles`, :mod:`useg.data.chosen_pairs`). Several masks
of one image are its objects (:mod:`useg.data.object_masks`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from useg.data.chosen_pairs import ChosenPairs, choose_pairs
from useg.data.dataset import SPLIT_FOLDERS, DetectedLayout, Pair
from useg.data.file_names import (
    IMAGE_WORDS,
    MASK_WORDS,
    join_comparable,
    learn_links,
    learn_starts,
    plain_stem,
    role_of_words,
    split_folder,
    split_name,
)
from useg.data.ground_truth import OTHER_WORDS, Candidate, OpenChoiceError
from useg.data.mask_content import describe_constant_shape, is_two_valued
from useg.data.mask_problems import refuse_ade20k
from useg.data.object_masks import (
    describe_joined,
    find_object_masks,
    join_masks,
    words_of_folder,
)
from useg.data.official_splits import (
    find_splits,
    generalize_folder,
    leave_for_prediction,
    split_by_masks,
)
from useg.data.published_classes import TABLES_BY_NAME
from useg.data.roles import NamedFiles, links_to_masks
from useg.errors import DataError, format_count
from useg.files import natural_key
from useg.images.image_files import holds_python_objects, list_image_files
from useg.images.stacks import count_pages

# Names of folders by which published layouts are recognised.
_LAYOUTS = {"camerargb": "carla", "leftimg8bit": "cityscapes", "jpegimages": "voc"}

# Folders of images that show nothing but background, and so often have no masks.
_EMPTY_FOLDERS = frozenset(
    [
        *("good", "normal", "ok", "healthy", "negative", "negatives", "intact", "defectfree"),
        *("nodefect", "nodefects", "undamaged", "empty"),
    ]
)

_NUM_NAMED = 3
# More folders than this are hardly classes.
_MAX_CLASS_FOLDERS = 10

# Usual names of arrays in Python.
_ARRAY_ROLES = {"x": "image", "y": "mask"}
_MAX_ARRAYS = 64


@dataclass(frozen=True)
class MatchedFiles:
    """Images and masks that belong together, and those without a partner."""

    pairs: tuple[tuple[Path, Path], ...]
    images: tuple[Path, ...]
    masks: tuple[Path, ...]


def match_lists(images: Mapping[str, Path], masks: Mapping[str, Path]) -> MatchedFiles:
    """Pair the images of one list with the masks of another by what is constant in their names.

    Equal names come first. A rule (:class:`useg.data.file_names.Rule`) pairs what they leave. If
    there is none, a name may begin with its partner's.

    Raises:
        DataError: Two images have the same mask.
    """
    pairs = {name: name for name in images if name in masks}
    for get_part in (str, _get_last_part):
        if not pairs:
            folded = [_join_comparable_names(names, get_part) for names in (images, masks)]
            pairs = {folded[0][name]: folded[1][name] for name in folded[0] if name in folded[1]}
    if not pairs:
        starts = _match_starts(images, masks)
        pairs = starts if len(starts) == len(images) == len(masks) else {}
    while True:
        rest = [name for name in images if name not in pairs]
        taken = set(pairs.values())
        others = [name for name in masks if name not in taken]
        links = learn_links(rest, others) if rest and others else []
        # A rule for one of many names fits by accident, unless nothing else is left.
        if not links or (pairs and len(links[0].partners) * 10 < min(len(rest), len(others))):
            break
        pairs |= links[0].partners
    pairs = pairs or _match_starts(images, masks)
    found = [(images[name], masks[other]) for name, other in pairs.items()]
    taken = set(pairs.values())
    return MatchedFiles(
        tuple(sorted(found, key=lambda pair: natural_key(pair[0]))),
        tuple(path for name, path in images.items() if name not in pairs),
        tuple(path for name, path in masks.items() if name not in taken),
    )


def _match_starts(images: Mapping[str, Path], masks: Mapping[str, Path]) -> dict[str, str]:
    """Pair files if one name begins or ends with the other; none if further names do, too."""
    stems = [
        {join_comparable(split_name(plain_stem(path))): name for name, path in files.items()}
        for files in (images, masks)
    ]
    if [*map(len, stems)] != [len(images), len(masks)]:
        # Names in several folders are not unique.
        return {}
    links = [*learn_starts(*stems), *(link.reverse for link in learn_starts(*reversed(stems)))]
    partners = links[0].partners if len(links) == 1 else {}
    return {stems[0][one]: stems[1][other] for one, other in partners.items()}


def _get_last_part(name: str) -> str:
    """Return a name without folders: images may be in one folder, and masks in numbered ones."""
    return name.rpartition("/")[2]


def _join_comparable_names(names: Iterable[str], get_part: Callable[[str], str]) -> dict[str, str]:
    """Return names by the form of a part without capitals and leading zeros, if it is unique."""
    listed = list(names)
    folded = {join_comparable(split_name(get_part(name))): name for name in listed}
    return folded if len(folded) == len(listed) else {}


def find_pairs(root: Path) -> DetectedLayout | None:
    """Pair the images and masks in a folder, or return None if no names agree.

    Raises:
        OpenChoiceError: Several sets of files could be the masks, or the images.
        DataError: Two images have the same mask, or a folder cannot be read.
    """
    paths = _leave_out_variants(list_image_files(root))
    return _pair_folders(root, paths) or _pair_names(root, paths) or _pair_arrays(root, paths)


def _pair_names(root: Path, everything: Sequence[Path]) -> DetectedLayout | None:
    # Cellpose keeps its work as Python objects beside the images.
    paths = [path for path in everything if not holds_python_objects(path)] or everything
    if len(paths) < 2:
        return None
    found = find_object_masks(root, paths)
    if found is not None:
        return found
    files = NamedFiles(root, paths)
    links = links_to_masks(files)
    refuse_ade20k(root, (files.paths[name] for link in links for name in link.partners.values()))
    parts = list(choose_pairs(links, files))
    _refuse_exchanged_names(parts, files)
    return _to_layout(parts, files) if parts else None


def _refuse_exchanged_names(parts: Sequence[ChosenPairs], files: NamedFiles) -> None:
    """Refuse pairs whose names agree only if two words or numbers change places.

    Raises:
        DataError: One rule turns ``L`` into ``R``, and another one ``R`` into ``L``.
    """
    for one, other in combinations(parts, 2):
        changed = [part.link.rule.changes for part in (one, other)]
        both = [changed[0][k].keys() & changed[1][1 - k].keys() for k in (0, 1)]
        words = [[word for word in sorted(each) if word.isalnum()] for each in both]
        if words[0] and words[1]:
            image, mask = (files.paths[name] for name in next(iter(one.link.partners.items())))
            raise DataError(
                f"the names of images and masks match only if {words[0][0]!r} and {words[1][0]!r} "
                f"are swapped, as in '{image}' and '{mask}', so useg may pair the wrong files; "
                "give each mask the name of its image, with or without a word added to it"
            )


def _pair_arrays(root: Path, paths: Sequence[Path]) -> DetectedLayout | None:
    """Pair arrays of many images such as ``X_train.npy`` and ``y_train.npy`` by role and split."""
    files = [path for path in paths if path.suffix.lower() == ".npy"]
    arrays = [path for path in files[: _MAX_ARRAYS + 1] if not holds_python_objects(path)]
    if not 2 <= len(arrays) <= _MAX_ARRAYS:
        return None
    groups, splits = _group_arrays(arrays, root)
    complete = [group for group in groups if group["image"] and group["mask"]]
    is_clear = all(len(group["image"]) == len(group["mask"]) == 1 for group in complete)
    if not complete or not is_clear:
        return None
    chosen = [(group["image"][0], group["mask"][0]) for group in complete]
    if all(count_pages(image, mask)[0] == 1 for image, mask in chosen):
        return None
    pairs = [Pair(image, mask, splits[image]) for image, mask in chosen]
    paired = {pair.image for pair in pairs}
    rest = [path for group in groups for path in group["image"] if path not in paired]
    alone, notes = leave_for_prediction(rest, splits, {pair.split for pair in pairs})
    return DetectedLayout(
        "arrays",
        tuple(sorted(pairs, key=lambda pair: natural_key(pair.image))),
        alone,
        tuple(path for group in groups if not group["image"] for path in group["mask"]),
        notes=notes,
    )


def _group_arrays(
    arrays: Sequence[Path], root: Path
) -> tuple[list[dict[str, list[Path]]], dict[Path, str]]:
    """Group arrays whose names differ only by their role.

    Returns:
        For each group, role (``image``, ``mask`` or ``""``) -> arrays; and the split of each array.
    """
    groups: dict[tuple[str, ...], dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    splits: dict[Path, str] = {}
    for path in arrays:
        name = path.relative_to(root).with_suffix("").as_posix()
        words = split_name(name.casefold())
        others = {word for word in words if word.isalnum() and not role_of_array(word)}
        splits[path] = next((SPLIT_FOLDERS[word] for word in sorted(others & {*SPLIT_FOLDERS})), "")
        groups[tuple(sorted(others))][role_of_array(name)].append(path)
    return list(groups.values()), splits


def role_of_array(name: str) -> str:
    """Return ``image`` or ``mask`` if the name of an array says that it holds them, or ``""``.

    >>> role_of_array("X_train"), role_of_array("label"), role_of_array("train")
    ('image', 'mask', '')
    """
    return role_of_words({_ARRAY_ROLES.get(word, word) for word in split_name(name.casefold())})


def find_photograph_sets(root: Path) -> str:
    """Return two sets of files whose names agree and whose pixels all look like photographs."""
    paths = list_image_files(root)
    if len(paths) < 2:
        return ""
    files = NamedFiles(root, paths)
    for link in learn_links(list(files.paths))[:1]:
        sides = [set(link.partners), set(link.partners.values())]
        if 4 * len(sides[0]) > len(paths) and {*map(files.kind_by_pixels, sides)} == {"image"}:
            return " and ".join(files.name_sets(sides))
    return ""


def find_masks(paths: Sequence[Path], root: Path) -> list[Path]:
    """Return which of some image files are evidently masks of others, by names and by pixels."""
    files = NamedFiles(root, paths)
    images: set[str] = set()
    masks: set[str] = set()
    for link in links_to_masks(files):
        sides = set(link.partners), set(link.partners.values())
        is_evident = [files.kind_by_pixels(side) for side in sides] == ["image", "mask"]
        if is_evident and not sides[0] & masks and not sides[1] & images:
            images |= sides[0]
            masks |= sides[1]
            added = " ".join(part[1] for part in link.rule.parts if part)
            if not MASK_WORDS.isdisjoint(split_name(added)):
                masks |= {name for name in files.paths if link.rule.reverse.apply(name)} - images
    return sorted((files.paths[name] for name in masks), key=natural_key)


def _pair_folders(root: Path, paths: Sequence[Path]) -> DetectedLayout | None:
    """Pair two folders such as ``CameraRGB`` and ``CameraSeg``, if they have the same names.

    What their names have in common need not be learned then, which takes longer for many files.
    """
    folders: dict[Path, dict[str, Path]] = defaultdict(dict)
    for path in paths:
        folders[path.parent][path.stem] = path
    if [folder.parent for folder in folders] != [root, root]:
        return None
    files, other_files = folders.values()
    is_complete = len(files) + len(other_files) == len(paths)
    if not is_complete or files.keys() != other_files.keys() or any("." in name for name in files):
        return None
    roles = _roles_of_folders([folder.name for folder in folders], files)
    if {*roles} != {"image", "mask"}:
        return None
    images, masks = (files, other_files) if roles[0] == "image" else (other_files, files)
    note = describe_constant_shape(masks.values())
    first = next(iter(images))
    return DetectedLayout(
        _name_layout(images[first], (masks[first],)),
        tuple(Pair(image, masks[name]) for name, image in images.items()),
        notes=(note,) if note else (),
    )


def _roles_of_folders(folders: Sequence[str], files: Iterable[str]) -> list[str]:
    """Return the roles of two folders by words of theirs; none if files have such words too."""
    words_of_files = [frozenset(split_name(name.casefold())) for name in files]
    constant = frozenset.intersection(*words_of_files)
    varying = frozenset.union(*words_of_files) - constant
    one, other = ({*map(str.casefold, split_folder(folder))} - constant for folder in folders)
    role_words = IMAGE_WORDS | MASK_WORDS | OTHER_WORDS
    if varying & role_words or SPLIT_FOLDERS.keys() & {*constant, *varying, *one, *other}:
        return []
    return [role_of_words(one - other), role_of_words(other - one)]


def _leave_out_variants(paths: Sequence[Path]) -> list[Path]:
    """Leave out the colours and instances of Cityscapes and IDD, which lie beside the ids."""
    for end in (f"_{name}" for name in TABLES_BY_NAME):
        folders = {path.parent for path in paths if path.stem.endswith(end)}
        if folders:
            return [path for path in paths if path.parent not in folders or path.stem.endswith(end)]
    return list(paths)


def _to_layout(parts: Sequence[ChosenPairs], files: NamedFiles) -> DetectedLayout:
    """Make the pairs, and sort the other files into those without a partner and foreign ones.

    Raises:
        DataError: Two images have one mask, or several masks of an image cannot be joined.
    """
    found = {
        files.paths[image]: tuple(
            files.paths[name] for name in (mask, *part.further.get(image, ()))
        )
        for part in parts
        for image, mask in part.link.partners.items()
    }
    used = {name for part in parts for name in part.others}
    images, masks, foreign = _sort_rest(
        [path for name, path in files.paths.items() if name not in used], parts, files
    )
    images, foreign = _add_empty_folders(images, foreign, found, files)
    splits = find_splits([*found, *images], files.root, files.paths.values())
    splits = split_by_masks(splits, {image: masks[0] for image, masks in found.items()}, files.root)
    images, left = leave_for_prediction(images, splits, {splits[path] for path in found})
    layout = _name_layout(*next(iter(found.items())))
    pairs, classes = join_masks(found, splits)
    chosen = tuple(note for part in parts for note in part.notes)
    constant = "" if chosen else describe_constant_shape(masks[0] for masks in found.values())
    joined = describe_joined(pairs)
    notes = (*chosen, *left, *filter(None, (constant, joined)))
    if foreign:
        _refuse_other_masks(foreign, found, files)
        notes += (describe_foreign(foreign, files.root),)
    notes += _describe_possible_classes(found)
    return DetectedLayout(
        layout,
        tuple(sorted(pairs, key=lambda pair: natural_key(pair.image))),
        # VOC has masks for some of its images only.
        () if layout == "voc" else images,
        masks,
        classes,
        notes=notes,
        unnamed=images if layout == "voc" else (),
        field_of_view=next((part.field_of_view for part in parts if part.field_of_view), ""),
    )


def _name_layout(image: Path, masks: Sequence[Path]) -> str:
    folders = [part.casefold() for part in image.parts[:-1]]
    for folder, layout in _LAYOUTS.items():
        if folder in folders:
            return layout
    if masks[0].parent == image.parent:
        return "one folder"
    is_camvid = masks[0].parent.name.casefold() in {
        folders[-1] + gap + "annot" for gap in ("", "_")
    }
    return "camvid" if is_camvid else "folders"


def _sort_rest(
    rest: Sequence[Path], parts: Sequence[ChosenPairs], files: NamedFiles
) -> tuple[tuple[Path, ...], tuple[Path, ...], tuple[Path, ...]]:
    """Sort files without a partner into images, masks and foreign files, by their folders."""
    names = {path: name for name, path in files.paths.items()}
    images: list[Path] = []
    masks: list[Path] = []
    foreign: list[Path] = []
    places: dict[str, set[str]] = defaultdict(set)
    for part in parts:
        for one, other in part.link.partners.items():
            places[generalize_folder(one)].add("image")
            places[generalize_folder(other)].add("mask")
    for path in rest:
        name = names[path]
        kinds = places.get(generalize_folder(name), set())
        if len(kinds) == 2:
            is_mask = any(part.link.rule.reverse.apply(name) for part in parts)
            kinds = {"mask" if is_mask else "image"}
        (images if "image" in kinds else masks if "mask" in kinds else foreign).append(path)
    return tuple(images), tuple(masks), tuple(foreign)


def _add_empty_folders(
    images: tuple[Path, ...], foreign: tuple[Path, ...], found: Iterable[Path], files: NamedFiles
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Move images in folders called ``good`` and the like from foreign files to those without mask.

    Beside them are folders of images with masks, of which they are not another channel: ``normal``
    may also have the surface normals of the same images.
    """
    labelled = set(found)
    places = {(_words_beside(path.parent, files), path.suffix.lower()) for path in labelled}
    groups: dict[frozenset[str], list[Path]] = defaultdict(list)
    for path in files.paths.values():
        folder = _find_empty_folder(path, files.root)
        words = _words_beside(folder or path, files)
        kinds = (place for place, suffix in places if suffix == path.suffix.lower())
        if folder and any(words <= place for place in kinds):
            groups[words].append(path)
    keys = {_key_of_number(path) for path in (*labelled, *images)}
    empty = {
        path
        for group in groups.values()
        if labelled.isdisjoint(group) and not keys.issuperset(map(_key_of_number, group))
        for path in group
    }
    added = (*images, *sorted(empty - {*images}, key=natural_key))
    return added, tuple(path for path in foreign if path not in empty)


def _find_empty_folder(path: Path, root: Path) -> Path | None:
    """Return the folder called ``good`` and the like in which an image lies, if it does."""
    if words_of_folder(path.parent) & MASK_WORDS:
        return None
    for folder in (path.parent, path.parent.parent):
        if root not in folder.parents:
            return None
        words = [part.casefold() for part in split_folder(folder.name) if part.isalpha()]
        if "".join(word for word in words if word not in IMAGE_WORDS) in _EMPTY_FOLDERS:
            return folder
    return None


def _words_beside(folder: Path, files: NamedFiles) -> frozenset[str]:
    """Return the words in the path of a folder's parent, without the names of splits."""
    if folder == files.root:
        return frozenset()
    parts = split_name(folder.parent.relative_to(files.root).as_posix().casefold())
    return frozenset(part for part in parts if part.isalnum() and part not in SPLIT_FOLDERS)


def _key_of_number(path: Path) -> str:
    """Return the numbers in a file's name, or its stem if it has none."""
    return " ".join(re.findall("[0-9]+", path.stem)) or path.stem


def _describe_possible_classes(found: Mapping[Path, tuple[Path, ...]]) -> tuple[str, ...]:
    """Say that folders or words in names may be classes, if masks have two values."""
    note = _describe_mask_folders(found) or _describe_mask_words(found) or _describe_folders(found)
    return (note,) if note and is_two_valued(next(iter(found.values()))[0]) else ()


def _describe_mask_folders(found: Mapping[Path, tuple[Path, ...]]) -> str:
    """Say that folders which only masks have may be classes, or return ``""``."""
    folders = sorted({masks[0].parent for masks in found.values()})
    names = [folder.name for folder in folders]
    if (
        len(folders) < 2
        or len({image.parent for image in found}) > 1
        or len({folder.parent for folder in folders}) > 1
        or any(not name.isalpha() or name.casefold() in SPLIT_FOLDERS for name in names)
    ):
        return ""
    return (
        f"the masks are in the folders {', '.join(names[:_NUM_NAMED])}, and the images in one "
        "folder; if each folder is a class, list the folders under [masks] in dataset.toml, "
        "otherwise ignore this note"
    )


def _describe_folders(found: Mapping[Path, tuple[Path, ...]]) -> str:
    """Say that folders of images and masks may be classes, or return ``""``."""
    shared = [{*image.parent.parts} & {*masks[0].parent.parts} for image, masks in found.items()]
    constant = set.intersection(*shared)
    own = Counter(" ".join(each - constant) for each in shared)
    names = [name for name, count in own.items() if count > 1 and re.fullmatch(r"[^\d.,]+", name)]
    words = {word.casefold() for name in names for word in split_name(name)}
    if not 2 <= len(names) == len(own) <= _MAX_CLASS_FOLDERS or words & {
        *SPLIT_FOLDERS,
        *IMAGE_WORDS,
        *MASK_WORDS,
    }:
        return ""
    return (
        f"the images and masks are in the folders {', '.join(sorted(names)[:_NUM_NAMED])}; if each "
        "folder is a class, list a glob of its masks under [masks] in dataset.toml, otherwise "
        "ignore this note"
    )


def _describe_mask_words(found: Mapping[Path, tuple[Path, ...]]) -> str:
    """Say that words in the names of masks may be classes, or return ``""``."""
    counts: Counter[str] = Counter()
    for image, masks in found.items():
        words = [set(split_name(plain_stem(path).casefold())) for path in (image, masks[0])]
        own = words[1] - words[0] - MASK_WORDS
        counts[" ".join(sorted(word for word in own if word.isalpha()))] += 1
    if len(counts) < 2 or "" in counts or min(counts.values()) < 2:
        return ""
    return (
        f"the names of the masks contain {', '.join(sorted(counts)[:_NUM_NAMED])}; if each is a "
        "class, list a glob for each under [masks] in dataset.toml, otherwise ignore this note"
    )


def _refuse_other_masks(
    foreign: Sequence[Path], found: Mapping[Path, tuple[Path, ...]], files: NamedFiles
) -> None:
    """Refuse pairs if as many other files are called masks, which may be the truth.

    Raises:
        OpenChoiceError: There are such files.
    """
    names = {path: name for name, path in files.paths.items()}
    groups: dict[str, list[str]] = defaultdict(list)
    for path in foreign:
        groups[generalize_folder(names[path])].append(names[path])
    taken = files.constants(names[masks[0]] for masks in found.values())
    for group in groups.values():
        words = files.constants(group)
        # Masks that are called alike are the same in another form.
        if (
            2 * len(group) > len(found)
            and words & MASK_WORDS
            and not words & ((OTHER_WORDS - taken) | (MASK_WORDS & taken))
        ):
            chosen = {image: masks[0] for image, masks in found.items()}
            raise OpenChoiceError(
                f"it is unclear which files are the masks: '{next(iter(chosen.values()))}' and "
                f"others have the names of images, but {format_count(len(group), 'other file')} "
                f"such as '{files.paths[group[0]]}' are called masks, too",
                [Candidate("", chosen), *_match_series(found, group, files)],
            )


def _match_series(
    images: Iterable[Path], names: Iterable[str], files: NamedFiles
) -> Iterator[Candidate]:
    """Yield files as the masks of images, those that are called alike together."""
    series: dict[str, dict[str, Path]] = defaultdict(dict)
    for name in names:
        series[re.sub("[0-9]+", "0", name.rpartition("/")[2])][name] = files.paths[name]
    listed = {name: path for name, path in files.paths.items() if path in {*images}}
    for masks in series.values():
        pairs = match_lists(listed, masks).pairs
        if 2 * len(pairs) > len(listed):
            yield Candidate("", dict(pairs))


def describe_foreign(foreign: Sequence[Path], root: Path) -> str:
    """Say which files are left out."""
    shown = ", ".join(f"'{path.relative_to(root)}'" for path in foreign[:_NUM_NAMED])
    more = f" and {len(foreign) - _NUM_NAMED} more" if len(foreign) > _NUM_NAMED else ""
    return (
        f"{format_count(len(foreign), 'other file')} left out, because no image or mask belongs "
        f"to {'it' if len(foreign) == 1 else 'them'}: {shown}{more}"
    )
