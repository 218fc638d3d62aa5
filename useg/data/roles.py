"""File names that belong together -> which are the images, and which masks are the ground truth.

Words such as ``images`` and ``mask`` decide; without them, the pixels do. If several sets are
possible and nothing decides between them, the user has to choose.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from useg.data.dataset import SPLIT_FOLDERS, pick_evenly
from useg.data.file_names import (
    IMAGE_WORDS,
    Link,
    common_glob,
    learn_links,
    learn_starts,
    merge_folders,
    name_files,
    plain_stem,
    replaces_number,
    role_of_words,
    split_path,
)
from useg.data.ground_truth import (
    OTHER_WORDS,
    PREDICTION_WORDS,
    Candidate,
    OpenChoiceError,
    choose_truth,
)
from useg.data.mask_content import has_transparent_part, is_photograph
from useg.data.object_masks import add_numbered_masks, find_further_masks
from useg.data.official_splits import generalize_folder
from useg.errors import UsageError, join_names
from useg.images.image_files import read_size

# Before how often a part of a name has occurred.
_REPEATED = "/"
# Files whose pixels tell images from masks, of each set of files.
_NUM_SAMPLED = 4
# Among more files than this, a rule for a single pair is an accident.
_MAX_FILES_OF_ONE_PAIR = 5
# Names of images that are no photographs of what the masks show. Photographs may be in colour.
_OTHER_IMAGE_WORDS = OTHER_WORDS - {"color", "colors", "colour", "colours", "colored"}
# Images of the opposite are called so.
_NEGATIONS = frozenset(["not", "no", "non", "without"])
# What has masks is called so, as in labeled_train/images, and not only the masks.
_HAVING_MASKS = frozenset(["labeled", "labelled"])
_JOIN_ADVICE = (
    "join the bands of each image in one TIFF or .npy: numpy.save('images/NAME.npy', "
    "numpy.dstack([one, other]))"
)
# A number that tells masks from images is that of at least so many of all files.
_MIN_CONSTANT_SHARE = 0.1
# Folders of which each pair is compared, if no rule connects the names.
_MAX_FOLDERS = 12
# A set of masks for a smaller share of the images is not weighed against the others.
_MIN_RIVAL_SHARE = 0.1


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
        """Return ``mask`` for photographs of which a part is transparent, if the others have none.

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
    return _leave_out_predictions([each.link for each in ranked], files)


def _is_accident(link: Link, num_files: int) -> bool:
    """Whether a link replaces a number in the names of few files, such as ``raw/a_6 -> mask/a_1``.

    ``fly_0_17 -> fly_5_17`` holds for many.
    """
    stems = [name.rpartition("/")[2] for name in next(iter(link.partners.items()))]
    return len(link.partners) < _MIN_CONSTANT_SHARE * num_files and replaces_number(*stems)


def _learn_starts(files: NamedFiles) -> list[Link]:
    """Learn links between folders of which one has names that begin with those of the other.

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
    kept = [link for link in links if not _leads_to_predictions(link, files)]
    images = {image for link in kept for image in link.partners}
    return [link for link in links if link in kept or images & set(link.partners)] or list(links)


def _leads_to_predictions(link: Link, files: NamedFiles) -> bool:
    images, masks = files.constants(link.partners), files.constants(link.partners.values())
    return not PREDICTION_WORDS.isdisjoint(masks - images)


@dataclass(frozen=True)
class ChosenPairs:
    """Pairs that one rule makes: ``link``, further masks of its images, and what was said."""

    link: Link
    further: Mapping[str, tuple[str, ...]]
    others: frozenset[str]
    notes: tuple[str, ...]
    field_of_view: str


def choose_pairs(links: Sequence[Link], files: NamedFiles) -> Iterator[ChosenPairs]:
    """Choose images and masks, rule after rule: each pairs files that those before do not."""
    first = len(links[0].partners) if links else 0
    used: set[str] = set()
    while links and len(links[0].partners) * 50 >= first:
        main, note = _choose_images(links, files)
        main = add_numbered_masks(main, used, files.paths)
        images, masks = set(main.partners), set(main.partners.values())
        same = _links_to_same_masks(main, links, files)
        # Depth maps of the images have no masks of their own.
        known = images.union(*(link.partners for link in same))
        claims = _masks_of_other_images(known, links)
        further = find_further_masks(main, used | claims.keys(), files.paths)
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
            choice, notes_of_choice, field_of_view = _choose_masks([main, *rivals], links, files)
            notes += notes_of_choice
        every_mask = masks | extra | {mask for link in rivals for mask in link.partners.values()}
        # A rule of few images, such as 4 -> 0, says nothing about the others.
        twins = _list_series(
            (link.partners for link in same if 2 * len(link.partners) > len(images)),
            files,
        )
        others = frozenset(every_mask | twins | set(choice.partners))
        kept = further if choice is main else {}
        yield ChosenPairs(choice, kept, others, tuple(notes), field_of_view)
        used |= images | others | {name for link in rivals for name in link.partners}
        # The pictures that a model made are no images of the data set.
        links = [
            rest
            for link in links
            if (rest := _without(link, used)) is not None
            and _leads_to_predictions(link, files) <= _leads_to_predictions(main, files)
        ]


def _list_series(sets: Iterable[Iterable[str]], files: NamedFiles) -> set[str]:
    """Return the files of sets that, together in one folder, are a series of their own."""
    folders: dict[str, set[str]] = defaultdict(set)
    for name in (name for names in sets for name in names):
        folders[generalize_folder(name)].add(name)
    return {name for names in folders.values() if files.is_series(names) for name in names}


def _masks_of_other_images(images: set[str], links: Sequence[Link]) -> dict[str, int]:
    """Return the masks that a rule gives to other images, with the pairs of that rule."""
    claims: dict[str, int] = {}
    for link in links:
        if len(link.partners) > 1 and not set(link.partners) & images:
            for mask in link.partners.values():
                claims[mask] = max(len(link.partners), claims.get(mask, 0))
    return claims


def _choose_images(links: Sequence[Link], files: NamedFiles) -> tuple[Link, str]:
    """Return the first link, or the one among several sets of images for the same masks.

    That is the set whose name has nothing that the others lack: ``images`` beside ``images_small``.

    Raises:
        OpenChoiceError: There is no such set.
    """
    main = links[0]
    images = set(main.partners)
    sets = [main, *_distinct(_links_to_same_masks(main, links, files), of_images=True)]
    sets = [link for link in sets if 2 * len(link.partners) > len(main.partners)]
    if len(sets) == 1:
        return main, ""
    names = files.name_sets([link.partners for link in sets])
    reasons = _find_worse_images(sets, files)
    left = [k for k, reason in enumerate(reasons) if not reason]
    if len(left) == 1:
        unused: dict[str, list[str]] = defaultdict(list)
        for name, reason in zip(names, reasons, strict=True):
            if reason:
                unused[reason].append(name)
        others = "; and ".join(
            f"{' and '.join(listed)}, which are not used because they {reason}"
            for reason, listed in unused.items()
        )
        return sets[left[0]], (
            f"the images are {names[left[0]]}; the masks would also fit {others}"
        )
    sets, names = [sets[k] for k in left], [names[k] for k in left]
    listed = ", ".join(
        f"{name} ({len(link.partners)})" for name, link in zip(names, sets, strict=True)
    )
    truths = _as_candidates(_distinct(link for link in links if set(link.partners) & images), files)
    masks_listed = ", ".join(f"{each.name} ({len(each.masks)})" for each in truths)
    raise OpenChoiceError(
        f"there are {len(sets)} sets of images for the same masks: {listed}, and it is unclear "
        f"which of them to use. The masks are {masks_listed}. If these sets are bands of the same "
        f"images, or if the masks show what has changed between them, {_JOIN_ADVICE}",
        _as_candidates(sets, files),
        _keep_equally_good(truths),
    )


def _links_to_same_masks(main: Link, links: Sequence[Link], files: NamedFiles) -> list[Link]:
    """Return the links from other images to the same masks.

    Images called ``not_fire`` beside ``fire`` show something else, and have no masks.
    """
    images, masks = set(main.partners), set(main.partners.values())
    return [
        link
        for link in links
        if set(link.partners.values()) & masks
        and not set(link.partners) & (images | masks)
        and not _have_own_masks(link, main, links)
        and not (files.constants(link.partners) - files.constants(main.partners)) & _NEGATIONS
    ]


def _have_own_masks(twin: Link, main: Link, links: Sequence[Link]) -> bool:
    """Return whether other images have masks of their own, by a shorter rule than the others'.

    The rules for the masks of both must be shorter than those that exchange them, too: one name of
    a folder may only be shorter than another, such as ``oct`` beside ``octa``.
    """
    images, taken = set(twin.partners), {*main.partners, *main.partners.values()}
    for link in links:
        own = set(link.partners.values())
        if len(link.partners) >= len(twin.partners) and not own & taken:
            rivals = [
                other.rule.length
                for other in links
                if set(other.partners) & set(main.partners) and set(other.partners.values()) & own
            ]
            exchanged = twin.rule.length + min(rivals, default=main.rule.length)
            is_shorter = (
                link.rule.length < min([twin.rule.length, *rivals])
                and link.rule.length + main.rule.length < exchanged
            )
            if is_shorter and 2 * len(images & set(link.partners)) > len(images):
                return True
    return False


def _find_worse_images(sets: Sequence[Link], files: NamedFiles) -> list[str]:
    """Return why each set of images is not used, empty for the best, or for those left to ask."""
    reasons = [""] * len(sets)
    constants = [files.constants(link.partners) for link in sets]
    for is_better, why, is_final in _criteria_of_images(sets, constants, reasons, files):
        left = [k for k, reason in enumerate(reasons) if not reason]
        better = [k for k in left if is_better(k)]
        if len(better) == 1 or (is_final and better):
            for k in set(left).difference(better):
                reasons[k] = why
        if len(better) == 1:
            break
    return reasons


def _criteria_of_images(
    sets: Sequence[Link],
    constants: Sequence[frozenset[str]],
    reasons: Sequence[str],
    files: NamedFiles,
) -> Iterator[tuple[Callable[[int], bool], str, bool]]:
    """Yield what makes a set of images better, what is said of others, and if they are then out.

    The best set is the one that is better alone, by the first criterion for which there is one.
    ``reasons`` are those why sets are already out.
    """
    if len({frozenset(map(generalize_folder, link.partners)) for link in sets}) == 1:
        # Frames of a video, of which one in each folder has a mask, or images of two cameras.
        shown = [_count_shared_start(link, files) for link in sets]
        why = "have names less like those of the masks"
        yield lambda k: shown[k] == max(shown) > 0, why, False
    yield lambda k: _have_mask_sizes(sets[k], files), "have other sizes", True
    kinds = [files.kind_by_pixels(link.partners) for link in sets]
    yield lambda k: kinds[k] == "image", "are no photographs", True
    words = [own & _OTHER_IMAGE_WORDS for own in constants]
    left = [own for own, reason in zip(words, reasons, strict=True) if not reason]
    called = join_names([f"'{word}'" for word in sorted(frozenset.union(*left))])
    yield lambda k: not words[k], f"are called {called}", True
    shared = [_count_shared_folders(link, files) for link in sets]
    best = max(shared)
    sizes = [_count_parts(link, files) for link in sets]
    # Names that differ by a number, such as channels, are not longer.
    is_shortest = sizes.count(min(sizes)) == 1
    plain = [is_shortest and all(own <= others for others in constants) for own in constants]
    yield lambda k: plain[k] and shared[k] == best, "have longer names", False
    # Raw images may be those before a correction that moved things.
    yield lambda k: bool(constants[k] & IMAGE_WORDS - {"raw"}), "are not called images", False
    yield lambda k: shared[k] == best, "share fewer folders with the masks", False


def _count_shared_folders(link: Link, files: NamedFiles) -> int:
    one, other = min(link.partners.items())
    folders = [set(files.paths[name].relative_to(files.root).parts[:-1]) for name in (one, other)]
    return len(folders[0] & folders[1])


def _count_parts(link: Link, files: NamedFiles) -> int:
    """Return how many words, numbers and other characters the first path of a set has."""
    return len(split_path(files.paths[min(link.partners)], files.root))


def _count_shared_start(link: Link, files: NamedFiles) -> int:
    """Return how much of the names of masks those of their images are; 0 if one does not fit."""
    lengths = []
    for one, other in link.partners.items():
        stem, of_mask = (plain_stem(files.paths[name]) for name in (one, other))
        is_start = of_mask.startswith(stem) and not of_mask[len(stem) :][:1].isalnum()
        lengths.append(len(stem) if is_start else 0)
    return 0 if 0 in lengths else sum(lengths)


def _have_mask_sizes(link: Link, files: NamedFiles) -> bool:
    """Return whether a few images have the sizes of their masks."""
    for one in pick_evenly(sorted(link.partners), _NUM_SAMPLED):
        try:
            sizes = [read_size(files.paths[name], 0) for name in (one, link.partners[one])]
        except UsageError:
            continue
        if sizes[0] != sizes[1]:
            return False
    return True


def _keep_equally_good(truths: Sequence[Candidate]) -> Sequence[Candidate]:
    """Return the sets of masks that are as good as each other."""
    if len(truths) < 2:
        return truths
    try:
        return (choose_truth(truths).chosen,)
    except OpenChoiceError as error:
        return error.left


def _choose_masks(
    sets: Sequence[Link], links: Sequence[Link], files: NamedFiles
) -> tuple[Link, tuple[str, ...], str]:
    """Return the link to the ground truth among sets of masks, why, and the field of view.

    If they leave it open, each one with what ``links`` say about other images is compared.

    Raises:
        OpenChoiceError: It stays open.
    """
    candidates = _as_candidates(sets, files)
    try:
        choice = choose_truth(candidates)
    except OpenChoiceError as error:
        joined = [_join_series(link, links, sets, files) for link in sets]
        sets = [
            link
            for k, link in enumerate(joined)
            if not any(link.partners.items() <= other.partners.items() for other in joined[:k])
        ]
        if len(sets) < 2 or all(link in links for link in sets):
            raise _add_other_images(error, sets, links, files) from error
        candidates = _as_candidates(sets, files)
        choice = choose_truth(candidates)
    view = choice.field_of_view.name if choice.field_of_view else ""
    return sets[candidates.index(choice.chosen)], choice.notes, view


def _add_other_images(
    error: OpenChoiceError, sets: Sequence[Link], links: Sequence[Link], files: NamedFiles
) -> OpenChoiceError:
    """Add to an open choice what leads from other images to one of its sets of masks.

    So ``label`` beside ``label1`` and ``label2`` shows the changes between two images.
    """
    added = _distinct(
        (
            other
            for other in links
            for link in sets
            if set(other.partners.values()) == set(link.partners.values())
            and not set(other.partners) & set(link.partners)
        ),
        of_images=True,
    )
    if not added:
        return error
    others = _as_candidates(added, files)
    return OpenChoiceError(
        f"{error}. If masks show what has changed between two images, {_JOIN_ADVICE}",
        (*error.candidates, *others),
        (*error.left, *others),
    )


def _join_series(
    link: Link, links: Sequence[Link], sets: Sequence[Link], files: NamedFiles
) -> Link:
    """Add the pairs of links to further masks of the same series, whose images lie beside these.

    Masks of another one of the sets for these images are no further masks.
    """
    partners = dict(link.partners)
    rivals = [each for each in sets if each is not link and set(each.partners) & set(partners)]
    taken = {mask for each in rivals for mask in each.partners.values()}
    for other in links:
        added = other.partners
        if {*added, *added.values()} & {*partners, *partners.values()}:
            continue
        if taken.intersection(added.values()):
            continue
        words = [
            set(filter(str.isalpha, files.constants(each.values()))) for each in (partners, added)
        ]
        folders = [generalize_folder(min(each)) for each in (partners, added)]
        if words[0] == words[1] and folders[0] == folders[1]:
            partners |= added
    return Link(link.rule, partners)


def _as_candidates(links: Sequence[Link], files: NamedFiles) -> list[Candidate]:
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
    # A rule that mostly explained other files fits the rest by accident.
    return Link(link.rule, partners) if 2 * len(partners) > len(link.partners) else None
