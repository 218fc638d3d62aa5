"""Links from images to masks -> the pairs to use, where several sets of images or masks compete.

Names and sizes decide between sets of images, and :mod:`useg.data.ground_truth` between sets of
masks. If nothing decides, the user has to choose.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from useg.data.dataset import pick_evenly
from useg.data.file_names import IMAGE_WORDS, Link, plain_stem, split_path
from useg.data.ground_truth import OTHER_WORDS, Candidate, OpenChoiceError, choose_truth
from useg.data.object_masks import add_numbered_masks, find_further_masks
from useg.data.official_splits import generalize_folder
from useg.data.roles import NamedFiles, leads_to_predictions
from useg.errors import UsageError, join_names
from useg.images.image_files import read_size

# Names of images that are not photographs of what the masks show. Photographs may be in colour.
# What is called good shows nothing that a mask could mark.
_OTHER_IMAGE_WORDS = (OTHER_WORDS | {"good", "ok", "healthy", "intact"}) - {
    *("color", "colors", "colour", "colours", "colored")
}
# Words for images of the opposite, such as not_fire beside fire.
_NEGATIONS = frozenset(["not", "no", "non", "without"])
_JOIN_ADVICE = (
    "join the bands of each image in one TIFF or .npy: numpy.save('images/NAME.npy', "
    "numpy.dstack([one, other]))"
)
# A set of masks for a smaller share of the images is not weighed against the others.
_MIN_RIVAL_SHARE = 0.1
# Images whose sizes are compared with those of their masks.
_NUM_SAMPLED = 4


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
        # The pictures that a model made are not images of the data set, and neither are arrays
        # beside pictures, such as those of optical flow.
        links = [
            rest
            for link in links
            if (rest := _without(link, used)) is not None
            and leads_to_predictions(link, files) <= leads_to_predictions(main, files)
            and _are_arrays(link, files) == _are_arrays(main, files)
        ]


def _are_arrays(link: Link, files: NamedFiles) -> bool:
    return files.paths[min(link.partners)].suffix.lower() == ".npy"


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
    main = _find_main(links, files)
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


def _find_main(links: Sequence[Link], files: NamedFiles) -> Link:
    """Return the first link, or one from photographs to the same masks if its images are none.

    So masks of the rover and of the distance are no images beside photographs of Mars.
    """
    main = links[0]
    masks = set(main.partners.values())
    if files.kind_by_pixels(main.partners) != "mask":
        return main
    same = (link for link in links if set(link.partners.values()) == masks)
    return next((link for link in same if files.kind_by_pixels(link.partners) == "image"), main)


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
        why = "have names that are less similar to those of the masks"
        yield lambda k: shown[k] == max(shown) > 0, why, False
    yield lambda k: _have_mask_sizes(sets[k], files), "have other sizes", True
    kinds = [files.kind_by_pixels(link.partners) for link in sets]
    yield lambda k: kinds[k] == "image", "are not photographs", True
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

    Masks of another set for these images are not further masks.
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
