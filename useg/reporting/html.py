"""A template and its content -> one HTML page that needs nothing else: pictures lie inside it.

The pages stand in ``templates/`` beside this file.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from useg.files import replacing
from useg.pictures import Picture
from useg.reporting.spelling import number, percent, sentence, span

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "templates"
_LONGEST_SIDE = 1024  # of a picture in a page: enough when enlarged, small enough to mail


@dataclass(frozen=True)
class Shot:
    """A picture as a page holds it: ``source`` is a ``data:`` address; ``small`` label maps are shown with square pixels."""

    caption: str
    source: str
    width: int
    height: int
    small: bool = False


def photo(caption: str, picture: Picture) -> Shot:
    """Put a photograph ``(H, W, 3)`` into a page, as JPEG."""
    sheet = _reduced(Pillow.fromarray(picture), Pillow.Resampling.BOX)
    return Shot(caption, address(jpeg(sheet, 88), "jpeg"), *sheet.size)


def flat(caption: str, ids: NDArray[np.uint8], colors: NDArray[np.uint8]) -> Shot:
    """Put a map of ids ``(H, W)`` into a page in the exact ``colors`` ``(256, 3)``, as PNG."""
    sheet = _reduced(Pillow.fromarray(ids), Pillow.Resampling.NEAREST)
    sheet.putpalette(colors.tobytes())
    target = io.BytesIO()
    sheet.save(target, "PNG", optimize=True)
    return Shot(caption, address(target.getvalue(), "png"), *sheet.size, small=max(sheet.size) < 640)


def jpeg(sheet: Pillow.Image, quality: int) -> bytes:
    """Encode a picture."""
    target = io.BytesIO()
    sheet.save(target, "JPEG", quality=quality, optimize=True)
    return target.getvalue()


def address(content: bytes, kind: str) -> str:
    """Return the ``data:`` address that is a picture of the kind ``"jpeg"`` or ``"png"``."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _reduced(sheet: Pillow.Image, how: Pillow.Resampling) -> Pillow.Image:
    """Reduce a large picture; the ids of a map must not be mixed."""
    factor = _LONGEST_SIDE / max(sheet.size)
    return sheet.resize((max(1, round(sheet.width * factor)), max(1, round(sheet.height * factor))), how) if factor < 1 else sheet


def write_page(path: Path, template: str, **content: Any) -> None:
    """Fill a template and write the page; it appears whole or not at all.

    Raises:
        UsageError: ``path`` cannot be written.
    """
    page = _environment().get_template(template).render(content)
    with replacing(path) as temporary:
        temporary.write_text(page, "utf-8")


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES, encoding="utf-8"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share: percent(share).replace(" ", "\u00a0")
    environment.filters["number"] = number
    environment.filters |= {"sentence": sentence, "span": span}
    environment.filters["rgb"] = lambda color: f"rgb({color[0]},{color[1]},{color[2]})"
    environment.filters["at"] = lambda share: f"{100 * min(max(share, 0), 1):.2f}%"
    return environment
