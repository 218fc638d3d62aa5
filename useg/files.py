"""Files and folders: list them in natural order, and write them whole or not at all.

A file is written as a draft beside its place and then put there in one step. The draft is locked
while its process lives: other processes leave it alone, and remove it when that process is dead. A
file that useg did not write is never replaced.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
import unicodedata
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

import platformdirs

from useg.errors import DataError, MachineError
from useg.ownership import Recognizer, is_own_json, refuse_foreign_files

LOCK_NAME = ".useg-lock"
MAX_NAME_BYTES = 255

_DRAFT_NAME = re.compile(r"\.useg-[0-9a-f]{16}(\.[A-Za-z0-9]{1,12})?")
# Where the file system has no locks, a draft of this age is taken for abandoned.
_ABANDONED_AFTER_SECONDS = 24 * 3600.0

# A folder, and the names of the files in it; links to folders that are not followed.
FolderContent = tuple[str, list[str], list[str]]

# Content of folders that were walked, while :func:`cached_walks` caches it.
_walks: ContextVar[dict[Path, list[FolderContent]] | None] = ContextVar("_walks", default=None)


def natural_key(path: Path | str) -> tuple[tuple[str | int, ...], str]:
    """Return a sort key that compares numbers in names by value: ``a2.png`` before ``a10.png``."""
    text = path.as_posix() if isinstance(path, Path) else path
    parts = re.split(r"([0-9]+)", text.casefold())
    return tuple(int(part) if k % 2 else part for k, part in enumerate(parts)), text


def list_files(folder: Path, suffixes: Container[str]) -> list[Path]:
    """List the files in a folder and its sub-folders, in natural order.

    Hidden files, and the copies that macOS makes, are left out.

    Args:
        folder: The folder.
        suffixes: The suffixes of the files, in lower case, with the dot.
    """
    found = [
        Path(place, name)
        for place, names, _ in walk_folders(folder)
        for name in names
        if not _is_hidden(name) and os.path.splitext(name)[1].lower() in suffixes
    ]
    return sorted(found, key=natural_key)


@contextmanager
def cached_walks() -> Iterator[None]:
    """Cache the content of folders within this block, so each is walked only once.

    Nothing may be written into these folders meanwhile.
    """
    token = _walks.set({})
    try:
        yield
    finally:
        _walks.reset(token)


def walk_folders(root: Path) -> Iterable[FolderContent]:
    """Return (folder, files, links that are not followed) in and below ``root``.

    A link to a folder is followed unless that folder is read anyway, as in ``images/all -> .``.

    Raises:
        DataError: A folder cannot be read.
    """
    walks = _walks.get()
    if walks is None:
        return _walk(root)
    if root not in walks:
        walks[root] = list(_walk(root))
    return walks[root]


def _walk(root: Path) -> Iterator[FolderContent]:
    top = os.path.realpath(root)
    for place, folders, files in os.walk(root, onerror=_refuse_folder, followlinks=True):
        links = [
            os.path.join(place, name)
            for name in folders
            if not _is_hidden(name) and os.path.islink(os.path.join(place, name))
        ]
        skipped = [link for link in links if _is_already_listed(os.path.realpath(link), place, top)]
        names = {os.path.basename(link) for link in skipped}
        folders[:] = [name for name in folders if not _is_hidden(name) and name not in names]
        yield place, files, skipped


def _is_already_listed(target: str, place: str, top: str) -> bool:
    """Return whether a link leads to a parent of itself, or to another folder of the data."""
    around = Path(os.path.realpath(place))
    inside = Path(target).relative_to(top).parts if Path(target).is_relative_to(top) else None
    is_inside = inside is not None and not any(map(_is_hidden, inside))
    return is_inside or around.is_relative_to(target)


def _refuse_folder(error: OSError) -> NoReturn:
    raise DataError(
        f"the folder '{error.filename}' cannot be read ({error.strerror}); "
        "make it readable, or choose another"
    ) from error


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "$RECYCLE.BIN")


def list_subfolders(folder: Path) -> list[Path]:
    """List the visible sub-folders by name.

    Raises:
        DataError: The folder cannot be read.
    """
    try:
        return sorted(
            child for child in folder.iterdir() if child.is_dir() and not _is_hidden(child.name)
        )
    except OSError as error:
        _refuse_folder(error)


def find_cache_folder() -> Path | None:
    """Return ``$USEG_CACHE``, or the system's usual place for caches; None if it is ``off``."""
    chosen = os.environ.get("USEG_CACHE", "")
    if chosen:
        return None if chosen.casefold() == "off" else Path(chosen).expanduser().absolute()
    return platformdirs.user_cache_path("useg", appauthor=False)


@contextmanager
def replacing(path: Path, is_own: Recognizer) -> Iterator[Path]:
    """Yield a draft beside ``path`` that replaces ``path`` when the block succeeds.

    The content is flushed to disk and then renamed, so neither a reader nor a killed process ever
    leaves or sees half a file.

    Args:
        path: The file.
        is_own: Recognises a file at ``path`` that may be replaced
            (:mod:`useg.ownership`). Any other file stays.

    Raises:
        DataError: There is a file that useg did not write.
        MachineError: The folder cannot be written.
    """
    refuse_foreign_files([(path, is_own)])
    with _explain_errors(path):
        draft, lock = _new_draft(path, is_folder=False)
    try:
        with _explain_errors(path):
            yield draft
            with open(draft, "rb+") as file:
                os.fsync(file.fileno())
            _put_in_place(draft, path, is_own)
    finally:
        # The disk may be gone.
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def replacing_folder(path: Path, is_own: Recognizer) -> Iterator[Path]:
    """Yield a draft folder beside ``path`` that replaces ``path`` when the block succeeds.

    An empty folder may always be replaced. Arguments and errors are those of :func:`replacing`.
    """
    if not _is_empty_folder(path):
        refuse_foreign_files([(path, is_own)])
    # A link to an empty folder: the folder is replaced, the link stays.
    place = Path(os.path.realpath(path)) if path.is_symlink() else path
    with _explain_errors(path), draft_folder(place) as draft:
        yield draft
        flush_folder(draft)
        _put_folder_in_place(draft, place, is_own)


@contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """Yield a draft folder beside ``path``, and remove it if the block has not moved it away.

    Raises:
        OSError: The folder cannot be written.
    """
    clear_drafts(path.absolute().parent)
    draft, lock = _new_draft(path, is_folder=True)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        os.close(lock)


def flush_folder(path: Path) -> None:
    """Flush all files in a folder to the disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            with open(os.path.join(folder, name), "rb+") as file:
                os.fsync(file.fileno())


def _put_folder_in_place(draft: Path, place: Path, is_own: Recognizer) -> None:
    """Move a draft to its place, but not over files that somebody has put there meanwhile."""
    if _is_empty_folder(place) or not os.path.lexists(place):
        draft.rename(place)
        return
    refuse_foreign_files([(place, is_own)])
    # The system replaces only empty folders in one step.
    old = place.with_name(_draft_name(place))
    try:
        place.rename(old)
        # From now on, nobody finds it any more.
        if not is_own(old):
            raise DataError(
                f"another program changed {place} while useg was about to replace it; move the "
                "files that useg did not write out of it, and run the command again"
            )
        draft.rename(place)
    except BaseException:
        with suppress(OSError):
            old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


@contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise MachineError(
                f"the name {path.name[:40]}... is too long for this disk; shorten it"
            ) from error
        raise MachineError(
            f"{path} cannot be written ({error.strerror}); free space, change its permissions or "
            "choose another place"
        ) from error


def _put_in_place(draft: Path, path: Path, is_own: Recognizer) -> None:
    """Move a draft to its place, but not over a foreign file that has appeared meanwhile."""
    try:
        # Unlike a rename, this fails if a file is there.
        os.link(draft, path)
    except OSError:
        # A file is there, or the disk has no hard links.
        refuse_foreign_files([(path, is_own)])
        os.replace(draft, path)


def _draft_name(path: Path) -> str:
    suffix = path.suffix if re.fullmatch(r"\.[A-Za-z0-9]{1,12}", path.suffix) else ""
    return f".useg-{secrets.token_hex(8)}{suffix}"


def _new_draft(path: Path, *, is_folder: bool) -> tuple[Path, int]:
    """Create a locked draft beside a path; returns it and the descriptor that holds the lock."""
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    while True:
        draft = path.with_name(_draft_name(path))
        if is_folder:
            draft.mkdir()
            descriptor = os.open(draft, os.O_RDONLY | os.O_CLOEXEC)
        else:
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
            descriptor = os.open(draft, flags, 0o666)
        # Another process may have found the draft before it was locked, and removed it.
        if _try_lock(descriptor) is not False and _is_still_at(draft, descriptor):
            return draft, descriptor
        os.close(descriptor)


def _try_lock(descriptor: int, *, wait: bool = False) -> bool | None:
    """Lock an open file until it is closed; False if another process has it, None without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_still_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except OSError:
        return False


def clear_drafts(folder: Path) -> None:
    """Remove the drafts that killed processes left in a folder; those of live ones stay."""
    for path in folder.iterdir():
        if not is_draft(path):
            continue
        # A folder that vanishes or cannot be read belongs to another process.
        with suppress(OSError):
            _remove_abandoned(path)


def is_draft(path: Path) -> bool:
    """Whether a file or folder has the name of a draft."""
    return bool(_DRAFT_NAME.fullmatch(path.name))


def _remove_abandoned(draft: Path) -> None:
    is_folder = stat.S_ISDIR(os.lstat(draft).st_mode)
    access = os.O_RDONLY if is_folder else os.O_RDWR
    descriptor = os.open(draft, access | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        age = time.time() - os.fstat(descriptor).st_mtime
        is_free = _try_lock(descriptor)
        if is_free or (is_free is None and age > _ABANDONED_AFTER_SECONDS):
            shutil.rmtree(draft) if is_folder else draft.unlink()
    finally:
        os.close(descriptor)


@contextmanager
def locked_folder(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder: they wait, or fail, until the block ends.

    The lock is a file that the system releases when its process dies. Disks without locks are not
    protected.

    Raises:
        MachineError: Another process has it and ``wait`` is false, or the folder cannot be written.
    """
    path = folder / LOCK_NAME
    with _explain_errors(path):
        descriptor = _open_lock(path, wait=wait)
    try:
        yield
    finally:
        with suppress(OSError):
            if not os.fstat(descriptor).st_size and _is_still_at(path, descriptor):
                path.unlink()
        os.close(descriptor)


def _open_lock(path: Path, *, wait: bool) -> int:
    flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        descriptor = os.open(path, flags, 0o666)
        if _try_lock(descriptor, wait=wait) is False:
            os.close(descriptor)
            raise MachineError(
                f"another useg process is writing to {path.parent}; wait until it is done, or "
                "choose another folder for the output"
            )
        # The process that had the lock has removed the file.
        if _is_still_at(path, descriptor):
            return descriptor
        os.close(descriptor)


def make_folder(path: Path) -> Path:
    """Create a folder and its parents, and check that it is writable.

    Raises:
        MachineError: it cannot be created or written, or a file has its name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise MachineError(
            f"the folder {path} cannot be written ({error.strerror}); choose another folder"
        ) from error
    return path


def comparable_name(name: str) -> str:
    """Return what two names have in common that some disks take for one.

    >>> comparable_name("Street.PNG"), comparable_name("caf\u00e9") == comparable_name("cafe\u0301")
    ('street.png', True)
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def refuse_same_names(paths: Iterable[Path]) -> None:
    """Refuse outputs that are one file on the disk where they go; call it before a job begins.

    The disks of macOS and Windows, and most memory cards, do not tell ``A.png`` from ``a.png``.

    Raises:
        DataError: There are two such outputs.
    """
    seen: dict[tuple[Path, str], Path] = {}
    for path in paths:
        other = seen.setdefault((path.parent, comparable_name(path.name)), path)
        if other != path and _ignores_case(path.parent):
            raise DataError(
                f"{other.name!r} and {path.name!r} would be one file in {path.parent}: its disk "
                "ignores the case of letters, or how an accent is encoded; rename one of the "
                "images, or choose a folder on another disk"
            )


def _ignores_case(folder: Path) -> bool:
    """Whether the disk of a folder, which need not exist yet, takes different names for one."""
    place = folder.absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    with suppress(OSError), tempfile.NamedTemporaryFile(dir=place, prefix=".useg-\u00e9") as file:
        name = Path(file.name).name
        others = (name.upper(), unicodedata.normalize("NFD", name))
        return any(os.path.lexists(place / other) for other in others)
    return False


def check_writable(path: Path, is_own: Recognizer) -> None:
    """Check before a job begins that its result can be written to a file.

    Raises:
        DataError: There is a file that useg did not write.
        MachineError: The folder does not exist or cannot be written.
    """
    refuse_foreign_files([(path, is_own)], "choose another name")
    with _explain_errors(path):
        clear_drafts(path.absolute().parent)
        draft, lock = _new_draft(path, is_folder=False)
        draft.unlink()
        os.close(lock)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write the result of a command as JSON, whole or not at all."""
    with replacing(path, is_own_json) as draft:
        draft.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
