"""The tree of errors, and what the helpers that raise them say."""

from __future__ import annotations

import pytest

import useg
from useg.errors import choose, need, suggest


@pytest.mark.parametrize(
    "name", ["DataError", "ModelError", "SettingsError", "MachineError", "MissingPackageError"]
)
def test_every_error_is_public_documented_and_a_usage_error(name: str) -> None:
    error = getattr(useg, name)
    assert issubclass(error, useg.UsageError)
    assert error.__doc__


def test_missing_package_is_an_error_of_the_machine_with_the_install_command() -> None:
    assert issubclass(useg.MissingPackageError, useg.MachineError)
    with pytest.raises(useg.MissingPackageError, match=r"run: pip install 'useg\[serve\]'"):
        need("no_such_package", "serve")


def test_unknown_option_is_an_error_of_the_settings_that_lists_all_and_suggests_one() -> None:
    with pytest.raises(useg.SettingsError) as caught:
        choose("augmentation", "filp", {"flip": 1, "dihedral": 2})
    assert str(caught.value) == (
        "augmentation 'filp' is not known; choose one of dihedral, flip; did you mean 'flip'?"
    )


def test_nothing_is_suggested_when_nothing_is_similar() -> None:
    assert suggest("zzz", ["flip", "dihedral"]) == ""
