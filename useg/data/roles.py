"""File names that belong together -> links from images to masks.

Words such as ``images`` and ``mask`` decide which of two files is the image; without them, the
pixels do.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from useg.data.dataset import SPLIT_FOLDERS, pick_evenly
from useg.data.file_names import (
    IMAGE_WORDS,
    MASK_WORDS,
    Link,
    drop_repeated_folders,
    learn_links,
    learn_starts,
    merge_folders,
    name_files,
    replaces_number,
    role_of_words,
    split_path,
)
from useg.data.globs import common_glob
from useg.data.ground_truth import (
    OTHER_WORDS,
    PREDICTION_WORDS,
)
from useg.data.mask_content import has_transparent_part, is_photograph

# Before how often a part of a name has occurred.
_REPEATED = "/"
# Files whose pixels tell images from masks, of each set of files.
_NUM_SAMPLED = 4
# Among more files than this, a rule for a single pair is an accident.
_MAX_FILES_OF_ONE_PAIR = 5
# Words for images that have masks, as in labeled_train/images, and not only for masks.
_HAVING_MASKS = frozenset(["labeled", "labelled"])
# A number that tells masks from images is that of at least so many of all files.
_MIN_CONSTANT_SHARE = 0.1
# Most folders that are compared with each other, if no rule connects the names.
_MAX_FOLDERS = 12


def _number_repeated(parts: Iterable[str]) -> Iterator[str]:
    """Yield parts, the second of two equal ones as another one."""
    counts: Counter[str] = Counter()
    for part in parts:
        counts[part] += 1
        yield f"{part}{_REPEATED}{counts[part]}" if counts[part] > 1 else part


class NamedFiles:
    """The image files of a folder by their names, and what is known about them."""

    def __init__(self, root: Path, paths: Sequence[Path]) -> None:
        self.root = root
        self.paths = name_files(paths, root)
        self._photographs: dict[str, bool | None] = {}

    @cached_property
    def parts(self) -> dict[str, frozenset[str]]:
        """The words and numbers in each path, in lower case; one that is repeated counts again."""
        return {
            name: frozenset(_number_repeated(map(str.casefold, split_path(path, self.root))))
            for name, path in self.paths.items()
        }

    @cached_property
    def common(self) -> frozenset[str]:
        """Parts of every name."""
        return frozenset.intersection(*self.parts.values())

    def constants(self, names: Iterable[str]) -> frozenset[str]:
        """Return the parts that all of these names have, but not all names.

        Those in the folder count even if all names of files have them: ``image/image_1``.
        """
        found = frozenset.intersection(*(self.parts[name] for name in names)) - self.common
        return frozenset(part.partition(_REPEATED)[0] for part in found)

    def kind_by_words(self, names: Iterable[str], others: Iterable[str]) -> str:
        """Return ``image`` or ``mask`` if constant words that others lack say so, or ``""``."""
        return role_of_words(self.constants(names) - self.constants(others))

    def kind_by_pixels(self, names: Iterable[str]) -> str:
        """Return ``image`` or ``mask`` by the pixels of a few files, or ``mixed``."""
        chosen = pick_evenly(sorted(names), _NUM_SAMPLED)
        for name in chosen:
            if name not in self._photographs:
                self._photographs[name] = is_photograph(self.paths[name])
        kinds = {self._photographs[name] for name in chosen} - {None}
        return ("image" if kinds.pop() else "mask") if len(kinds) == 1 else "mixed"

    def kinds_by_alpha(self, sides: Sequence[Sequence[str]]) -> list[str]:
        """Return ``mask`` for photographs with a transparent part, if the others have none.

        Programs that remove backgrounds write such files.
        """
        are_cut = [
            all(has_transparent_part(self.paths[name]) for name in pick_evenly(side, _NUM_SAMPLED))
            for side in sides
        ]
        return ["mask" if is_cut and not all(are_cut) else "image" for is_cut in are_cut]

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


def _learn_links(files: NamedFiles) -> list[Link]:
    """Learn the links between the names, also without the folders that only images or masks have.

    So ``images/P1/a`` and ``images/P2/b`` follow one rule, although the masks are ``masks/a`` and
    ``masks/b``; and so do ``masks/a/a_cup`` and ``masks/b/b_cup`` beside ``images/a`` and
    ``images/b``.
    """
    links = learn_links(list(files.paths))
    for shorten in (merge_folders, drop_repeated_folders):
        short = shorten(files.paths)
        whole = {plain: name for name, plain in short.items()}
        if list(whole) == list(files.paths):
            continue
        counts = Counter(map(_replace_numbers, whole))
        for link in learn_links(list(whole)):
            if _takes_most(link, counts):
                partners = {whole[one]: whole[other] for one, other in link.partners.items()}
                links.append(Link(link.rule, partners))
    return sorted(links, key=lambda link: -len(link.partners))


def _replace_numbers(name: str) -> str:
    return re.sub("[0-9]+", "0", name)


def _takes_most(link: Link, counts: Counter[str]) -> bool:
    """Whether a link leads to at least half of the names that differ from these by numbers.

    Objects that are numbered for each image are more, and rules fit some of them by accident.

    Args:
        link: A link between files.
        counts: How many files have each name, with every number replaced by 0.
    """
    kinds = set(map(_replace_numbers, link.partners.values()))
    return 2 * len(link.partners) >= sum(counts[kind] for kind in kinds)


@dataclass(frozen=True)
class _OrientedLink:
    """A link from images to masks.

    Args:
        link: The link.
        is_confirmed: Whether words or pixels confirm the roles of both sides.
        is_other: Whether words say that a side is something else, such as depth.
        num_unnamed: How many sides have no word that says their role.
    """

    link: Link
    is_confirmed: bool
    is_other: bool
    num_unnamed: int

    @property
    def rank(self) -> tuple[int, bool, int]:
        """The sort key: links of many files first."""
        return -len(self.link.partners), self.is_other, self.num_unnamed


def links_to_masks(files: NamedFiles) -> list[Link]:
    """Return the links from images to masks, those of most files first; others are left out.

    Words decide what is an image. Where only one side has one, or none, the pixels must not
    contradict; a link that they do not confirm counts if there is no better one.
    """
    least = 1 if len(files.paths) <= _MAX_FILES_OF_ONE_PAIR else 2
    links = [link for link in _learn_links(files) if len(link.partners) >= least]
    links = [link for link in links if not _is_accident(link, len(files.paths))]
    found = [oriented for link in links if (oriented := _orient(link, files))]
    most = max((len(each.link.partners) for each in found), default=0)
    if 4 * most < len(files.paths):
        starts = [link for link in _learn_starts(files) if len(link.partners) >= 2 * most]
        begun = [oriented for link in starts if (oriented := _orient(link, files))]
        images = [image for each in begun for image in each.link.partners]
        # Several masks of one image are those of its objects.
        found = begun if begun and len({*images}) == len(images) else found
    confirmed = [each for each in found if each.is_confirmed]
    ranked = sorted(confirmed or found, key=lambda each: each.rank)
    return _leave_out_predictions(_leave_out_exchanged([each.link for each in ranked]), files)


def _leave_out_exchanged(links: Sequence[Link]) -> list[Link]:
    """Leave out links that exchange words if others, for the same files, do not.

    If ``a_left`` becomes ``left_a``, and ``a_right`` ``right_a``, no ``a_left`` becomes
    ``right_a``. Words such as ``image`` and ``mask`` may be exchanged.
    """
    plain = [link.partners for link in links if not _exchanges_words(link)]
    images = {frozenset(partners) for partners in plain}
    masks = {frozenset(partners.values()) for partners in plain}
    return [
        link
        for link in links
        if link.partners in plain
        or frozenset(link.partners) not in images
        or frozenset(link.partners.values()) not in masks
    ]


def _exchanges_words(link: Link) -> bool:
    words = [{*filter(str.isalnum, changed)} for changed in link.rule.changes]
    return bool((words[0] | words[1]) - IMAGE_WORDS - MASK_WORDS)


def _is_accident(link: Link, num_files: int) -> bool:
    """Whether a link replaces a number in the names of few files, such as ``raw/a_6 -> mask/a_1``.

    ``fly_0_17 -> fly_5_17`` holds for many.
    """
    stems = [name.rpartition("/")[2] for name in next(iter(link.partners.items()))]
    return len(link.partners) < _MIN_CONSTANT_SHARE * num_files and replaces_number(*stems)


def _learn_starts(files: NamedFiles) -> list[Link]:
    """Learn links between two folders if the names in one begin with those in the other.

    They may be one folder.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for name in files.paths:
        first, _, rest = name.partition("/")
        inside = rest if first in SPLIT_FOLDERS.values() else name
        folders[inside.rpartition("/")[0]].append(name)
    if len(folders) > _MAX_FOLDERS:
        return []
    return [
        link
        for names, others in itertools.product(folders.values(), repeat=2)
        for link in learn_starts(names, others)
        if 2 * len({*link.partners, *link.partners.values()} & {*others}) > len(others)
    ]


def _orient(link: Link, files: NamedFiles) -> _OrientedLink | None:
    """Return a link from images to masks, or None if its files are not images and their masks."""
    sides = list(link.partners), list(link.partners.values())
    words = [files.kind_by_words(*sides), files.kind_by_words(*reversed(sides))]
    constants = [files.constants(side) - _HAVING_MASKS for side in sides]
    if words == ["mask", "mask"]:
        # Images are called labelled, too.
        one, other = constants
        words = [role_of_words(one - other), role_of_words(other - one)]
    if not any(words) and all(role_of_words(own) == "mask" for own in constants):
        # Both are called masks, whatever they look like: neither are the images.
        return None
    named = _complete_roles(words)
    roles = words if all(words) else [files.kind_by_pixels(side) for side in sides]
    if roles == ["image", "image"]:
        roles = files.kinds_by_alpha(sides)
    is_confirmed = set(roles) == {"image", "mask"} and named in (roles, [])
    if not is_confirmed:
        # The pixels of images may be as plain as those of masks.
        if all(words) or not named or roles == ["image", "image"]:
            return None
        roles = named
    oriented = link if roles[0] == "image" else link.reverse
    is_other = any(files.constants(side) & OTHER_WORDS for side in sides)
    return _OrientedLink(oriented, is_confirmed, is_other, words.count(""))


def _complete_roles(words: Sequence[str]) -> list[str]:
    """Return the roles of two sides: if one is the images, the other is the masks.

    The first of the sides that has a word decides; the list is empty if none has.
    """
    opposite = {"image": "mask", "mask": "image"}
    if words[0]:
        return [words[0], opposite[words[0]]]
    return [opposite[words[1]], words[1]] if words[1] else []


def _leave_out_predictions(links: Sequence[Link], files: NamedFiles) -> list[Link]:
    """Leave out the links to masks that are called predictions, if their images have no others."""
    kept = [link for link in links if not leads_to_predictions(link, files)]
    images = {image for link in kept for image in link.partners}
    return [link for link in links if link in kept or images & set(link.partners)] or list(links)


def leads_to_predictions(link: Link, files: NamedFiles) -> bool:
    """Whether words say that a link leads to masks that a model has predicted."""
    images, masks = files.constants(link.partners), files.constants(link.partners.values())
    return not PREDICTION_WORDS.isdisjoint(masks - images)
