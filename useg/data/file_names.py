"""File names -> which of them belong together, learned from what is constant in the names.

``labels/a1_P`` follows from ``images/a1`` by two constant texts that differ: ``images`` becomes
``labels``, and ``_P`` is added. Such a rule is found by comparing names that share rare parts, and
counts for as many files as it explains. The meaning of words matters only if several rules fit.
"""

from __future__ import annotations

import difflib
import heapq
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from useg.data.dataset import SPLIT_FOLDERS
from useg.images.formats import IMAGE_SUFFIXES

# Words for images and for masks in the names of files and folders.
IMAGE_WORDS = frozenset(
    [
        *("image", "images", "img", "imgs", "rgb", "photo", "photos", "picture", "pictures"),
        *("input", "inputs", "raw", "jpeg", "sat", "frame", "frames", "scan", "scans", "volume"),
        *("stills", "camerargb", "jpegimages", "leftimg"),
    ]
)
MASK_WORDS = frozenset(
    [
        *("mask", "masks", "label", "labels", "labeled", "labelled", "lbl", "lab", "seg", "segm"),
        *("segmentation", "segmentations", "gt", "groundtruth", "truth", "annotation"),
        *("annotations", "annot", "annots", "anno", "annos", "ann", "anns", "target", "targets"),
        *(
            "trimap",
            "trimaps",
            "manual",
            "matte",
            "mattes",
            "matting",
            "cameraseg",
            "cameramask",
            "gtfine",
        ),
        *("alpha", "alphas"),
        *("segmentationclass", "labeledapproved"),
    ]
)

# Words that say what a file is, not which image it belongs to: 'road_7_mask' and 'road_7',
# 'img_001' and 'mask_001', the names of Cityscapes and ISIC.
_ROLE_WORDS = (
    "image|img|rgb|sat|leftimg8bit|mask|masks|label|labels|labelids|labeltrainids"
    "|labelcsids|labelcstrainids|labellevel3ids|lbl|lab|seg|segm"
    "|segmentation|gt|gtfine|groundtruth|truth|annotation|annot|anno|ann|target|volume|stack|l"
)
_ROLE_SUFFIX = re.compile(rf"[_\-. ](?:{_ROLE_WORDS})$", re.IGNORECASE)
_ROLE_PREFIX = re.compile(rf"^(?:{_ROLE_WORDS})[_\-. ]?(?=\d)", re.IGNORECASE)

# Numbers, words (also those of camelCase) and single other characters.
_TOKEN = re.compile(r"\d+|[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])|[\W_]")
# Folders such as trainannot and imagesTr consist of two words.
_GLUED_SPLIT = re.compile(r"(train|valid|val|test)([^\W\d_]{3,})", re.IGNORECASE)
# Short names of splits. At the end of a word they begin with a capital: imagesTr. Otherwise they
# count only if several stand beside the same text: DUTS-TR and DUTS-TE.
SHORT_SPLITS = {
    "tr": "train",
    "trn": "train",
    "va": "val",
    "vd": "val",
    "te": "test",
    "ts": "test",
    "tst": "test",
}
YEAR = re.compile(r"[_\-. ]?20[0-9]{2}$")

# MATLAB's Image Labeler exports Label_7_a.png for the image a.
_COUNTED = re.compile(r"Label_[0-9]+_(.+)", re.DOTALL)

# Suffixes inside a name, as in a.jpg.png and a.ome.tif.
_INNER_SUFFIXES = IMAGE_SUFFIXES | {".ome"}

# Names whose partners are looked for, candidates for each of them, and files that share a part
# which is too common to point at a partner.
_MAX_SAMPLES = 32
_MAX_CANDIDATES = 12
_MAX_COMPARED = 300
_MAX_SHARING = 4000
# A rule that may fit a name in more ways is not tried.
_MAX_FITS = 10_000
# Up to this many ways are all tried, otherwise the first and the last.
_MAX_PLACES = 64
# Most series, such as channels, of files that begin with the names of others.
_MAX_SERIES = 8
# Rules that are tried on all names.
_MAX_RULES = 48


@dataclass(frozen=True)
class Rule:
    """How one name follows from another.

    Args:
        parts: The texts in one name and in the other; None for a text that both share.
    """

    parts: tuple[tuple[str, str] | None, ...]

    @property
    def reverse(self) -> Rule:
        """The rule from the other name to this one."""
        return Rule(tuple(part and (part[1], part[0]) for part in self.parts))

    @property
    def length(self) -> int:
        """The number of characters that differ."""
        return sum(len(part[0]) + len(part[1]) for part in self.parts if part)

    @property
    def changes(self) -> tuple[Counter[str], Counter[str]]:
        """The words and numbers that only one name has, and those that only the other has."""
        one, other = (
            Counter(word for part in self.parts if part for word in split_name(part[k]))
            for k in (0, 1)
        )
        return one - other, other - one

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        # Where the texts occur very often in a name, only the first and the last place are tried.
        return tuple(
            re.compile(
                "".join(
                    f"(.+{lazy})" if part is None else re.escape(part[0]) for part in self.parts
                ),
                re.DOTALL,
            )
            for lazy in ("?", "")
        )

    def apply(self, name: str) -> list[str]:
        """Return the names that may follow: none if the rule does not fit, or very many times."""
        # The texts at the ends have one place. A longer text may overlap itself.
        inner = [part[0] for part in self.parts[1:-1] if part]
        num_fits = math.prod(name.count(text) * max(len(text), 1) for text in inner)
        if not 0 < num_fits <= _MAX_FITS:
            return []
        if num_fits > 2 and math.prod(map(name.count, inner)) <= _MAX_PLACES:
            found = list(_follow(self.parts, name))
            return [*found[1:-1], *found[:1], *found[1:][-1:]]
        found = []
        for pattern in self._patterns:
            if fit := pattern.fullmatch(name):
                shared = iter(fit.groups())
                found.append(
                    "".join(next(shared) if part is None else part[1] for part in self.parts)
                )
        return found


def _follow(parts: Sequence[tuple[str, str] | None], name: str) -> Iterator[str]:
    """Yield what follows from a name by the parts of a rule, with its texts at any place."""
    part, rest = parts[0], parts[1:]
    if part is not None:
        if name.startswith(part[0]) and (rest or name == part[0]):
            ends = _follow(rest, name.removeprefix(part[0])) if rest else iter([""])
            yield from (part[1] + end for end in ends)
    elif not rest:
        yield from [name] if name else []
    else:
        text = rest[0][0] if rest[0] else ""
        place = name.find(text, 1)
        while place > 0:
            yield from (name[:place] + end for end in _follow(rest, name[place:]))
            place = name.find(text, place + 1)


@dataclass(frozen=True)
class Link:
    """A rule and the names that it connects, ``one`` -> ``other``; each occurs once."""

    rule: Rule
    partners: Mapping[str, str]

    @property
    def reverse(self) -> Link:
        """The same, from the others."""
        return Link(self.rule.reverse, {other: one for one, other in self.partners.items()})


def split_name(name: str) -> list[str]:
    """Split a name into parts: numbers, words and single other characters.

    >>> split_name("imgDir/a-1_000")
    ['img', 'Dir', '/', 'a', '-', '1', '_', '000']
    """
    return _TOKEN.findall(name)


def split_folder(folder: str) -> list[str]:
    """Split a folder's name like :func:`split_name`, also before and after the name of a split.

    >>> split_folder("trainannot"), split_folder("imagesTr"), split_folder("training")
    (['train', 'annot'], ['images', 'train'], ['training'])
    """
    parts: list[str] = []
    for run in re.findall(r"[^\W\d_]+|\d+|[\W_]", folder):
        glued = None if run.casefold() in SPLIT_FOLDERS else _GLUED_SPLIT.fullmatch(run)
        words = [glued[1], *_TOKEN.findall(glued[2])] if glued else _TOKEN.findall(run)
        if len(words) > 1 and words[-1].istitle() and words[-1].casefold() in SHORT_SPLITS:
            words[-1] = SHORT_SPLITS[words[-1].casefold()]
        parts += words
    return parts


def split_path(path: Path, root: Path) -> list[str]:
    """Split a path below ``root`` into the parts of its folders and of its name."""
    inside = path.relative_to(root) if path.is_relative_to(root) else path
    folders = [part for folder in inside.parts[:-1] for part in split_folder(folder)]
    return [*folders, *split_name(path.stem)]


def plain_stem(path: Path) -> str:
    """Return a file's name without its suffix and without another image's suffix before it."""
    stem = path.stem
    while (inner := Path(stem)).suffix.casefold() in _INNER_SUFFIXES and inner.stem:
        stem = inner.stem
    return stem


def strip_role_words(key: str) -> str:
    """Remove the words that say what a file is: ``city/a_gtFine_labelIds`` -> ``city/a``.

    A file name never becomes empty.
    """
    folder, slash, stem = key.rpartition("/")
    while (shorter := _ROLE_SUFFIX.sub("", stem)) not in ("", stem):
        stem = shorter
    return folder + slash + (_ROLE_PREFIX.sub("", stem) or stem).casefold()


def role_of_words(found: Collection[str]) -> str:
    """Return the role that words give: ``image``, ``mask`` or, where they leave it open, ``""``."""
    kinds = [
        kind
        for kind, words in (("image", IMAGE_WORDS), ("mask", MASK_WORDS))
        if not words.isdisjoint(found)
    ]
    return kinds[0] if len(kinds) == 1 else ""


def name_files(files: Iterable[Path], root: Path) -> dict[str, Path]:
    """Return files by names that can be compared: paths below ``root`` in lower case, no suffix.

    Leading zeros do not count. Where two files would get one name, they keep what differs: zeros,
    capitals or the suffix.
    """
    paths = {path: path.relative_to(root) if path.is_relative_to(root) else path for path in files}
    stems = {path: plain_stem(path) for path in paths}
    known = set(stems.values())
    plain = {
        path: (inside.parent / _drop_counter(stems[path], known)).as_posix()
        for path, inside in paths.items()
    }
    folders = {path.parent for name, path in _repeated(plain)}
    whole = {
        path: paths[path].as_posix() if path.parent in folders else name
        for path, name in plain.items()
    }
    normal = {path: _normalize(name) for path, name in whole.items()}
    repeated = {path for _, path in _repeated(normal)}
    return {whole[path] if path in repeated else normal[path]: path for path in paths}


def _drop_counter(stem: str, known: Collection[str]) -> str:
    """Return a name without MATLAB's running number, if the rest is another file's name."""
    counted = _COUNTED.fullmatch(stem)
    return counted[1] if counted and counted[1] in known else stem


def _repeated(names: Mapping[Path, str]) -> list[tuple[str, Path]]:
    counts = Counter(names.values())
    return [(name, path) for path, name in names.items() if counts[name] > 1]


def _normalize(name: str) -> str:
    """Return a name in lower case without leading zeros, and with its splits at the front.

    ``Images/Train/01`` and ``images_train/1`` become ``train/images/1``.
    """
    *folders, stem = unicodedata.normalize("NFC", name).split("/")
    divided = [_divide_folder(folder) for folder in folders]
    splits = [split for split, _ in divided if split]
    return "/".join(
        (*splits, *(rest for _, rest in divided if rest), join_comparable(split_name(stem)))
    )


def _divide_folder(folder: str) -> tuple[str, str]:
    """Return the split in a folder's name, or ``""``, and the rest."""
    parts = split_folder(YEAR.sub("", folder))
    words = [part for part in parts if part.casefold() in SPLIT_FOLDERS]
    if len(words) != 1:
        return "", join_comparable(split_folder(folder))
    rest = join_comparable([part for part in parts if part != words[0]])
    return SPLIT_FOLDERS[words[0].casefold()], rest.strip("_-. ")


def join_comparable(parts: Iterable[str]) -> str:
    """Join the parts of a name in lower case, numbers without leading zeros."""
    return "".join(
        part.lstrip("0") or "0" if part.isdecimal() else part.casefold() for part in parts
    )


def merge_folders(names: Iterable[str]) -> dict[str, str]:
    """Return shorter names without the last folder, where folders beside each other can be one.

    >>> merge_folders(["images/a/1", "images/b/2", "masks/1", "masks/2"])
    {'images/a/1': 'images/1', 'images/b/2': 'images/2', 'masks/1': 'masks/1', 'masks/2': 'masks/2'}
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folders[name.rpartition("/")[0]].append(name)
    children: dict[str, list[str]] = defaultdict(list)
    for folder in folders:
        children[folder.rpartition("/")[0]].append(folder)
    short = {name: name for listed in folders.values() for name in listed}
    for parent, listed in children.items():
        inside = [name for folder in listed for name in folders[folder]]
        stems = [name.rpartition("/")[2] for name in inside]
        is_split = any(folder.rpartition("/")[2] in SPLIT_FOLDERS for folder in listed)
        if len(listed) > 1 and parent and len(set(stems)) == len(stems) and not is_split:
            merged = [f"{parent}/{stem}" for stem in stems]
            if not set(merged) & short.keys():
                short |= zip(inside, merged, strict=True)
    return short


def drop_repeated_folders(names: Iterable[str]) -> dict[str, str]:
    """Return shorter names without folders that the names of their files begin with.

    >>> drop_repeated_folders(["images/a1", "truth/a1/soft/a1_cup"])
    {'images/a1': 'images/a1', 'truth/a1/soft/a1_cup': 'truth/soft/a1_cup'}
    """
    short = {name: _drop_repeated_folders(name) for name in names}
    counts = Counter(short.values())
    return {name: plain if counts[plain] == 1 else name for name, plain in short.items()}


def _drop_repeated_folders(name: str) -> str:
    *folders, stem = name.split("/")
    kept = [
        folder
        for folder in folders
        if folder in SPLIT_FOLDERS
        or not stem.startswith(folder)
        or stem[len(folder) : len(folder) + 1].isalnum()
    ]
    return "/".join((*kept, stem))


def learn_links(names: Sequence[str], others: Sequence[str] | None = None) -> list[Link]:
    """Find the rules by which names follow from each other, those of most names first.

    Args:
        names: Names, as :func:`name_files` makes them.
        others: Names that they are connected with; by default the names themselves.

    Returns:
        Links between different names. Without ``others`` each stands there in one direction only.
    """
    known = set(names if others is None else others)
    votes = _vote(names, names if others is None else others)
    links: list[Link] = []
    seen: set[frozenset[frozenset[str]]] = set()
    for rule, _ in votes.most_common(_MAX_RULES):
        partners = _apply_to_all(rule, names, known)
        edges = frozenset(frozenset(edge) for edge in partners.items())
        if partners and edges not in seen:
            seen.add(edges)
            links.append(Link(rule, partners))
    return sorted(links, key=lambda link: -len(link.partners))


def learn_starts(names: Collection[str], others: Collection[str]) -> list[Link]:
    """Find links from names to those with which they begin, or end, if no rule says what is added.

    ``images/a_3f9c`` belongs to ``masks/a``, and so does ``images/3f9c-a``. Where several names
    begin alike, such as ``a_w1_3f9c`` and ``a_w2_07be``, there is a link for each part that may
    follow.
    """
    return _learn_starts(names, others, 1) or _learn_starts(names, others, -1)


def _learn_starts(names: Iterable[str], others: Iterable[str], step: int) -> list[Link]:
    known = {_split_and_stem(other, step): other for other in others}
    ends: dict[str, tuple[str, str]] = {}
    for name in names:
        split, stem = _split_and_stem(name, step)
        for k in range(len(stem) - 1, 0, -1):
            if not stem[k].isalnum() and (split, stem[:k]) in known:
                ends[name] = known[split, stem[:k]], stem[k:]
                break
    for depth in range(1 + max((len(end) for _, end in ends.values()), default=0)):
        groups: dict[str, dict[str, str]] = defaultdict(dict)
        for name, (other, end) in ends.items():
            groups[end[:depth]][name] = other
        if len(groups) > _MAX_SERIES:
            break
        if all(len(set(each.values())) == len(each) for each in groups.values()):
            return [Link(Rule(()), partners) for partners in groups.values()]
    return []


def _split_and_stem(name: str, step: int) -> tuple[str, str]:
    """Return the split at the front of a name, or ``""``, and the name of the file alone."""
    first, stem = name.partition("/")[0], name.rpartition("/")[2][::step]
    return first if first in SPLIT_FOLDERS else "", stem


def _apply_to_all(rule: Rule, names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    partners = {
        name: other
        for name in names
        for other in rule.apply(name)
        if other in known and other != name
    }
    counts = Counter(partners.values())
    return {name: other for name, other in partners.items() if counts[other] == 1}


def _vote(names: Sequence[str], others: Sequence[str]) -> Counter[Rule]:
    """Count the rules between some names and the names that share their rarest parts."""
    parts = {name: split_name(name) for name in dict.fromkeys((*names, *others))}
    places: dict[str, list[str]] = defaultdict(list)
    for name in others:
        for part in dict.fromkeys(parts[name]):
            if part.isalnum():
                places[part].append(name)
        places[_numbers(parts[name])].append(name)
    count = min(len(names), _MAX_SAMPLES)
    votes: Counter[Rule] = Counter()
    for k in range(count):
        name = names[(2 * k + 1) * len(names) // (2 * count)]
        rules = (
            _compare(parts[name], parts[other]) for other in _find_similar(name, parts, places)
        )
        # No set: the order of equal votes must be the same every time.
        for rule in dict.fromkeys(rule for rule in rules if rule is not None):
            # Without a second list, a rule and its reverse are one.
            is_known = others is names and rule.reverse in votes
            votes[rule.reverse if is_known else rule] += 1
    return votes


def _numbers(parts: Iterable[str]) -> str:
    """Return the numbers of a name in their order, which tells tiles such as a_r0_c1 apart."""
    return "/".join(part for part in parts if part.isdecimal())


def _find_similar(
    name: str, parts: Mapping[str, list[str]], places: Mapping[str, list[str]]
) -> list[str]:
    """Return names that share rare parts with a name, the most similar first."""
    keys = dict.fromkeys((*parts[name], _numbers(parts[name])))
    listed = [places[key] for key in keys if key in places]
    short = [found for found in listed if len(found) <= _MAX_SHARING]
    scores: dict[str, float] = defaultdict(float)
    for found in short or sorted(listed, key=len)[:1]:
        for other in found[:_MAX_SHARING]:
            scores[other] += 1 / len(found)
    scores.pop(name, None)
    near = heapq.nlargest(_MAX_COMPARED, scores, key=lambda other: scores[other])
    rarity = {key: 1 / len(places[key]) for key in keys if key in places}

    def similarity(other: str) -> tuple[float, int]:
        keys = {*parts[other], _numbers(parts[other])}
        # An exact sum: that of floats depends on the order of a set, which changes.
        shared = math.fsum(rarity.get(key, 0) for key in keys)
        ends = (reversed(parts[name]), reversed(parts[other])), (parts[name], parts[other])
        return shared, sum(x == y for one, two in ends for x, y in zip(one, two, strict=False))

    return heapq.nlargest(_MAX_CANDIDATES, near, key=similarity)


def _compare(one: Sequence[str], other: Sequence[str]) -> Rule | None:
    """Return the rule from one name to another; None if it only counts or changes the split."""
    parts: list[tuple[str, str] | None] = []
    differences = []
    for kind, a, b, c, d in _align(one, other):
        texts = "".join(one[a:b]), "".join(other[c:d])
        if kind == "equal":
            parts += _share(texts[0], is_first=a == 0, is_last=b == len(one))
        else:
            differences.append(texts)
            parts.append(texts)
    is_accident = any(_is_other_split(*texts) for texts in differences) or all(
        _is_count(*texts) for texts in differences
    )
    if is_accident or None not in parts:
        return None
    return Rule(_merge_texts(parts))


def _align(one: Sequence[str], other: Sequence[str]) -> Sequence[tuple[str, int, int, int, int]]:
    """Return difflib's opcodes, with a separator on its own as a match only if that is shorter.

    So ``test/bottle/a`` and ``bottle/truth/a`` share ``bottle``, and not the first slash.
    """
    ways = [
        difflib.SequenceMatcher(is_junk, one, other, autojunk=False).get_opcodes()
        for is_junk in (None, lambda part: not part.isalnum())
    ]
    return min(
        ways,
        key=lambda codes: sum(
            len("".join((*one[a:b], *other[c:d]))) for kind, a, b, c, d in codes if kind != "equal"
        ),
    )


def _share(text: str, is_first: bool, is_last: bool) -> list[tuple[str, str] | None]:
    """Return the parts of a rule for a text that both names have.

    Separators beside a difference anchor it, like the slash in ``train/a`` -> ``trainannot/a``.
    """
    core = re.search(r"[^\W_](.*[^\W_])?", text, re.DOTALL)
    if core is None:
        return [(text, text)]
    start, end = text[: core.start()], text[core.end() :]
    return [
        *([(start, start)] if start and not is_first else []),
        None,
        *([(end, end)] if end and not is_last else []),
    ]


def _merge_texts(parts: Iterable[tuple[str, str] | None]) -> tuple[tuple[str, str] | None, ...]:
    merged: list[tuple[str, str] | None] = []
    for part in parts:
        last = merged[-1] if merged else None
        if part is not None and last is not None:
            merged[-1] = (last[0] + part[0], last[1] + part[1])
        else:
            merged.append(part)
    return tuple(merged)


def replaces_number(one: str, other: str) -> bool:
    """Return whether a number in one name stands at the place of another number in the other."""
    rows = split_name(one), split_name(other)
    changes = difflib.SequenceMatcher(None, *rows, autojunk=False).get_opcodes()
    pairs = (
        [
            [*filter(str.isdecimal, row[first:last])]
            for row, first, last in zip(rows, (a, c), (b, d), strict=True)
        ]
        for kind, a, b, c, d in changes
        if kind == "replace"
    )
    return any(numbers[0] and numbers[1] and numbers[0] != numbers[1] for numbers in pairs)


def _is_count(one: str, other: str) -> bool:
    return one.isdecimal() and other.isdecimal()


def _is_other_split(one: str, other: str) -> bool:
    return one in SPLIT_FOLDERS and other in SPLIT_FOLDERS
