"""How Sphinx builds the site: `make docs`.

The pages are plain Markdown that also reads well outside the site, so navigation lives here.
"""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from docutils.utils.math import latex2mathml
from sphinx.util.nodes import make_refnode

import useg

project = "useg"
author = "the authors of useg"
copyright = "the authors of useg, Apache-2.0"
version = release = useg.__version__
language = "en"
root_doc = "index"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["tutorial/*"]
smartquotes_action = "D"  # dashes alone; quotes stay as they are written

NAVIGATION = {  # caption -> page, or page with a shorter title than its own
    "Start": ["Get started <self>", "Tutorial <tutorial>"],
    "Guides": [
        "data",
        "train",
        "evaluate",
        "predict",
        "objects",
        "Label images <labelling>",
        "Label next <label>",
        "New images <new_images>",
        "export",
        "serving",
        "security",
        "distributed",
        "Clusters <cluster>",
    ],
    "Concepts": ["tiles", "scores", "plan"],
    "Reference": [
        "commands",
        "settings",
        "api",
        "Benchmarks <benchmarks>",
        "Trials behind the plan <plan_trials>",
        "Models compared <models>",
        "architecture",
        "changelog",
    ],
}

# strictness: `sphinx-build -W` turns each of these warnings into a failure
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!useg\.).*")]  # other packages' types

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_url_schemes = ("http", "https", "mailto")

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_use_rtype = False
napoleon_use_admonition_for_examples = False

html_theme = "furo"
html_title = "useg"
html_static_path = ["_static"]
html_css_files = ["useg.css"]
html_js_files = ["useg.js"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
html_math_renderer = "mathml"
templates_path: list[str] = []
copybutton_exclude = ".linenos, .gp"


def add_navigation(app: Any, page: str, source: list[str]) -> None:
    """Append the table of contents to the start page."""
    if page != root_doc:
        return
    for caption, pages in NAVIGATION.items():
        lines = ["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"]
        source[0] += "\n" + "\n".join(lines) + "\n"


def mathml(self: Any, node: Any) -> None:
    """Write a formula as MathML, which browsers show without a script."""
    from docutils import nodes

    formula = latex2mathml.tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block))
    self.body.append(formula)
    raise nodes.SkipNode


def drop_examples_marker(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Take the directives of doctest out of examples: they are for the tests."""
    lines[:] = [re.sub(r"\s*# doctest:.*$", "", line) for line in lines]


def follow_internal_reference(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Resolve what a docstring says of the package's inside: such a name must exist.

    Where it is public too, it becomes a link to its public name; else it stays without a link.
    """
    target = node.get("reftarget", "")
    module, _, name = target.rpartition(".")
    if node.get("refdomain") != "py" or not module.startswith("useg."):
        return None
    try:
        thing = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None  # Sphinx warns, and a warning is a failure
    for public in useg.__all__:
        if getattr(useg, public) is thing:
            place = env.get_domain("py").objects[f"useg.{public}"]
            return make_refnode(
                app.builder, node["refdoc"], place.docname, place.node_id, content, f"useg.{public}"
            )
    return content


def setup(app: Any) -> dict[str, bool]:
    """Connect the functions above."""
    app.connect("source-read", add_navigation)
    app.connect("missing-reference", follow_internal_reference)
    app.connect("autodoc-process-docstring", drop_examples_marker)
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
