"""The masks in which ``useg inspect`` finds faults, and how ``useg label`` shows them first."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from made_doctor import find_file, shift_one_mask, write_cells
from made_labelling import labelling

from useg.cli import main
from useg.labelling.app import LabelOptions
from useg.labelling.folder import LabelFolder
from useg.labelling.mask_files import find_faulty, find_paths, suggest_label_command
from useg.reporting.inspection import inspect_dataset


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells, one of whose masks is shifted."""
    root = write_cells(tmp_path_factory.mktemp("cells"))
    shift_one_mask(root)
    return root


def test_inspect_prints_the_command_that_shows_faulty_masks_first(
    cells: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", str(cells)])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("to correct 1 mask by hand: useg label ")
    words = shlex.split(line.partition(": ")[2])
    asked: list[LabelOptions] = []
    monkeypatch.setattr(
        "useg.labelling.app.serve_labelling_page", lambda options, *_, **__: asked.append(options)
    )
    with pytest.raises(SystemExit):
        main(words[1:])
    [options] = asked
    assert options.faulty
    with labelling(options.images, (), faulty=True) as site:
        folder, state = site.ask("/folder").json, site.ask("/state").json
        k = max(range(len(state["priorities"])), key=state["priorities"].__getitem__)
        assert folder["images"][k]["name"] == find_file(cells, 11).name
        assert "is shifted relative to its image" in folder["images"][k]["finding"]
        assert [name for name, state in enumerate(state["states"]) if state != "done"] == [k]


def test_masks_elsewhere_are_named_and_masks_that_cannot_be_edited_are_not_offered(
    cells: Path, tmp_path: Path
) -> None:
    root = tmp_path / "set"
    shutil.copytree(cells, root)
    (root / "images").rename(root / "photo")
    (root / "masks").rename(root / "label")
    line = suggest_label_command(inspect_dataset(root))
    assert line.endswith(f"useg label {root}/photo --masks {root}/label --faulty")
    for path in (root / "label").iterdir():
        path.rename(path.with_suffix(".bmp"))
    assert suggest_label_command(inspect_dataset(root)) == ""


def test_a_folder_without_faults_says_so(tmp_path: Path) -> None:
    place = find_paths(write_cells(tmp_path, 6) / "images")
    folder = LabelFolder(place)
    folder.mark_faulty(find_faulty(place))
    assert folder.notes == ["useg inspect found no faulty masks in this folder"]
    assert {each.state for each in folder.images} == {"done"}
