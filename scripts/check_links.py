"""A built site -> every link that leads nowhere, and everything that it fetches from other hosts.

    python scripts/check_links.py site

The generator checks the links that it makes itself. This script reads the finished HTML, so that a
theme's links, raw HTML and images count too. A page must also be readable without a network:
images, styles and scripts from another host are errors, links to it are not.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a reader may follow, to other hosts too.
LINKS = {"a": "href", "area": "href"}
# What a browser fetches by itself.
PARTS = {
    "img": "src",
    "script": "src",
    "link": "href",
    "source": "src",
    "iframe": "src",
    "object": "data",
    "video": "src",
}
# Kinds of <link> that a browser does not fetch.
NOT_FETCHED = {"canonical", "next", "prev", "search", "index", "genindex"}


@dataclass
class Page(HTMLParser):
    """One page: its anchors, the links that can be followed, and the files that are fetched."""

    path: Path
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text("utf-8"))

    def __hash__(self) -> int:
        return id(self)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag names and where it leads."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        kinds = set(given.get("rel", "").split())
        if tag in LINKS and LINKS[tag] in given:
            self.links.append(given[LINKS[tag]])
        elif tag in PARTS and PARTS[tag] in given:
            is_link = tag == "link" and kinds & NOT_FETCHED
            (self.links if is_link else self.parts).append(given[PARTS[tag]])


def problems(site: Path) -> list[str]:
    """Return a sentence for every link that leads nowhere; none if all is well."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    if not pages:
        return [f"{site} holds no page; build it first: make docs"]
    found = []
    for path, page in pages.items():
        name = path.relative_to(site)
        found += [f"{name}: fetches {part}" for part in page.parts if _is_elsewhere(part)]
        for target in (*page.links, *(part for part in page.parts if not _is_elsewhere(part))):
            if why := _problem(target, path, site, pages):
                found.append(f"{name}: {target} {why}")
    return found


def _is_elsewhere(target: str) -> bool:
    return target.startswith("//") or urlsplit(target).scheme in ("http", "https")


def _problem(target: str, path: Path, site: Path, pages: dict[Path, Page]) -> str:
    parts = urlsplit(target)
    if parts.scheme or target.startswith("//"):
        known = parts.scheme in ("http", "https", "mailto", "data")
        return "" if known else "has an unknown scheme"
    place = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
    if parts.path.startswith("/"):
        return "is absolute, and breaks where the site is not at the root"
    if place.is_dir():
        place = place / "index.html"
    if not place.is_file():
        return "does not exist"
    if not place.is_relative_to(site.resolve()):
        return "lies outside the site"
    anchors = next((page.anchors for each, page in pages.items() if each.resolve() == place), None)
    fragment = unquote(parts.fragment)
    if fragment and anchors is not None and fragment not in anchors:
        return "has no such anchor"
    return ""


def main() -> int:
    """Print the problems of the site that is named; exit status 1 if there are any."""
    found = problems(Path(sys.argv[1]))
    for problem in found:
        print(problem, file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
