"""The documents tell the truth: the README's program runs, tables are generated ones, every variable is described."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.benchmarks import publish
from fastattn.cli import matrix
from fastattn.runtime import native

ROOT = Path(__file__).resolve().parent.parent


def read(name: str) -> str:
    return (ROOT / name).read_text()


def test_the_program_in_the_readme_runs(capsys: pytest.CaptureFixture[str]):
    (program,) = re.findall(r"```python\n(.*?)```", read("README.md"), re.DOTALL)
    assert len(program.strip().splitlines()) <= 10
    names: dict[str, object] = {}
    exec(program, names)
    assert names["o"].shape == names["q"].shape == names["q"].grad.shape  # type: ignore[attr-defined]
    assert torch.isfinite(names["h"]).all() and names["stream"].shape == names["h"].shape  # type: ignore[arg-type,attr-defined]
    assert "takes it" in capsys.readouterr().out


def test_the_readme_names_every_public_function():
    text = read("README.md")
    functions = [name for name in fastattn.__all__ if callable(getattr(fastattn, name)) and name.islower()]
    assert len(functions) >= 10
    missing = [name for name in functions if f"`{name}`" not in text and f"fastattn.{name}" not in text]
    assert set(missing) <= {"use_backend"}, missing


def test_the_readme_can_be_filled_from_results():
    assert publish.insert(read("README.md"), "a table").count("a table") == 1


def test_links_between_documents_lead_somewhere():
    folders = ("docs", "fastattn", "csrc", "tests", "benchmarks")
    for path in [*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_environment_variable_is_described():
    variables = set(re.findall(r"FASTATTN_[A-Z_0-9]+", read("fastattn/runtime/env.py")))
    variables |= set(re.findall(r"""environ[^\n]*?["'](FASTATTN_[A-Z_0-9]+)""", read("setup.py")))
    variables |= set(re.findall(r"""["'](FASTATTN_[A-Z_0-9]+)["'][^\n]*environ""", read("setup.py")))
    assert {"FASTATTN_BACKEND", "FASTATTN_CPU_ISA", "FASTATTN_HUGEPAGES", "FASTATTN_REQUIRE_NATIVE"} <= variables
    text = read("docs/environment.md")
    assert not [name for name in variables if f"`{name}`" not in text]


@pytest.mark.skipif(native.error() is not None, reason=str(native.error()))
def test_the_committed_support_matrix_is_current():
    assert read("docs/support-matrix.md") == matrix.markdown(), "run `make docs`"
