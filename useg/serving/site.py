"""Files for browsers: the service's page, its documentation, and the site that useg export writes.

A site is the page with the model in it, for any web server: the reader's browser predicts, and no
image leaves it. ONNX Runtime for browsers has 33 MB and is not part of useg: useg downloads it once
from npm, checks its SHA-256, and keeps it in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import mimetypes
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from useg.classes import hex_color, most_probable
from useg.errors import MachineError, ModelError, SettingsError
from useg.files import clear_drafts, find_cache_folder, make_folder, replacing
from useg.inference.runtimes import Runtime, make_probe
from useg.models.description import ModelDescription
from useg.ownership import Recognizer, refuse_foreign_files
from useg.parsing import parse_json, read_limited

# Besides the page's files, these paths of the service need no token.
PUBLIC_PATHS = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")

NPM_PACKAGE = "onnxruntime-web@1.30.0"
ARCHIVE_NAME = "onnxruntime-web-1.30.0.tgz"
ARCHIVE_SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
NPM_TIMEOUT_SECONDS = 600

# The files of the archive that a site needs.
RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)

# Side of the logits on which the browser compares its runtimes.
SITE_PROBE_PIXELS = 128

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; "
    "img-src 'self' blob:; media-src 'self' blob:; connect-src 'self'; worker-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'"
)

PAGE, BROWSER, DOCS = (Path(__file__).parent / name for name in ("page", "browser", "docs"))

# Describes the model. A folder that has this file is a site.
_DESCRIPTION_NAME = "model.json"
# Lists the old and the new files while they are replaced.
_JOURNAL_NAME = ".useg-site.json"
_MAX_DESCRIPTION_BYTES = 16 << 20
_MODEL_FILE = re.compile(r"model-[0-9a-f]{12}\.onnx|probe-[0-9a-f]{12}\.bin")


def page_files() -> dict[str, tuple[bytes, str]]:
    """Read the files of the page: address -> content and media type.

    The page predicts through ``engine.js``; here that is the engine that asks this server.
    """
    paths = [*sorted(PAGE.iterdir()), DOCS / "docs.css"]
    files = {
        f"/{path.name}": (path.read_bytes(), mimetypes.guess_type(path.name)[0] or "text/plain")
        for path in paths
    }
    return files | {"/": files["/index.html"], "/engine.js": files.pop("/engine-server.js")}


def model_name(source: Path) -> str:
    """Return the name of a model: that of its run folder, or of its exported file.

    >>> model_name(Path("runs/street/model.safetensors")), model_name(Path("street.onnx"))
    ('street', 'street')
    """
    path = source if source.name else source.resolve()
    if path.name == "model.safetensors":
        return path.parent.resolve().name
    return path.stem if path.suffix in (".onnx", ".xml") else path.name


def docs_page(document: dict[str, Any], base_url: str, model: str, with_token: bool) -> str:
    """Return the documentation of the service as HTML that loads nothing from other hosts.

    Args:
        document: OpenAPI's.
        base_url: address of the service, for the examples.
        model: name of the model, for the examples.
        with_token: whether requests need a token.
    """
    environment = Environment(
        loader=FileSystemLoader(DOCS, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    token = " -H 'Authorization: Bearer TOKEN'" if with_token else ""
    operations = [
        {
            **operation,
            "method": method.upper(),
            "path": path,
            "id": f"{method}{path}".replace("/", "-").replace("{", "").replace("}", ""),
            "curl": _curl_example(
                operation, f"{base_url.rstrip('/')}{path.replace('{name}', model)}", token
            ),
            "is_public": path in PUBLIC_PATHS,
        }
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    return environment.get_template("docs.html").render(
        document=document, operations=operations, with_token=with_token
    )


def _curl_example(operation: dict[str, Any], url: str, token: str) -> str:
    """Return a command that calls an operation."""
    content = operation.get("requestBody", {}).get("content", {})
    command = f"curl -sSf {url}{'' if url.endswith(PUBLIC_PATHS) else token}"
    if "example" in content.get("application/json", {}):
        example = json.dumps(content["application/json"]["example"])
        return f"{command} -H 'Content-Type: application/json' -d '{example}'"
    if "image/png" in content:
        return f"{command} --data-binary @image.png"
    if "multipart/form-data" in content:
        (field,) = content["multipart/form-data"]["schema"]["properties"]
        return f"{command} -F {field}=@first.png -F {field}=@second.png"
    return command


def is_site(out: Path) -> bool:
    """Return whether a target means a site: a folder, or a name without an extension."""
    return out.is_dir() or not out.suffix


def check_site_target(out: Path) -> None:
    """Refuse a target that holds other files.

    Raises:
        SettingsError: it is a file, or a folder that holds anything but a site.
    """
    if out.is_file():
        raise SettingsError(
            f"{out} is a file; give a folder for the site, NAME.onnx, or NAME.xml for OpenVINO"
        )
    if os.path.lexists(out) and not out.is_dir():
        raise SettingsError(f"{out} is not a folder; give a folder for the site")
    if not out.is_dir() or not any(out.iterdir()):
        return
    recognize = _site_recognizer(out)
    if not recognize(out / _DESCRIPTION_NAME) and not _listed_files(out):
        raise SettingsError(
            f"the folder {out} contains files that useg export did not write; give a new or "
            "empty folder"
        )
    names = (*_read_page(), _DESCRIPTION_NAME, *(f"runtime/{name}" for name in RUNTIME_FILES))
    refuse_foreign_files(((out / name, recognize) for name in names), "give a new or empty folder")


def _site_recognizer(out: Path) -> Recognizer:
    """Return what recognises the files of the site in a folder: those that it lists by digest.

    The sites of version 0.1 have no list; the name of their model contains its digest.
    """
    listed, described = _listed_files(out), _read_json(out / _DESCRIPTION_NAME)
    is_site = {"name", "classes", "working", "file", "probe"} <= described.keys()
    is_old = is_site and "files" not in described and _has_digest_in_name(out, described["file"])

    def recognize(path: Path) -> bool:
        name = path.relative_to(out).as_posix()
        if path.is_symlink() or not path.is_file():
            return False
        if name == _DESCRIPTION_NAME:
            return is_site
        if name in listed:
            return hashlib.sha256(path.read_bytes()).hexdigest() in listed[name]
        return is_old

    return recognize


def _listed_files(out: Path) -> dict[str, set[str]]:
    """Return the names of a site's files with their digests; several while they are replaced."""
    listed: dict[str, set[str]] = {}
    for source in (_DESCRIPTION_NAME, _JOURNAL_NAME):
        files = _read_json(out / source).get("files", {})
        for name, digests in files.items() if isinstance(files, dict) else ():
            listed.setdefault(name, set()).update(map(str, digests))
    return listed


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_limited(path, _MAX_DESCRIPTION_BYTES))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _has_digest_in_name(out: Path, name: Any) -> bool:
    path = out / name if isinstance(name, str) and _MODEL_FILE.fullmatch(name) else None
    return bool(path and path.is_file() and _short_digest(path.read_bytes()) in path.name)


def check_browser_can_read(description: ModelDescription) -> None:
    """Refuse a model whose images a browser cannot read.

    Raises:
        ModelError: it takes other bands or another number type.
    """
    if description.channels not in (1, 3) or description.pixels != "uint8":
        raise ModelError(
            f"this model takes images with {description.channels} bands of {description.pixels}, "
            "but a browser reads 1 or 3 bands of uint8; export to NAME.onnx, or use useg serve"
        )


def write_site(out: Path, graph: bytes, model: Runtime, say: Callable[[str], None]) -> list[Path]:
    """Write a site, or a new model into an existing site; keeps files that are not its own.

    Args:
        out: the folder.
        graph: an ONNX file.
        model: the same model as a runtime.
        say: called with each progress message.

    Returns:
        The page, the description of the model, the model.

    Raises:
        MachineError: the folder cannot be written, or the browser's runtime cannot be fetched.
    """
    page = _read_page()
    files = {**page, **_model_files(graph, model), **_extract_runtime(say)}
    digests = b"".join(hashlib.sha256(content).digest() for content in files.values())
    version = hashlib.sha256(digests).hexdigest()
    preloaded = ["./", *(name for name in page if name != "service-worker.js")]
    worker = _replace_once(files.pop("service-worker.js"), "of this site's files", version)
    # Written last, because it names the other files to browsers.
    files["service-worker.js"] = _replace_once(
        worker, "FILES = []", f"FILES = {json.dumps(preloaded)}"
    )
    digests_by_name = {
        name: [hashlib.sha256(content).hexdigest()]
        for name, content in files.items()
        if name != _DESCRIPTION_NAME
    }
    described = {**json.loads(files[_DESCRIPTION_NAME]), "files": digests_by_name}
    files[_DESCRIPTION_NAME] = json.dumps(described, indent=2).encode()
    _replace_files(out, files, digests_by_name)
    models = [out / name for name in files if name.endswith(".onnx")]
    return [out / "index.html", out / _DESCRIPTION_NAME, *models]


def _replace_files(out: Path, files: dict[str, bytes], new: dict[str, list[str]]) -> None:
    """Write the files of a site over those of an earlier one, and remove its model.

    A journal lists the old and the new files, so that a killed export can be repeated.
    """
    check_site_target(out)
    for folder in (make_folder(out), make_folder(out / "runtime")):
        clear_drafts(folder)
    recognize = _site_recognizer(out)
    old = [path for path in out.iterdir() if _MODEL_FILE.fullmatch(path.name) and recognize(path)]
    journal = {"files": dict(new)}
    for name in new:
        if recognize(out / name):
            digest = hashlib.sha256((out / name).read_bytes()).hexdigest()
            journal["files"][name] = [*new[name], digest]
    with replacing(out / _JOURNAL_NAME, lambda path: "files" in _read_json(path)) as draft:
        draft.write_text(json.dumps(journal), "utf-8")
    for name, content in files.items():
        with replacing(out / name, recognize) as draft:
            draft.write_bytes(content)
    for path in old:
        if path.name not in files:
            path.unlink()
    (out / _JOURNAL_NAME).unlink()


def _read_page() -> dict[str, bytes]:
    """Read the service's page, with the engine that predicts in the browser."""
    paths = [path for folder in (PAGE, BROWSER) for path in sorted(folder.iterdir())]
    page = {path.name: path.read_bytes() for path in paths if path.name != "engine-server.js"}
    charset = '<meta charset="utf-8">'
    policy = f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_SECURITY_POLICY}">'
    page["index.html"] = _replace_once(page["index.html"], charset, f"{charset}\n{policy}")
    return page


def _model_files(graph: bytes, model: Runtime) -> dict[str, bytes]:
    """Return the model, its probe and its description.

    The names contain digests, so that no cache can mix an old and a new model.
    """
    description = model.description
    side = description.valid_size(SITE_PROBE_PIXELS + 2 * description.margin)
    pixels = make_probe(description, (side, side))
    expected = most_probable(model.class_logits(pixels)[0])
    content = pixels.tobytes() + expected.tobytes()
    files = {
        f"model-{_short_digest(graph)}.onnx": graph,
        f"probe-{_short_digest(content)}.bin": content,
    }
    graph_name, probe_name = files
    described = {
        "name": model_name(model.source),
        "classes": [
            {"id": k, "name": name, "color": hex_color(description.classes, k)}
            for k, name in enumerate(description.classes.names)
        ],
        "working": asdict(description.working),
        "channels": description.channels,
        "margin": description.margin,
        "stride": description.stride,
        "context": description.context,
        "smallest": description.smallest,
        "temperature": description.temperature,
        "precision": description.precision,
        "file": graph_name,
        "bytes": len(graph),
        "probe": {"file": probe_name, "height": side, "width": side},
    }
    return {**files, _DESCRIPTION_NAME: json.dumps(described, indent=2).encode()}


def _extract_runtime(say: Callable[[str], None]) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(onnxruntime_web(say))) as archive:
        members = {name: archive.extractfile(f"package/dist/{name}") for name in RUNTIME_FILES}
        return {
            f"runtime/{name}": member.read()
            for name, member in members.items()
            if member is not None
        }


def onnxruntime_web(say: Callable[[str], None]) -> bytes:
    """Return the archive of ONNX Runtime for browsers, from the cache folder or from npm.

    Raises:
        MachineError: neither has it, or it is not the expected one.
    """
    folder = find_cache_folder()
    cached = folder / ARCHIVE_NAME if folder else None
    if cached and cached.is_file():
        return _verified(cached.read_bytes(), cached)
    say(f"Fetching {NPM_PACKAGE} (33 MB) from npm")
    content = _fetch_archive(folder)
    if cached:
        make_folder(cached.parent)
        # The folder belongs to useg.
        with replacing(cached, Path.is_file) as draft:
            draft.write_bytes(content)
    return content


def _fetch_archive(folder: Path | None) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        command = [shutil.which("npm") or "", "pack", NPM_PACKAGE, "--silent"]
        try:
            subprocess.run(
                command, cwd=scratch, check=True, capture_output=True, timeout=NPM_TIMEOUT_SECONDS
            )
            return _verified((Path(scratch) / ARCHIVE_NAME).read_bytes(), Path(ARCHIVE_NAME))
        except (OSError, subprocess.SubprocessError) as error:
            target = folder or "a cache folder (unset USEG_CACHE)"
            raise MachineError(
                f"a site needs {NPM_PACKAGE}, and npm could not fetch it; on a machine with npm "
                f"and a network run: npm pack {NPM_PACKAGE}, then copy {ARCHIVE_NAME} into {target}"
            ) from error


def _verified(content: bytes, path: Path) -> bytes:
    if hashlib.sha256(content).hexdigest() != ARCHIVE_SHA256:
        raise MachineError(f"{path} is damaged, or not {NPM_PACKAGE}; remove it and export again")
    return content


def _replace_once(content: bytes, old: str, new: str) -> bytes:
    assert content.count(old.encode()) == 1
    return content.replace(old.encode(), new.encode())


def _short_digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
