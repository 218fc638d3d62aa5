"""The imports of the package -> docs/architecture.svg: its rooms, and which room uses which.

    python scripts/draw_architecture.py            # write the drawing
    python scripts/draw_architecture.py --check    # write nothing; exit 1 when it is stale

A room is a folder of the package; the modules beside the folders are two rooms, those that use no
folder and those that do. Nothing is placed by hand, so the drawing cannot differ from the code.
An arrow that others imply is left out: if A uses B and B uses C, then A may use C too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "useg"
TARGET = ROOT / "docs" / "architecture.svg"
BASE, TOP = "foundations", "command line, API"
BOX, ROW, GAP, EDGE = (168, 50), 104, 32, 16  # in pixels
STYLE = """text { font: 15px system-ui, sans-serif; fill: #1a1a1a; text-anchor: middle; }
.small { font-size: 11.5px; fill: #555; }
rect { fill: #eaf0fd; stroke: #3a66c8; stroke-width: 1.5; }
path { fill: none; stroke: #7a8699; stroke-width: 1.4; }
marker path { fill: #7a8699; stroke: none; }"""

Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Return the modules of the package by their dotted names, `__init__` files left out."""
    paths = [path for path in PACKAGE.rglob("*.py") if not path.name.startswith("__")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(paths)}


def imports(path: Path, known: Mapping[str, Path]) -> set[str]:
    """Return the modules of the package that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(known)


def rooms() -> tuple[dict[str, list[str]], Graph]:
    """Return the modules of each room, and which rooms each room imports from."""
    known = modules()
    graph = {name: imports(path, known) for name, path in known.items()}
    home = {name: name.split(".")[1] for name in known if name.count(".") > 1}
    for name in known:
        if name not in home:
            home[name] = TOP if any(each.count(".") > 1 for each in _reach(name, graph)) else BASE
    inside: dict[str, list[str]] = {}
    for name in known:
        inside.setdefault(home[name], []).append(name)
    between: Graph = {room: set() for room in inside}
    for name, used in graph.items():
        between[home[name]] |= {home[other] for other in used} - {home[name]}
    return inside, between


def _reach(start: str, graph: Graph) -> set[str]:
    """Return everything that can be reached from a node."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def reduced(graph: Graph) -> Graph:
    """Leave out each arrow that a longer way implies; rooms that use each other keep theirs."""
    reach = {node: _reach(node, graph) for node in graph}
    return {
        node: {
            other
            for other in used
            if not any(
                other in reach[way] and node not in reach[way] and way not in reach[other]
                for way in used - {other}
            )
        }
        for node, used in graph.items()
    }


def layers(graph: Graph) -> dict[str, int]:
    """Return the row of each room: below it lies everything that it uses and that does not use it."""
    reach = {node: _reach(node, graph) for node in graph}

    def height(node: str) -> int:
        below = [other for other in reach[node] if node not in reach[other]]
        return 1 + max(map(height, below), default=-1)

    heights = {node: height(node) for node in graph}
    return {node: max(heights.values()) - value for node, value in heights.items()}


def drawing() -> str:
    """Return the drawing as SVG."""
    inside, graph = rooms()
    arrows, row = reduced(graph), layers(graph)
    rows = [sorted(name for name in row if row[name] == k) for k in range(max(row.values()) + 1)]
    most = max(map(len, rows))
    whole = most * BOX[0] + (most - 1) * GAP + 2 * EDGE
    place: dict[str, tuple[float, float]] = {}
    for k, names in enumerate(rows):
        users = {
            name: [place[other][0] for other in place if name in arrows[other]] for name in names
        }
        names.sort(key=lambda name: sum(users[name]) / max(1, len(users[name])))
        width = len(names) * BOX[0] + (len(names) - 1) * GAP
        for j, name in enumerate(names):
            place[name] = (whole - width) / 2 + BOX[0] / 2 + j * (BOX[0] + GAP), 40 + k * ROW
    height = 40 + len(rows) * ROW - (ROW - BOX[1])
    parts = [_arrow(place[name], place[other]) for name in place for other in sorted(arrows[name])]
    parts += [_box(name, inside[name], place[name]) for name in place]
    return "\n".join([_head(whole, height), *parts, "</svg>"]) + "\n"


def _head(width: float, height: float) -> str:
    marker = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" '
        f'role="img" aria-label="The rooms of useg, and which uses which">\n'
        f"<style>{STYLE}</style>\n<defs>{marker}</defs>"
    )


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x0, y0), (x1, y1) = start, end
    if y0 == y1:  # two rooms that use each other
        side = BOX[0] / 2 if x1 > x0 else -BOX[0] / 2
        return f'<path d="M{x0 + side:g},{y0:g} L{x1 - side:g},{y1:g}" marker-end="url(#head)"/>'
    y0, y1 = y0 + BOX[1] / 2, y1 - BOX[1] / 2
    bend = (y1 - y0) / 2
    curve = f"M{x0:g},{y0:g} C{x0:g},{y0 + bend:g} {x1:g},{y1 - bend:g} {x1:g},{y1:g}"
    return f'<path d="{curve}" marker-end="url(#head)"/>'


def _box(name: str, inside: list[str], place: tuple[float, float]) -> str:
    x, y = place[0] - BOX[0] / 2, place[1] - BOX[1] / 2
    said = f"{len(inside)} modules"
    listed = ", ".join(module.removeprefix("useg.") for module in inside)
    return (
        f"<g><title>{listed}</title>"
        f'<rect x="{x:g}" y="{y:g}" width="{BOX[0]}" height="{BOX[1]}" rx="6"/>'
        f'<text x="{place[0]:g}" y="{place[1] - 3:g}">{name}</text>'
        f'<text x="{place[0]:g}" y="{place[1] + 15:g}" class="small">{said}</text></g>'
    )


def main() -> int:
    """Write the drawing, or check it."""
    if "--check" not in sys.argv:
        TARGET.write_text(drawing(), "utf-8")
        return 0
    if TARGET.read_text("utf-8") == drawing():
        return 0
    told = "docs/architecture.svg is stale; run: python scripts/draw_architecture.py"
    print(told, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
