"""Files are listed in natural order."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from useg.folders import natural_key


@given(st.lists(st.integers(0, 10**6), unique=True))
def test_numbers_in_names_count_as_numbers(numbers: list[int]) -> None:
    names = [Path(f"f/a_{n}.png") for n in numbers]
    assert sorted(names, key=natural_key) == [Path(f"f/a_{n}.png") for n in sorted(numbers)]


@given(st.lists(st.text(max_size=6)))
def test_natural_order_is_a_total_order_of_any_names(names: list[str]) -> None:
    assert sorted(sorted(names, reverse=True), key=natural_key) == sorted(names, key=natural_key)
