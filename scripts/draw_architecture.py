"""The imports of the package -> a drawing of its rooms, and the list of its modules.

    python scripts/draw_architecture.py            # write both
    python scripts/draw_architecture.py --check    # write nothing; exit 1 when one is stale

The drawing is docs/architecture.svg, the list stands in docs/architecture.md. A room is a folder of
the package; the modules beside the folders are two rooms, those that use no folder and those that
do. Nothing is placed by hand, so neither can differ from the code. An arrow that others imply is
left out: if A uses B and B uses C, then A may use C too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from functools import cache
from itertools import permutations, product
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "useg"
TARGET = ROOT / "docs" / "architecture.svg"
PAGE = ROOT / "docs" / "architecture.md"
START, END = "<!-- modules -->\n", "<!-- /modules -->"
BASE, TOP = "foundations", "command line, API"
BOX, ROW, GAP, EDGE = (168, 50), 104, 32, 16  # in pixels
STYLE = """text { font: 15px system-ui, sans-serif; fill: #1a1a1a; text-anchor: middle; }
.small { font-size: 11.5px; fill: #555; }
rect { fill: #eaf0fd; stroke: #3a66c8; stroke-width: 1.5; }
path { fill: none; stroke: #7a8699; stroke-width: 1.4; }
marker path { fill: #7a8699; stroke: none; }"""

Graph = dict[str, set[str]]
Point = tuple[float, float]


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


@cache
def uses() -> Graph:
    """Return the modules that each module imports."""
    known = modules()
    return {name: imports(path, known) for name, path in known.items()}


@cache
def rooms() -> tuple[dict[str, list[str]], Graph]:
    """Return the modules of each room, and which rooms each room imports from."""
    graph = uses()
    home = {name: name.split(".")[1] for name in graph if name.count(".") > 1}
    for name in graph:
        if name not in home:
            home[name] = TOP if any(each.count(".") > 1 for each in _reach(name, graph)) else BASE
    inside: dict[str, list[str]] = {}
    for name in graph:
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
    """Return the row of each room: right below the lowest of those that use it."""
    reach = {node: _reach(node, graph) for node in graph}

    def depth(node: str) -> int:
        users = [other for other in graph if node in reach[other] and other not in reach[node]]
        return 1 + max(map(depth, users), default=-1)

    return {node: depth(node) for node in graph}


def places(rows: list[list[str]]) -> dict[str, Point]:
    """Return the middle of each box: rows from top to bottom, each centred."""
    whole = _width(rows)
    found: dict[str, Point] = {}
    for k, names in enumerate(rows):
        left = (whole - len(names) * (BOX[0] + GAP) + GAP + BOX[0]) / 2
        for j, name in enumerate(names):
            found[name] = left + j * (BOX[0] + GAP), EDGE + BOX[1] / 2 + k * ROW
    return found


def _width(rows: list[list[str]]) -> float:
    most = max(map(len, rows))
    return most * BOX[0] + (most - 1) * GAP + 2 * EDGE


def arranged(arrows: Graph, row: Mapping[str, int]) -> list[list[str]]:
    """Order the rooms of each row such that arrows are short and run behind no box."""
    rows = [sorted(name for name in row if row[name] == k) for k in range(max(row.values()) + 1)]

    def cost(orders: tuple[tuple[str, ...], ...]) -> tuple[int, float]:
        place = places([list(names) for names in orders])
        pairs = [(name, other) for name, used in arrows.items() for other in used]
        hidden = sum(_hidden(name, other, place) for name, other in pairs)
        return hidden, sum(abs(place[name][0] - place[other][0]) for name, other in pairs)

    return [list(names) for names in min(product(*map(permutations, rows)), key=cost)]


def _hidden(name: str, other: str, place: Mapping[str, Point]) -> int:
    """Count the points of an arrow, of 40, that lie behind boxes of other rooms."""
    points = [_curve(place[name], place[other], k / 40) for k in range(41)]
    boxes = [middle for each, middle in place.items() if each not in (name, other)]
    return sum(
        abs(x - middle[0]) < BOX[0] / 2 + 8 and abs(y - middle[1]) < BOX[1] / 2
        for x, y in points
        for middle in boxes
    )


def _curve(start: Point, end: Point, t: float) -> Point:
    """Return a point of an arrow: straight down, and in the last gap over to the box."""
    (x0, y0), (x1, y1) = (start[0], start[1] + BOX[1] / 2), (end[0], end[1] - BOX[1] / 2)
    y = y0 + t * (y1 - y0)
    u = max(0.0, 1 - (y1 - y) / (ROW - BOX[1]))
    return x0 + (x1 - x0) * u * u * (3 - 2 * u), y


def drawing() -> str:
    """Return the drawing as SVG."""
    inside, graph = rooms()
    arrows = reduced(graph)
    rows = arranged(arrows, layers(graph))
    place = places(rows)
    height = 2 * EDGE + BOX[1] + (len(rows) - 1) * ROW
    parts = [_arrow(place[name], place[other]) for name in place for other in sorted(arrows[name])]
    parts += [_box(name, inside[name], place[name]) for name in place]
    return "\n".join([_head(_width(rows), height), *parts, "</svg>"]) + "\n"


def _head(width: float, height: float) -> str:
    marker = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" '
        f'role="img" aria-label="The rooms of useg, and which uses which">\n'
        f"<style>{STYLE}</style>\n<defs>{marker}</defs>"
    )


def _arrow(start: Point, end: Point) -> str:
    (x0, y0), (x1, y1) = start, end
    if y0 == y1:  # two rooms that use each other
        side = BOX[0] / 2 if x1 > x0 else -BOX[0] / 2
        return f'<path d="M{x0 + side:g},{y0:g} L{x1 - side:g},{y1:g}" marker-end="url(#head)"/>'
    y0, y1 = y0 + BOX[1] / 2, y1 - BOX[1] / 2
    gap = ROW - BOX[1]
    curve = f"C{x0:g},{y1 - gap / 2:g} {x1:g},{y1 - gap / 2:g} {x1:g},{y1:g}"
    return f'<path d="M{x0:g},{y0:g} V{y1 - gap:g} {curve}" marker-end="url(#head)"/>'


def _box(name: str, inside: list[str], place: Point) -> str:
    x, y = place[0] - BOX[0] / 2, place[1] - BOX[1] / 2
    said = f"{len(inside)} modules"
    listed = ", ".join(module.removeprefix("useg.") for module in inside)
    return (
        f"<g><title>{listed}</title>"
        f'<rect x="{x:g}" y="{y:g}" width="{BOX[0]}" height="{BOX[1]}" rx="6"/>'
        f'<text x="{place[0]:g}" y="{place[1] - 3:g}">{name}</text>'
        f'<text x="{place[0]:g}" y="{place[1] + 15:g}" class="small">{said}</text></g>'
    )


def page() -> str:
    """Return docs/architecture.md with the list of modules as it is."""
    before, start, rest = PAGE.read_text("utf-8").partition(START)
    _, end, after = rest.partition(END)
    return f"{before}{start}{listing()}\n{end}{after}"


def listing() -> str:
    """Return every module with its first sentence, each room after those that it uses."""
    inside, graph = rooms()
    known, row = modules(), layers(graph)
    parts = []
    for room in sorted(inside, key=lambda name: (-row[name], name)):
        lines = ["| module | |", "| --- | --- |"]
        for name in _in_order(inside[room], uses()):
            said = (ast.get_docstring(ast.parse(known[name].read_text("utf-8"))) or "").split("\n")
            path = known[name].relative_to(PACKAGE).as_posix()
            lines.append(f"| `{path}` | {said[0].replace('|', chr(92) + '|')} |")
        parts.append("\n".join([f"### {room}", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _in_order(names: list[str], graph: Graph) -> list[str]:
    """Sort modules so that each follows those that it uses."""
    reach = {name: _reach(name, graph) for name in names}
    return sorted(names, key=lambda name: (len(reach[name]), name))


def main() -> int:
    """Write the drawing and the list, or check them."""
    files = {TARGET: drawing(), PAGE: page()}
    if "--check" not in sys.argv:
        for path, content in files.items():
            path.write_text(content, "utf-8")
        return 0
    if found := [
        path.name for path, content in files.items() if path.read_text("utf-8") != content
    ]:
        told = f"stale: {', '.join(found)}; run: python scripts/draw_architecture.py"
        print(told, file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
