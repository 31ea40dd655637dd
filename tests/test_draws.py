"""What hypothesis draws for a derandomized test follows from the test alone."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def _draws() -> list[tuple[int, float]]:
    drawn = []

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.integers(0, 10**6), st.floats(0.0, 1.0))
    def collect(n: int, x: float) -> None:
        drawn.append((n, x))

    collect()
    return drawn


def test_modules_that_other_tests_import_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _draws()
    numbers = [7 * n + 3 for n in range(100, 400)] + [1 / n for n in range(3, 300)]
    (tmp_path / "made_of_numbers.py").write_text(f"NUMBERS = {numbers}\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        importlib.import_module("made_of_numbers")
        assert _draws() == before
    finally:
        sys.modules.pop("made_of_numbers", None)
