"""The tutorial: it runs from top to bottom, explains before it shows, and its checks catch wrong
answers.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import jupytext
import numpy as np
import pytest
from nbclient import NotebookClient

import useg.machine

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOK = jupytext.read(DOCS / "tutorial.py")
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
# All of it runs in the test; what more scenes show is for readers.
FEWER = {
    "k, (128, 96)) for k in range(200)": "k, (128, 96)) for k in range(12)",
    "k, (128, 96)) for k in range(40)": "k, (128, 96)) for k in range(12)",
    'WORK / "streets", 120,': 'WORK / "streets", 16,',
}
WRONG = {  # nearly right: the mistakes that a reader would make
    "output_size": lambda size, depth: size - 184,
    "conv_parameters": lambda channels_in, channels_out, kernel: (
        kernel * kernel * channels_in * channels_out
    ),
    "tile_step": lambda window, margin, depth: window - 2 * margin,
    "receptive_field": lambda layers: 1 + sum(kernel - 1 for kernel, _ in layers),
    "pixel_loss": lambda logits, target: float(np.log(np.exp(logits).sum(0)).mean()),
    "iou": lambda prediction, truth, k: (
        ((prediction == k) & (truth == k)).sum() / max(1, (truth == k).sum())
    ),
    "split_video": lambda count, held, gap: (
        list(range(count - held)),
        list(range(count - held, count)),
    ),
}


def tagged(tag: str) -> list[Any]:
    return [cell for cell in CODE if tag in cell.metadata.get("tags", [])]


def test_no_code_without_text_before_it() -> None:
    assert NOTEBOOK.cells[0].cell_type == "markdown"
    for before, cell in zip(NOTEBOOK.cells, NOTEBOOK.cells[1:], strict=False):
        assert "markdown" in (before.cell_type, cell.cell_type), f"no text before:\n{cell.source}"


def test_code_cells_are_short() -> None:
    lines = [ast.unparse(ast.parse(cell.source)).splitlines() for cell in CODE]  # one a statement
    assert ["\n".join(cell) for cell in lines if len(cell) > 25] == []


def test_every_exercise_has_a_folded_solution_and_a_check() -> None:
    exercises = [
        k for k, cell in enumerate(NOTEBOOK.cells) if "exercise" in cell.metadata.get("tags", [])
    ]
    numbers = re.findall(
        r"^### Exercise (\d+)", "\n".join(cell.source for cell in NOTEBOOK.cells), re.MULTILINE
    )
    assert numbers == [str(k + 1) for k in range(len(WRONG))]
    assert len(exercises) == len(tagged("solution")) == len(tagged("check")) == len(WRONG)
    for k, name in zip(exercises, WRONG, strict=True):
        exercise, solution, check = NOTEBOOK.cells[k], NOTEBOOK.cells[k + 2], NOTEBOOK.cells[k + 4]
        assert f"def {name}(" in exercise.source
        assert "return None  # your answer here" in exercise.source
        assert f"def {name}_solution(" in solution.source
        assert solution.metadata["jupyter"]["source_hidden"]
        asserted = [
            node for node in ast.walk(ast.parse(check.source)) if isinstance(node, ast.Assert)
        ]
        assert any(node.msg for node in asserted)


@pytest.mark.parametrize("name", WRONG)
def test_a_check_accepts_the_solution_and_catches_a_wrong_answer(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(useg.machine, "tune", lambda: None)
    place = list(WRONG).index(name)
    scope: dict[str, Any] = {}
    for cell in (
        *CODE[:2],
        tagged("exercise")[place],
        tagged("solution")[place],
        tagged("check")[place],
    ):
        exec(cell.source, scope)
    scope[name] = WRONG[name]
    with pytest.raises(AssertionError, match="yours"):
        exec(tagged("check")[place].source, scope)


def test_it_runs_and_says_nothing_on_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "JUPYTER_RUNTIME_DIR",
        "JUPYTER_CONFIG_DIR",
        "IPYTHONDIR",
    ):  # nothing of this user's own has a say
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("USEG_TUTORIAL_DATA", raising=False)
    monkeypatch.setenv(
        "USEG_TUTORIAL_STEPS", "10"
    )  # all of it runs; what 800 steps show is for readers
    monkeypatch.setenv("USEG_TUTORIAL_FIGURE", str(tmp_path / "three_way.png"))
    notebook = jupytext.read(DOCS / "tutorial.py")
    for many, few in FEWER.items():
        [cell] = [cell for cell in notebook.cells if many in cell.source]
        cell.source = cell.source.replace(many, few)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 20
    assert sum("image/svg+xml" in output.get("data", {}) for output in outputs) == 1
    assert (tmp_path / "three_way.png").stat().st_size > 10_000


def test_the_picture_of_the_readme_is_small() -> None:
    assert (DOCS / "three_way.png").stat().st_size <= 250_000
