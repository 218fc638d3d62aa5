"""A folder of image files -> pairs of images and masks, in natural order (1, 2, 10).

The names say which files belong together (:mod:`useg.data.names`), wherever they lie. Words such as
``images`` and ``mask`` say which of them are the masks; where they do not, the pixels do.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from useg.classes import ClassTable
from useg.data.dataset import SPLIT_FOLDERS, DetectedLayout, Instances, Pair, pick_evenly
from useg.data.names import (
    IMAGE_WORDS,
    MASK_WORDS,
    Link,
    common_glob,
    fold_parts,
    learn_links,
    merge_folders,
    name_files,
    plain_stem,
    split_folder,
    split_name,
    split_path,
)
from useg.data.official_splits import (
    find_official_split,
    learn_rests,
    leave_for_prediction,
    split_by_stems,
)
from useg.data.truth import (
    OTHER_WORDS,
    Candidate,
    OpenChoiceError,
    choose_truth,
    describe_constant_shape,
    is_photograph,
    is_two_valued,
)
from useg.errors import DataError, UsageError, format_count
from useg.images.files import list_image_files, natural_key, read_size

# Words that say what a file is, not which image it belongs to: 'road_7_mask' and 'road_7',
# 'img_001' and 'mask_001', the names of Cityscapes and ISIC.
_ROLE_WORDS = (
    "image|img|rgb|sat|leftimg8bit|mask|masks|label|labels|labelids|labeltrainids|lbl|lab|seg|segm"
    "|segmentation|gt|gtfine|groundtruth|truth|annotation|annot|anno|ann|target|volume|stack|l"
)
_ROLE_SUFFIX = re.compile(rf"[_\-. ](?:{_ROLE_WORDS})$", re.IGNORECASE)
_ROLE_PREFIX = re.compile(rf"^(?:{_ROLE_WORDS})[_\-. ]?(?=\d)", re.IGNORECASE)

# The number of one of several masks of an image, at the end of its name.
_COUNTER = re.compile(r"[_\-. ]*\(?[0-9]+\)?$")

# Names of folders that tell published layouts apart.
_LAYOUTS = {"camerargb": "carla", "leftimg8bit": "cityscapes", "jpegimages": "voc"}

# Files whose pixels tell images from masks, of each set of files.
_NUM_LOOKED_AT = 4
# Among more files than this, a rule for a single pair is an accident.
_MAX_FILES_OF_ONE_PAIR = 5
# A set of masks for a smaller share of the images is not weighed against the others.
_MIN_RIVAL_SHARE = 0.1
_NUM_NAMED = 3


def strip_role_words(key: str) -> str:
    """Remove the words that say what a file is: ``city/a_gtFine_labelIds`` -> ``city/a``.

    A file name never becomes empty.
    """
    folder, slash, stem = key.rpartition("/")
    while (shorter := _ROLE_SUFFIX.sub("", stem)) not in ("", stem):
        stem = shorter
    return folder + slash + (_ROLE_PREFIX.sub("", stem) or stem).casefold()


@dataclass(frozen=True)
class MatchedFiles:
    """Images and masks that belong together, and those without a partner."""

    pairs: tuple[tuple[Path, Path], ...]
    images: tuple[Path, ...]
    masks: tuple[Path, ...]


def match_lists(images: Mapping[str, Path], masks: Mapping[str, Path]) -> MatchedFiles:
    """Pair the images of one list with the masks of another by what is constant in their names.

    Equal names come first. A rule (:class:`useg.data.names.Rule`) pairs what they leave.

    Raises:
        DataError: Two images have the same mask.
    """
    pairs = {name: name for name in images if name in masks}
    if not pairs:
        folded = [_fold_names(names) for names in (images, masks)]
        pairs = {folded[0][name]: folded[1][name] for name in folded[0] if name in folded[1]}
    while True:
        rest = [name for name in images if name not in pairs]
        taken = set(pairs.values())
        others = [name for name in masks if name not in taken]
        links = learn_links(rest, others) if rest and others else []
        # A rule for one of many names is an accident, unless nothing else is left.
        if not links or (pairs and len(links[0].partners) * 10 < min(len(rest), len(others))):
            break
        pairs |= links[0].partners
    found = [(images[name], masks[other]) for name, other in pairs.items()]
    taken = set(pairs.values())
    return MatchedFiles(
        tuple(sorted(found, key=lambda pair: natural_key(pair[0]))),
        tuple(path for name, path in images.items() if name not in pairs),
        tuple(path for name, path in masks.items() if name not in taken),
    )


def _fold_names(names: Iterable[str]) -> dict[str, str]:
    """Return names by what they are without capitals and leading zeros, if that is unique."""
    listed = list(names)
    folded = {fold_parts(split_name(name)): name for name in listed}
    return folded if len(folded) == len(listed) else {}


def _kind_of_words(found: Collection[str]) -> str:
    """Return ``image`` or ``mask`` if words say so, or ``""``."""
    kinds = [
        kind
        for kind, words in (("image", IMAGE_WORDS), ("mask", MASK_WORDS))
        if not words.isdisjoint(found)
    ]
    return kinds[0] if len(kinds) == 1 else ""


class _Files:
    """The image files of a folder by their names, and what is known about them."""

    def __init__(self, root: Path, paths: Sequence[Path]) -> None:
        self.root = root
        self.paths = name_files(paths, root)
        self._photographs: dict[str, bool | None] = {}

    @cached_property
    def parts(self) -> dict[str, frozenset[str]]:
        """The words and numbers in each path, in lower case."""
        return {
            name: frozenset(part.casefold() for part in split_path(path, self.root))
            for name, path in self.paths.items()
        }

    @cached_property
    def common(self) -> frozenset[str]:
        """Parts of every name."""
        return frozenset.intersection(*self.parts.values())

    def constants(self, names: Iterable[str]) -> frozenset[str]:
        """Return the parts that all of these names have, but not all names."""
        return frozenset.intersection(*(self.parts[name] for name in names)) - self.common

    def kind_by_words(self, names: Iterable[str], others: Iterable[str]) -> str:
        """Return ``image`` or ``mask`` if constant words that others lack say so, or ``""``."""
        return _kind_of_words(self.constants(names) - self.constants(others))

    def kind_by_pixels(self, names: Iterable[str]) -> str:
        """Return ``image`` or ``mask`` by the pixels of a few files, or ``mixed``."""
        chosen = pick_evenly(sorted(names), _NUM_LOOKED_AT)
        for name in chosen:
            if name not in self._photographs:
                self._photographs[name] = is_photograph(self.paths[name])
        kinds = {self._photographs[name] for name in chosen} - {None}
        return ("image" if kinds.pop() else "mask") if len(kinds) == 1 else "mixed"

    def is_series(self, names: Iterable[str]) -> bool:
        """Return whether most of the files beside these that fit one glob are these."""
        own = {self.paths[name] for name in names}
        pattern = common_glob(list(own), self.root, self.paths.values()).rpartition("/")[2]
        places = {path.parent for path in own}
        fitting = [
            path
            for path in self.paths.values()
            if path.parent in places and fnmatchcase(path.name, pattern)
        ]
        return 2 * len(own) > len(fitting)

    def name_sets(self, sets: Sequence[Iterable[str]]) -> list[str]:
        """Return a glob for each set of files; where two are equal, with its first file."""
        listed = [[self.paths[name] for name in names] for names in sets]
        globs = [common_glob(paths, self.root, self.paths.values()) for paths in listed]
        return [
            f"{glob} (such as {min(paths).relative_to(self.root).as_posix()})"
            if globs.count(glob) > 1
            else glob
            for glob, paths in zip(globs, listed, strict=True)
        ]


def find_pairs(root: Path) -> DetectedLayout | None:
    """Pair the images and masks in a folder, or return None if no names agree.

    Raises:
        OpenChoiceError: Several sets of files could be the masks, or the images.
        DataError: Two images have the same mask, or a folder cannot be read.
    """
    paths = _leave_out_variants(list_image_files(root))
    if len(paths) < 2:
        return None
    found = _pair_folders(root, paths) or _find_objects(root, paths)
    if found is not None:
        return found
    files = _Files(root, paths)
    links = _sort_links(_learn_links(files), files)
    parts = list(_choose_parts(links, files))
    return _to_layout(parts, files) if parts else None


def find_photographs_alike(root: Path) -> str:
    """Return two sets of files whose names agree and whose pixels all look like photographs."""
    paths = list_image_files(root)
    if len(paths) < 2:
        return ""
    files = _Files(root, paths)
    for link in learn_links(list(files.paths))[:1]:
        sides = [set(link.partners), set(link.partners.values())]
        if 4 * len(sides[0]) > len(paths) and {*map(files.kind_by_pixels, sides)} == {"image"}:
            return " and ".join(files.name_sets(sides))
    return ""


def find_masks(paths: Sequence[Path], root: Path) -> list[Path]:
    """Return which of some image files are evidently masks of others, by names and by pixels."""
    files = _Files(root, paths)
    images: set[str] = set()
    masks: set[str] = set()
    for link in _sort_links(_learn_links(files), files):
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
    places = list(folders)
    if [place.parent for place in places] != [root, root] or 2 * len(folders[places[0]]) != len(
        paths
    ):
        return None
    names = folders[places[0]].keys()
    if names != folders[places[1]].keys() or any("." in name for name in names):
        return None
    words_of = [frozenset(split_name(name.casefold())) for name in names]
    constant = frozenset.intersection(*words_of)
    found = [{word.casefold() for word in split_folder(place.name)} - constant for place in places]
    kinds = [_kind_of_words(found[0] - found[1]), _kind_of_words(found[1] - found[0])]
    varying = frozenset.union(*words_of) - constant
    roles = IMAGE_WORDS | MASK_WORDS | OTHER_WORDS
    if (
        {*kinds} != {"image", "mask"}
        or varying & roles
        or SPLIT_FOLDERS.keys() & {*constant, *varying, *found[0], *found[1]}
    ):
        return None
    images, masks = (folders[places[kinds.index(kind)]] for kind in ("image", "mask"))
    note = describe_constant_shape(masks.values())
    return DetectedLayout(
        _name_layout(*next((image, (masks[name],)) for name, image in images.items())),
        tuple(Pair(image, masks[name]) for name, image in images.items()),
        notes=(note,) if note else (),
    )


def _learn_links(files: _Files) -> list[Link]:
    """Learn the links between the names, also without the folders that only images or masks have.

    So ``images/P1/a`` and ``images/P2/b`` follow one rule, although the masks are ``masks/a`` and
    ``masks/b``.
    """
    links = learn_links(list(files.paths))
    merged = merge_folders(files.paths)
    if merged == {name: name for name in merged}:
        return links
    whole = {short: name for name, short in merged.items()}
    for link in learn_links(list(whole)):
        partners = {whole[one]: whole[other] for one, other in link.partners.items()}
        links.append(Link(link.rule, partners))
    return sorted(links, key=lambda link: -len(link.partners))


def _leave_out_variants(paths: Sequence[Path]) -> list[Path]:
    """Leave out Cityscapes' colours and instances, which lie beside its ids."""
    for end in ("_labelIds", "_labelTrainIds"):
        folders = {path.parent for path in paths if path.stem.endswith(end)}
        if folders:
            return [path for path in paths if path.parent not in folders or path.stem.endswith(end)]
    return list(paths)


def _sort_links(links: Sequence[Link], files: _Files) -> list[Link]:
    """Return the links from images to masks, those of most files first; others are left out.

    Words decide what is an image. Where only one side has one, or none, the pixels must not
    contradict; a link that they do not confirm counts if there is no better one.
    """
    strong: list[tuple[bool, int, Link]] = []
    weak: list[tuple[bool, int, Link]] = []
    least = 1 if len(files.paths) <= _MAX_FILES_OF_ONE_PAIR else 2
    for link in (link for link in links if len(link.partners) >= least):
        sides = list(link.partners), list(link.partners.values())
        words = [files.kind_by_words(*sides), files.kind_by_words(*reversed(sides))]
        kinds = [files.kind_by_pixels(side) for side in sides] if "" in words else words
        is_other = any(files.constants(side) & OTHER_WORDS for side in sides)
        given = {"image": ["image", "mask"], "mask": ["mask", "image"]}
        named = given.get(words[0]) or given.get(words[1], ["", ""])[::-1]
        believed = words if "" not in words else kinds
        if set(believed) == {"image", "mask"} and named in (believed, ["", ""]):
            oriented = link if believed[0] == "image" else link.reverse
            strong.append((is_other, words.count(""), oriented))
        elif "" in words and named != ["", ""] and kinds != ["image", "image"]:
            # The pixels of images may be as plain as those of masks.
            weak.append((is_other, 1, link if named[0] == "image" else link.reverse))
    ranked = sorted(strong or weak, key=lambda item: (-len(item[2].partners), *item[:2]))
    return [link for *_, link in ranked]


@dataclass(frozen=True)
class _Part:
    """Pairs that one rule makes: ``link``, further masks of its images, and what was said."""

    link: Link
    further: Mapping[str, tuple[str, ...]]
    others: frozenset[str]
    notes: tuple[str, ...]
    field_of_view: str


def _choose_parts(links: Sequence[Link], files: _Files) -> Iterator[_Part]:
    """Choose images and masks, rule after rule: each pairs files that those before do not."""
    first = len(links[0].partners) if links else 0
    used: set[str] = set()
    while links and len(links[0].partners) * 50 >= first:
        main, note = _choose_images(links, files)
        images, masks = set(main.partners), set(main.partners.values())
        claims = _claims(images, links)
        further = _find_further_masks(main, used | claims.keys(), files)
        extra = {name for names in further.values() for name in names}
        least = min(len(images), max(2, _MIN_RIVAL_SHARE * len(images)))
        rivals = _distinct(
            link
            for link in links
            if len(link.partners) >= least
            and set(link.partners) & images
            and not set(link.partners.values()) & (masks | images | extra)
            and all(claims.get(mask, 0) < len(link.partners) for mask in link.partners.values())
        )
        choice, field_of_view = main, ""
        notes = [note] if note else []
        if rivals:
            choice, notes_of_choice, field_of_view = _choose_masks([main, *rivals], files)
            notes += notes_of_choice
        every_mask = masks | extra | {mask for link in rivals for mask in link.partners.values()}
        twins = _list_series((link.partners for link in _twins(main, links)), files)
        others = frozenset(every_mask | twins | set(choice.partners))
        kept = further if choice is main else {}
        yield _Part(choice, kept, others, tuple(notes), field_of_view)
        used |= images | others | {name for link in rivals for name in link.partners}
        links = [rest for link in links if (rest := _without(link, used)) is not None]


def _list_series(sets: Iterable[Iterable[str]], files: _Files) -> set[str]:
    """Return the files of sets that, together in one folder, are a series of their own."""
    folders: dict[str, set[str]] = defaultdict(set)
    for name in (name for names in sets for name in names):
        folders[_folder_form(name)].add(name)
    return {name for names in folders.values() if files.is_series(names) for name in names}


def _claims(images: set[str], links: Sequence[Link]) -> dict[str, int]:
    """Return the masks that a rule gives to other images, with the pairs of that rule."""
    claims: dict[str, int] = {}
    for link in links:
        if len(link.partners) > 1 and not set(link.partners) & images:
            for mask in link.partners.values():
                claims[mask] = max(len(link.partners), claims.get(mask, 0))
    return claims


def _choose_images(links: Sequence[Link], files: _Files) -> tuple[Link, str]:
    """Return the first link, or the one among several sets of images for the same masks.

    That is the set whose name has nothing that the others lack: ``images`` beside ``images_small``.

    Raises:
        OpenChoiceError: There is no such set.
    """
    main = links[0]
    images = set(main.partners)
    sets = [main, *_distinct(_twins(main, links), of_images=True)]
    sets = [link for link in sets if 2 * len(link.partners) > len(main.partners)]
    if len(sets) == 1:
        return main, ""
    names = files.name_sets([link.partners for link in sets])
    for chosen, why in _prefer_images(sets, files):
        if len(chosen) == 1:
            others = " and ".join(
                name for name, link in zip(names, sets, strict=True) if link is not chosen[0]
            )
            name = names[sets.index(chosen[0])]
            return chosen[0], (
                f"the images are {name}; the masks fit {others} too, which {why} and are not taken"
            )
    listed = ", ".join(
        f"{name} ({len(link.partners)})" for name, link in zip(names, sets, strict=True)
    )
    truths = _as_candidates(_distinct(link for link in links if set(link.partners) & images), files)
    masks_listed = ", ".join(f"{each.name} ({len(each.masks)})" for each in truths)
    raise OpenChoiceError(
        f"there are {len(sets)} sets of images for the same masks: {listed}, and it is unclear "
        f"which of them are meant. The masks are {masks_listed}",
        _as_candidates(sets, files),
        _weigh(truths),
    )


def _twins(main: Link, links: Sequence[Link]) -> list[Link]:
    """Return the links from other images to the same masks."""
    images, masks = set(main.partners), set(main.partners.values())
    return [
        link
        for link in links
        if set(link.partners.values()) & masks
        and not set(link.partners) & (images | masks)
        and not _have_own_masks(link, main, links)
    ]


def _have_own_masks(twin: Link, main: Link, links: Sequence[Link]) -> bool:
    """Return whether other images have masks of their own, by a shorter rule than the others'."""
    images, taken = set(twin.partners), {*main.partners, *main.partners.values()}
    for link in links:
        own = set(link.partners.values())
        if len(link.partners) >= len(twin.partners) and not own & taken:
            rivals = [
                other.rule.length
                for other in links
                if set(other.partners) & set(main.partners) and set(other.partners.values()) & own
            ]
            is_shorter = link.rule.length < min([twin.rule.length, *rivals])
            if is_shorter and 2 * len(images & set(link.partners)) > len(images):
                return True
    return False


def _prefer_images(sets: Sequence[Link], files: _Files) -> Iterator[tuple[list[Link], str]]:
    """Yield the sets of images that are better than the others, and what the others are."""
    constants = [files.constants(link.partners) for link in sets]
    both = list(zip(sets, constants, strict=True))
    yield [link for link in sets if _have_mask_sizes(link, files)], "have other sizes"
    plain = [link for link, own in both if all(own <= others for others in constants)]
    yield plain, "have more in their names"
    yield [link for link, own in both if own & IMAGE_WORDS], "are not called images"
    shared = [_count_shared_folders(link, files) for link in sets]
    best = max(shared)
    near = [link for link, count in zip(sets, shared, strict=True) if count == best]
    yield near, "share fewer folders with the masks"


def _count_shared_folders(link: Link, files: _Files) -> int:
    one, other = min(link.partners.items())
    folders = [set(files.paths[name].relative_to(files.root).parts[:-1]) for name in (one, other)]
    return len(folders[0] & folders[1])


def _have_mask_sizes(link: Link, files: _Files) -> bool:
    """Return whether a few images have the sizes of their masks."""
    for one in pick_evenly(sorted(link.partners), _NUM_LOOKED_AT):
        try:
            sizes = [read_size(files.paths[name], 0) for name in (one, link.partners[one])]
        except UsageError:
            continue
        if sizes[0] != sizes[1]:
            return False
    return True


def _weigh(truths: Sequence[Candidate]) -> Sequence[Candidate]:
    """Return the sets of masks that are as good as each other."""
    if len(truths) < 2:
        return truths
    try:
        return (choose_truth(truths).chosen,)
    except OpenChoiceError as error:
        return error.left


def _choose_masks(links: Sequence[Link], files: _Files) -> tuple[Link, tuple[str, ...], str]:
    candidates = _as_candidates(links, files)
    choice = choose_truth(candidates)
    view = choice.field_of_view.name if choice.field_of_view else ""
    return links[candidates.index(choice.chosen)], choice.notes, view


def _as_candidates(links: Sequence[Link], files: _Files) -> list[Candidate]:
    names = files.name_sets([link.partners.values() for link in links])
    return [
        Candidate(
            name, {files.paths[one]: files.paths[other] for one, other in link.partners.items()}
        )
        for name, link in zip(names, links, strict=True)
    ]


def _distinct(links: Iterable[Link], *, of_images: bool = False) -> list[Link]:
    """Leave out links to masks (or from images) that a longer link has too."""
    kept: list[Link] = []
    for link in sorted(links, key=lambda link: -len(link.partners)):
        side = set(link.partners if of_images else link.partners.values())
        sides = (other.partners if of_images else other.partners.values() for other in kept)
        if not any(side & set(other) for other in sides):
            kept.append(link)
    return kept


def _without(link: Link, used: set[str]) -> Link | None:
    partners = {
        one: other for one, other in link.partners.items() if one not in used and other not in used
    }
    # What is left of a rule that mostly explained other files is an accident.
    return Link(link.rule, partners) if 2 * len(partners) > len(link.partners) else None


def _find_further_masks(link: Link, claimed: set[str], files: _Files) -> dict[str, tuple[str, ...]]:
    """Find masks that are numbered beside those of a link: ``a_mask_1`` beside ``a_mask``."""
    used = {*link.partners, *link.partners.values(), *claimed}
    stems = {name: _stem_parts(plain_stem(files.paths[name])) for name in link.partners}
    shared = frozenset.intersection(*stems.values()) if len(stems) > 1 else frozenset()
    owners: dict[tuple[Path, str], set[str]] = defaultdict(set)
    for image, mask in link.partners.items():
        path = files.paths[mask]
        for stem in {plain_stem(path), _COUNTER.sub("", plain_stem(path))}:
            if stems[image] - shared <= _stem_parts(stem):
                owners[path.parent, stem].add(image)
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(set(files.paths) - used, key=natural_key):
        path = files.paths[name]
        images = owners.get((path.parent, _COUNTER.sub("", plain_stem(path))), set())
        if len(images) == 1:
            found[next(iter(images))].append(name)
    return {image: tuple(names) for image, names in found.items()}


def _stem_parts(stem: str) -> frozenset[str]:
    """Return the words and numbers in a name, in lower case and without leading zeros."""
    return frozenset(
        part.casefold().lstrip("0") or "0" for part in split_name(stem) if part.isalnum()
    )


def _find_objects(root: Path, paths: Sequence[Path]) -> DetectedLayout | None:
    """Pair each image with a folder of masks, one per object: ``ID/images/ID.png``, ``ID/masks/``.

    The folder may also be called like the image: ``images/ID.png``, ``masks/ID/0.png``.
    """
    folders: dict[Path, list[Path]] = defaultdict(list)
    for path in paths:
        folders[path.parent].append(path)
    stems: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        stems[plain_stem(path)].append(path)
    places = []
    for folder, masks in folders.items():
        image = _image_of_folder(folder, folders, stems)
        if image is not None and image not in masks:
            places.append((image, folder, masks))
    several = [masks for image, _, masks in places if len(masks) > 1]
    names = Counter(path.stem for _, _, masks in places for path in masks)
    words = [stem for stem, count in names.items() if count > 2 and not re.search(r"[0-9]", stem)]
    covered = sum(1 + len(masks) for _, _, masks in places)
    if (
        len(places) < 2
        or not several
        or words
        or 2 * covered < len(paths)
        or any(_has_own_mask(image, masks) for image, _, masks in places)
        or is_photograph(several[0][0])
    ):
        return None
    pairs = (
        Pair(image, folder, find_official_split(image, root), truth=Instances(tuple(masks)))
        for image, folder, masks in places
    )
    return DetectedLayout(
        "instances",
        tuple(sorted(pairs, key=lambda pair: pair.image)),
        classes=ClassTable(("background", "foreground")),
    )


def _has_own_mask(image: Path, masks: Sequence[Path]) -> bool:
    """Return whether one of several masks is called like the image, so that it is no object."""
    core = strip_role_words(image.stem)
    own = [path for path in masks if core in path.stem.casefold()]
    return 0 < len(own) < len(masks) or image.stem in {path.stem for path in masks}


def _image_of_folder(
    folder: Path, folders: Mapping[Path, list[Path]], stems: Mapping[str, list[Path]]
) -> Path | None:
    """Return the only image in the folder beside one of masks, or the image of its name."""
    words = {part.casefold() for part in split_name(folder.name)}
    if words & MASK_WORDS:
        beside = [
            files
            for other, files in folders.items()
            if other.parent == folder.parent
            and {part.casefold() for part in split_name(other.name)} & IMAGE_WORDS
        ] or [folders.get(folder.parent, [])]
        return beside[0][0] if len(beside) == 1 and len(beside[0]) == 1 else None
    named = [path for path in stems.get(folder.name, []) if path.parent not in folder.parents]
    return named[0] if len(named) == 1 and named[0].parent != folder else None


def _to_layout(parts: Sequence[_Part], files: _Files) -> DetectedLayout:
    """Make the pairs, and sort the other files into those without a partner and foreign ones.

    Raises:
        DataError: Two images have one mask, or several masks of an image cannot be joined.
    """
    root = files.root
    found: dict[Path, tuple[Path, ...]] = {}
    for part in parts:
        for one, other in part.link.partners.items():
            more = part.further.get(one, ())
            found[files.paths[one]] = tuple(files.paths[name] for name in (other, *more))
    used = {name for part in parts for name in part.others}
    images, masks, foreign = _sort_rest(
        [path for name, path in files.paths.items() if name not in used], parts, files
    )
    rests = learn_rests({part for path in files.paths.values() for part in path.parts})
    everything = [*found, *images]
    splits = {path: find_official_split(path, root, rests) for path in everything}
    if not any(splits.values()):
        splits |= split_by_stems(everything)
    labelled = {splits[path] for path in found}
    images, notes = leave_for_prediction(images, splits, labelled)
    layout = _name_layout(*next(iter(found.items())))
    pairs, classes = _join_masks(found, splits)
    notes = (*(note for part in parts for note in part.notes), *notes)
    if not any(part.notes for part in parts):
        constant = describe_constant_shape(masks[0] for masks in found.values())
        notes += (constant,) if constant else ()
    if foreign:
        notes += (_describe_foreign(foreign, root),)
    return DetectedLayout(
        layout,
        tuple(sorted(pairs, key=lambda pair: natural_key(pair.image))),
        # VOC has masks for some of its images only.
        () if layout == "voc" else images,
        masks,
        classes,
        notes=notes,
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


def _join_masks(
    found: Mapping[Path, tuple[Path, ...]], splits: Mapping[Path, str]
) -> tuple[list[Pair], ClassTable | None]:
    """Make pairs; several masks of one image are joined if each has two values."""
    several = [masks for masks in found.values() if len(masks) > 1]
    if not several:
        return [Pair(image, masks[0], splits[image]) for image, masks in found.items()], None
    for masks in several:
        if not all(map(is_two_valued, masks)):
            listed = ", ".join(f"'{path}'" for path in masks)
            raise DataError(
                f"one image has several masks ({listed}) with more than two values, so they cannot "
                "be joined; choose those that count in a dataset.toml"
            )
    return [
        Pair(image, masks[0], splits[image], truth=Instances(masks))
        for image, masks in found.items()
    ], ClassTable(("background", "foreground"))


def _sort_rest(
    rest: Sequence[Path], parts: Sequence[_Part], files: _Files
) -> tuple[tuple[Path, ...], tuple[Path, ...], tuple[Path, ...]]:
    """Sort files without a partner into images, masks and foreign files, by their folders."""
    names = {path: name for name, path in files.paths.items()}
    images: list[Path] = []
    masks: list[Path] = []
    foreign: list[Path] = []
    places: dict[str, set[str]] = defaultdict(set)
    for part in parts:
        for one, other in part.link.partners.items():
            places[_folder_form(one)].add("image")
            places[_folder_form(other)].add("mask")
    for path in rest:
        name = names[path]
        kinds = places.get(_folder_form(name), set())
        if len(kinds) == 2:
            is_mask = any(part.link.rule.reverse.apply(name) for part in parts)
            kinds = {"mask" if is_mask else "image"}
        (images if "image" in kinds else masks if "mask" in kinds else foreign).append(path)
    return tuple(images), tuple(masks), tuple(foreign)


def _folder_form(name: str) -> str:
    """Return a file's folder without the names of splits and numbers."""
    parts = split_name(name.rpartition("/")[0])
    return "".join(
        "*" if part in SPLIT_FOLDERS else "0" if part.isdecimal() else part for part in parts
    )


def _describe_foreign(foreign: Sequence[Path], root: Path) -> str:
    shown = ", ".join(f"'{path.relative_to(root)}'" for path in foreign[:_NUM_NAMED])
    more = f" and {len(foreign) - _NUM_NAMED} more" if len(foreign) > _NUM_NAMED else ""
    return (
        f"{format_count(len(foreign), 'other file')} left out, which no image or mask goes with: "
        f"{shown}{more}"
    )
