"""``--init`` writes what was recognised, which is then read back the same."""

from pathlib import Path

import pytest
from made_doctor import CLEAN_SETS
from made_strangers import blobs, save

from useg.data.layouts import find_dataset
from useg.errors import UsageError
from useg.reporting.inspection import inspect_dataset


@pytest.mark.parametrize("name", ["cells", "indexed"])
def test_what_was_recognised_is_written_and_read_back(name: str, tmp_path: Path) -> None:
    root = CLEAN_SETS[name](tmp_path, 8)
    survey = inspect_dataset(root, init=True)
    again = find_dataset(root)
    assert again.pairs == survey.dataset.pairs
    assert again.classes == survey.dataset.classes
    assert again.splits_by == "split.csv"
    table = (root / "classes.toml").read_text()
    (root / "classes.toml").write_text(table.replace(survey.classes[1], "renamed"))
    assert find_dataset(root).classes.names[1] == "renamed"


def test_numbered_objects_are_described(tmp_path: Path) -> None:
    for k in range(8):
        image, numbers = blobs(k, 3 + k % 5)
        save(tmp_path / "images" / f"cell{chr(97 + k)}.png", image)
        save(tmp_path / "masks" / f"cell{chr(97 + k)}.png", numbers)
    inspect_dataset(tmp_path, init=True)
    assert "objects = true" in (tmp_path / "dataset.toml").read_text()
    assert find_dataset(tmp_path).classes.names == ("background", "foreground")


def test_what_somebody_wrote_is_not_replaced(tmp_path: Path) -> None:
    root = CLEAN_SETS["cells"](tmp_path, 4)
    (root / "split.csv").write_text("image,split\n")
    with pytest.raises(UsageError, match=r"split.csv' already exists"):
        inspect_dataset(root, init=True)
    assert not (root / "classes.toml").exists()
